"""The experiments on three bodies at their quick size: their files, their claims, and continued runs."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import aca_ext

pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

from benchmarks.paper import __main__ as command
from benchmarks.paper import orbit_models, three_body, three_body_unknown
from benchmarks.paper.claims import CLAIMS
from benchmarks.paper.common import Settings


def quick(output: Path, **changes) -> Settings:
    return Settings(scale="quick", output=output, data=output, **changes)


@pytest.fixture(scope="module")
def three_body_json(tmp_path_factory) -> tuple[dict, Path]:
    output = tmp_path_factory.mktemp("three_body")
    assert command.main(["three_body", "--quick", "--output", str(output)]) == 0
    return json.loads((output / "paper_three_body_quick.json").read_text()), output


def rows(record: dict, table: int) -> list[tuple[str, ...]]:
    return [tuple(map(str, row)) for row in record["tables"][table]["rows"]]


def test_three_body_writes_all_its_fits(three_body_json):
    record, output = three_body_json
    for gradient in ("aca", "adjoint", "naive"):
        assert [row for row in rows(record, 0) if row[:2] == ("L-BFGS", gradient)]
    assert rows(record, 0)[0][2] == str(three_body.PAPER_SUM)
    assert all(ours(record) for _, _, name, ours, _ in CLAIMS if name == "three_body")
    assert (output / "paper_three_body_quick.png").read_bytes().startswith(b"\x89PNG")
    assert not list(output.glob("*.progress.pt"))


def test_three_body_aca_is_the_discrete_gradient_and_the_others_are_not(three_body_json):
    errors = three_body_json[0]["values"]["gradient_errors"]
    assert max(errors["aca"]) < 1e-11
    assert min(errors["adjoint"]) > 1e-7
    assert min(errors["naive"]) > 1e-7


def test_three_body_finds_the_masses_and_predicts_the_future(three_body_json):
    record, _ = three_body_json
    aca = next(row for row in rows(record, 0) if row[:2] == ("L-BFGS", "aca"))
    found = [float(m) for m in aca[5].split(", ")]
    assert found == pytest.approx(three_body.MASSES, abs=5e-3)
    assert float(aca[6]) < 1e-2


def test_three_body_problem_is_the_papers():
    problem = three_body.Problem(three_body.QUICK, torch.device("cpu"))
    f = three_body.Gravity(torch.tensor(three_body.MASSES, dtype=torch.float64))
    momentum = torch.tensor(three_body.MASSES, dtype=torch.float64) @ f(None, problem.y0)[9:].view(3, 3)
    torch.testing.assert_close(momentum, torch.zeros(3, dtype=torch.float64), atol=1e-14, rtol=0)
    assert problem.loss(problem.seen) == 0
    assert ((problem.masses_at_start(3) - 1).abs() <= 0.1).all()


def test_augmented_positions():
    r = torch.tensor([0.0, 0, 0, 2, 0, 0, 0, 0, 4], dtype=torch.float64)
    parts = orbit_models.augmented(r).view(5, 3, 3)
    expected = torch.tensor([[2.0, 0, 0], [0, 0, 4], [-2, 0, 4]], dtype=torch.float64)
    n = torch.tensor([2.0, 4, 20**0.5], dtype=torch.float64)[:, None]
    for power in range(4):
        torch.testing.assert_close(parts[1 + power], expected / n**power)


def test_three_body_is_repeatable_and_resumes(tmp_path, monkeypatch):
    size = replace(three_body.QUICK, epochs=3, gradient_tolerances=(1e-3,))
    monkeypatch.setattr(three_body, "QUICK", size)
    monkeypatch.setattr(three_body, "_torchdiffeq", lambda: ())  # whose fits the test of all fits has
    whole = three_body.run(quick(tmp_path / "whole"))

    fit, calls = three_body.fit_masses, []

    def interrupted(gradient, *args):
        calls.append(gradient)
        if gradient == "adjoint":
            raise KeyboardInterrupt
        return fit(gradient, *args)

    monkeypatch.setattr(three_body, "fit_masses", interrupted)
    with pytest.raises(KeyboardInterrupt):
        three_body.run(quick(tmp_path / "parts"))
    monkeypatch.setattr(three_body, "fit_masses", lambda name, *args: calls.append(name) or fit(name, *args))
    calls.clear()
    resumed = three_body.run(quick(tmp_path / "parts"))
    assert calls[:2] == ["adjoint", "naive"]
    assert resumed.values == whole.values


@pytest.fixture(scope="module")
def orbits() -> orbit_models.Orbits:
    return orbit_models.Orbits(torch.device("cpu"))


def test_the_spline_has_the_accelerations_of_gravity(orbits):
    gravity = three_body.Gravity(torch.tensor(three_body.MASSES, dtype=torch.float64))
    with torch.no_grad():
        exact = torch.stack([gravity(None, torch.cat([r, orbits.y0[9:]]))[9:] for r in orbits.seen])
    torch.testing.assert_close(orbits.accelerations(), exact, rtol=0, atol=1e-4)


def test_newtons_law_is_a_setting_of_the_one_layer_node(orbits):
    node = orbit_models.NODE(orbits.seen, 0).double()
    weight = torch.zeros(9, 5, 9, dtype=torch.float64)
    for pair, (i, j) in enumerate(zip(*orbit_models.PAIRS, strict=True)):
        for axis in range(3):
            weight[3 * i + axis, 4, 3 * pair + axis] = three_body.K1 * three_body.MASSES[j]
            weight[3 * j + axis, 4, 3 * pair + axis] = -three_body.K1 * three_body.MASSES[i]
    weight = weight.flatten(1)
    with torch.no_grad():
        node.net.weight.copy_(weight * node.std)
        node.net.bias.copy_(weight @ node.mean)
        gravity = three_body.Gravity(torch.tensor(three_body.MASSES, dtype=torch.float64))
        torch.testing.assert_close(node(None, orbits.y0), gravity(None, orbits.y0), rtol=1e-10, atol=1e-10)


def test_lbfgs_keeps_the_best_parameters():
    f = torch.nn.Linear(2, 1).double()
    asked: list[int] = []

    def loss() -> torch.Tensor:
        asked.append(1)
        if len(asked) == 5:
            how = {"t": 0.0, "h": 0.1, "error_ratio": 2.0, "n_accepted": 0, "n_rejected": 0, "n_f_evals": 0}
            raise aca_ext.errors.SolveError("a trial that fails", **how)
        return (f(torch.eye(2, dtype=torch.float64)) - 3).square().sum() + 1

    losses = orbit_models.lbfgs(f, loss, 50)
    assert len(losses) == 4
    assert loss().item() == min(losses)


def test_measures_of_a_prediction(orbits):
    exact = three_body_unknown.measures(orbits.r, orbits)
    assert exact == {"rms_seen": 0.0, "mse_future": 0.0, "mse": 0.0, "useful_until": 2.0}
    off = orbits.r.clone()
    off[1501:] += 0.2
    late = three_body_unknown.measures(off, orbits)
    assert late["rms_seen"] == 0
    assert late["mse_future"] == pytest.approx(0.5 * 0.04, rel=1e-2)
    assert late["useful_until"] == pytest.approx(1.501)
    failed = three_body_unknown.measures(torch.full_like(orbits.r, torch.nan), orbits)
    assert failed["mse_future"] == float("inf")
    assert failed["useful_until"] == 0


def test_sequences_interleave_the_points():
    parts = orbit_models.sequences(torch.arange(1000)[:, None].repeat(1, 9))
    assert parts.shape == (100, 10, 9)
    assert parts[:3, 4, 0].tolist() == [4, 14, 24]


def test_unknown_physics_reports_on_a_part_and_continues(tmp_path):
    part = three_body_unknown.run(quick(tmp_path, only="LSTM"))
    assert [row[0] for row in part.tables[0].rows] == ["LSTM", "LSTM, augmented"]
    assert not part.values["is_complete"]
    assert command.main(["three_body_unknown", "--quick", "--output", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "paper_three_body_unknown_quick.json").read_text())
    assert record["values"]["is_complete"]
    assert [row[0] for row in rows(record, 0)][-2:] == ["LSTM", "LSTM, augmented"]
    assert len(rows(record, 0)) == 6
    assert all("LSTM" in ours(record) for _, _, name, ours, _ in CLAIMS if name == "three_body_unknown")
    lstm = [run for run in record["values"]["runs"] if run["model"].startswith("LSTM")]
    assert lstm == part.values["runs"]
    assert not list(tmp_path.glob("*.progress.pt"))
