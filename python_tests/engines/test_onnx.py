"""Export to ONNX: fixed steps, and the steps of an adaptive solve by ``replay``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import aca_ext

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package)

pytestmark = pytest.mark.filterwarnings("ignore")  # of the exporters


class Field(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(y) * t.cos()


class OfTree(Field):
    def forward(self, t: Tensor, y: Any) -> Any:
        return {"y": super().forward(t, y["y"])}


class Fixed(nn.Module):
    def __init__(self, field: nn.Module) -> None:
        super().__init__()
        self.layer = aca_ext.NeuralODE(field, method="rk4", options={"step_size": 0.25})

    def forward(self, y: Tensor) -> Tensor:
        return self.layer({"y": y})["y"] if isinstance(self.layer.func, OfTree) else self.layer(y)


class Replayed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.field = Field()
        self.solution = aca_ext.solve(self.field, torch.randn(5, 3), [0.0, 0.5, 1.0])

    def forward(self, y: Tensor) -> Tensor:
        return aca_ext.replay(self.field, self.solution, y)


@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize("kind", ["fixed", "tree", "replay"])
def test_an_exported_model_computes_the_same(kind: str, dynamo: bool, tmp_path: Path) -> None:
    import onnxruntime

    model = Replayed() if kind == "replay" else Fixed(OfTree() if kind == "tree" else Field())
    path = str(tmp_path / "model.onnx")
    torch.onnx.export(model, (torch.randn(5, 3),), path, dynamo=dynamo)
    session = onnxruntime.InferenceSession(path)
    y0 = torch.randn(5, 3)
    (found,) = session.run(None, {session.get_inputs()[0].name: y0.numpy()})
    assert torch.allclose(torch.from_numpy(found), model(y0), atol=1e-5)
