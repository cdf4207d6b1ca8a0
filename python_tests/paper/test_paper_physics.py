"""The three-body experiment at its quick size: its files, its claims, and continued runs."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

from benchmarks.paper import __main__ as command
from benchmarks.paper import three_body
from benchmarks.paper.common import Settings


def quick(output: Path) -> Settings:
    return Settings(scale="quick", output=output, data=output)


@pytest.fixture(scope="module")
def three_body_json(tmp_path_factory) -> tuple[dict, Path]:
    output = tmp_path_factory.mktemp("three_body")
    assert command.main(["three_body", "--quick", "--output", str(output)]) == 0
    return json.loads((output / "paper_three_body_quick.json").read_text()), output


def rows(record: dict, table: int) -> list[tuple[str, ...]]:
    return [tuple(map(str, row)) for row in record["tables"][table]["rows"]]


def test_three_body_writes_all_its_models(three_body_json):
    record, output = three_body_json
    for gradient in ("aca", "adjoint", "naive"):
        assert [row for row in rows(record, 0) if row[:3] == ("ODE", "L-BFGS", gradient)]
        assert [row for row in rows(record, 1) if row[:3] == ("NODE", "Adam", gradient)]
    assert {row[0] for row in rows(record, 1)} == {"ODE", "NODE", "LSTM", "LSTM, augmented"}
    assert rows(record, 0)[0][3] == str(three_body.PAPER_SUM)
    assert (output / "paper_three_body_quick.png").read_bytes().startswith(b"\x89PNG")
    assert not list(output.glob("*.progress.pt"))


def test_three_body_aca_is_the_discrete_gradient_and_the_others_are_not(three_body_json):
    errors = three_body_json[0]["values"]["gradient_errors"]
    assert max(errors["aca"]) < 1e-11
    assert min(errors["adjoint"]) > 1e-7
    assert min(errors["naive"]) > 1e-7


def test_three_body_finds_the_masses_and_predicts_better_than_without_physics(three_body_json):
    record, _ = three_body_json
    aca = next(row for row in rows(record, 0) if row[:3] == ("ODE", "L-BFGS", "aca"))
    found = [float(m) for m in aca[6].split(", ")]
    assert found == pytest.approx(three_body.MASSES, abs=5e-3)
    future = {row[0]: float(row[4]) for row in rows(record, 1)}
    assert future["ODE"] < 0.1 * min(future["NODE"], future["LSTM"])


def test_three_body_problem_is_the_papers():
    problem = three_body.Problem(three_body.QUICK, torch.device("cpu"))
    f = three_body.Gravity(torch.tensor(three_body.MASSES, dtype=torch.float64))
    momentum = torch.tensor(three_body.MASSES, dtype=torch.float64) @ f(None, problem.y0)[9:].view(3, 3)
    torch.testing.assert_close(momentum, torch.zeros(3, dtype=torch.float64), atol=1e-14, rtol=0)
    assert problem.loss(problem.seen) == 0
    assert ((problem.masses_at_start(3) - 1).abs() <= 0.1).all()


def test_augmented_positions():
    r = torch.tensor([0.0, 0, 0, 2, 0, 0, 0, 0, 4], dtype=torch.float64)
    parts = three_body.augmented(r).view(5, 3, 3)
    expected = torch.tensor([[2.0, 0, 0], [0, 0, 4], [-2, 0, 4]], dtype=torch.float64)
    n = torch.tensor([2.0, 4, 20**0.5], dtype=torch.float64)[:, None]
    for power in range(4):
        torch.testing.assert_close(parts[1 + power], expected / n**power)


def test_three_body_is_repeatable_and_resumes(tmp_path, monkeypatch):
    size = replace(three_body.QUICK, epochs=3, node_epochs=2, lstm_epochs=2, gradient_tolerances=(1e-3,))
    monkeypatch.setattr(three_body, "QUICK", size)
    whole = three_body.run(quick(tmp_path / "whole"))

    fit, calls = three_body.fit_node, []

    def interrupted(gradient, *args):
        calls.append(gradient)
        if gradient == "adjoint":
            raise KeyboardInterrupt
        return fit(gradient, *args)

    monkeypatch.setattr(three_body, "fit_node", interrupted)
    with pytest.raises(KeyboardInterrupt):
        three_body.run(quick(tmp_path / "parts"))
    monkeypatch.setattr(three_body, "fit_node", lambda gradient, *args: calls.append(gradient) or fit(gradient, *args))
    calls.clear()
    resumed = three_body.run(quick(tmp_path / "parts"))
    assert calls == ["adjoint", "naive"]
    assert resumed.values == whole.values
