"""NODE18 and ResNet18 of Fig. 7, at any width, with batch or group normalization."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor, nn
from torch.nn import functional as F

import aca_ext
from benchmarks.paper.common import three_gradients

GROUP = 4  # channels of a group
Norm = Callable[[int], nn.Module]
NORMS: dict[str, Norm] = {
    "batch": nn.BatchNorm2d,
    "group": lambda channels: nn.GroupNorm(max(channels // GROUP, 1), channels),
}


class Convolutions(nn.Module):
    """f(y), the term that a residual block adds to y."""

    def __init__(self, inputs: int, channels: int, norm: Norm, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride, padding=1, bias=False)
        self.norm1 = norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = norm(channels)

    def forward(self, y: Tensor) -> Tensor:
        return self.norm2(self.conv2(F.relu(self.norm1(self.conv1(y)))))


class Residual(nn.Module):
    """y → relu(y + f(y)), with a projection of y if the shape changes."""

    def __init__(self, inputs: int, channels: int, norm: Norm, stride: int = 1) -> None:
        super().__init__()
        self.f = Convolutions(inputs, channels, norm, stride)
        self.shortcut = nn.Identity()
        if inputs != channels or stride != 1:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, channels, 1, stride, bias=False), norm(channels))

    def forward(self, y: Tensor) -> Tensor:
        return F.relu(self.shortcut(y) + self.f(y))


class Slope(nn.Module):
    """dy/dt = relu(f(y))."""

    def __init__(self, channels: int, norm: Norm) -> None:
        super().__init__()
        self.f = Convolutions(channels, channels, norm)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return F.relu(self.f(y))


@dataclass(frozen=True)
class Model:
    """A row of the table: the ResNet (gradient None), or the NODE with a gradient method and a solver."""

    name: str
    gradient: str | None = None
    method: str = ""
    tolerance: float = 0.0
    norm: str = "batch"

    def build(self, inputs: int, widths: tuple[int, ...], n_classes: int, stride: int = 1) -> nn.Sequential:
        norm = NORMS[self.norm]
        layers: list[nn.Module] = [nn.Conv2d(inputs, widths[0], 3, stride, padding=1, bias=False)]
        layers += [norm(widths[0]), nn.ReLU()]
        for stage, channels in enumerate(widths):
            before, stride = (widths[stage - 1], 2) if stage else (channels, 1)
            layers += [Residual(before, channels, norm, stride), self._second_block(channels, norm)]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], n_classes))

    def _second_block(self, channels: int, norm: Norm) -> nn.Module:
        if self.gradient is None:
            return Residual(channels, channels, norm)
        solver = {"method": self.method, "rtol": self.tolerance, "atol": self.tolerance}
        return aca_ext.NeuralODE(Slope(channels, norm), (0, 1), gradient=self.gradient, **solver)

    @property
    def solver(self) -> str:
        return "-" if self.gradient is None else f"{self.method} {self.tolerance:g}"


RESNET = Model("ResNet")
ACA, ADJOINT, NAIVE = (
    Model(f"NODE {gradient}", gradient, *(("heun_euler", 1e-2) if gradient == "aca" else ("dopri5", 1e-5)))
    for gradient in three_gradients()
)
ADJOINT_LOOSE = Model("NODE adjoint, ACA's solver", "adjoint", "heun_euler", 1e-2)
BATCH_NORM = (RESNET, ACA, ADJOINT, NAIVE, ADJOINT_LOOSE)
GROUP_NORM = tuple(replace(model, name=f"{model.name}, GroupNorm", norm="group") for model in BATCH_NORM)
