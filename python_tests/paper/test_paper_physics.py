"""The three-body and hopper experiments at their quick size: their files, their claims, and continued runs."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

from benchmarks.paper import __main__ as command
from benchmarks.paper import hopper, three_body
from benchmarks.paper.common import MissingError, Settings


def quick(output: Path) -> Settings:
    return Settings(scale="quick", output=output, data=output)


@pytest.fixture(scope="module")
def three_body_json(tmp_path_factory) -> tuple[dict, Path]:
    output = tmp_path_factory.mktemp("three_body")
    assert command.main(["three_body", "--quick", "--output", str(output)]) == 0
    return json.loads((output / "paper_three_body_quick.json").read_text()), output


@pytest.fixture
def data(tmp_path) -> Path:
    """A folder with a file of rollouts as ``load`` writes it, with smooth curves in place of simulated physics."""
    t = np.linspace(0, 1, hopper.N_POINTS)[:, None]
    random = np.random.default_rng(0)
    frequency, phase = random.uniform(1, 4, (2, hopper.QUICK.n_rollouts, 1, hopper.N_DIMS))
    write_rollouts(tmp_path, np.sin(frequency * t + phase).astype(np.float32))
    return tmp_path


def write_rollouts(folder: Path, rollouts: np.ndarray, checksum: str | None = None) -> Path:
    path = folder / f"hopper_{len(rollouts)}.npz"
    np.savez(path, rollouts=rollouts, sha256=checksum or hashlib.sha256(rollouts.tobytes()).hexdigest())
    return path


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


def test_hopper_writes_all_its_models(data):
    assert command.main(["hopper", "--quick", "--output", str(data), "--data", str(data)]) == 0
    record = json.loads((data / "paper_hopper_quick.json").read_text())
    assert [row[0] for row in rows(record, 0)] == list(hopper.PAPER)
    assert rows(record, 0)[-1][2::2] == tuple(map(str, hopper.PAPER["latent ODE, aca"]))
    assert len(record["values"]["runs"]) == 3 * len(hopper.PAPER)
    assert (data / "paper_hopper_quick.png").read_bytes().startswith(b"\x89PNG")
    assert not list(data.glob("*.progress.pt"))


def test_hopper_resumes_within_a_training(data, monkeypatch):
    monkeypatch.setattr(hopper, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(hopper, "PERCENT", (20,))
    monkeypatch.setattr(hopper, "PAPER", {name: row[1:2] for name, row in hopper.PAPER.items()})
    whole = hopper.run(quick(data))

    update, left = torch.optim.Adam.step, [2 * hopper.QUICK.iterations + 2]

    def interrupted(self, *args):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return update(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(torch.optim.Adam, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            hopper.run(quick(data))
    counted = []
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self, *args: counted.append(1) or update(self, *args))
    resumed = hopper.run(quick(data))
    assert len(counted) == 5 * hopper.QUICK.iterations - 2
    assert [run["losses"] for run in resumed.values["runs"]] == [run["losses"] for run in whole.values["runs"]]
    assert [run["mse"] for run in resumed.values["runs"]] == [run["mse"] for run in whole.values["runs"]]


def test_latent_ode_gradient_is_exact_with_aca_and_not_with_the_adjoint(data):
    rollouts, _ = hopper.load(quick(data), hopper.QUICK.n_rollouts)
    train, test = hopper.windows(rollouts, 0)
    torch.manual_seed(0)
    model = hopper.LatentODE(train, hopper.QUICK, "aca")
    for parameter in model.f.parameters():
        torch.nn.init.normal_(parameter, std=3.0)  # makes the solve take several steps and reject some
    errors = hopper.gradient_errors(hopper.QUICK, model.state_dict(), hopper.batch_of(test, 20, 0))
    assert errors["aca"] < 1e-5
    assert errors["adjoint"] > 10 * errors["aca"]


def test_windows_and_shown_points(data):
    rollouts, _ = hopper.load(quick(data), hopper.QUICK.n_rollouts)
    train, test = hopper.windows(rollouts, 0)
    assert train.shape == (40, 100, 14)
    assert test.shape == (10, 100, 14)
    shown = hopper.shown_points(6, 20, torch.Generator().manual_seed(0))
    assert shown.shape == (6, 20)
    assert (shown.diff(dim=1) > 0).all()
    assert (shown[0] != shown[1]).any()


def test_latent_ode_sees_only_the_shown_points(data):
    rollouts, _ = hopper.load(quick(data), hopper.QUICK.n_rollouts)
    train, test = hopper.windows(rollouts, 0)
    batch = hopper.batch_of(test, 10, 0)
    hidden = torch.ones_like(batch.x[..., 0], dtype=torch.bool).scatter(1, batch.shown, False)
    other = hopper.Batch(torch.where(hidden[..., None], 99.0, batch.x), batch.shown)
    for build in (hopper.LatentODE, hopper.Recurrent):
        model = build(train, hopper.QUICK, "aca" if build is hopper.LatentODE else torch.nn.GRUCell)
        assert torch.equal(model(batch), model(other))


@pytest.mark.parametrize("damage", ["checksum", "shape", "cut"])
def test_hopper_refuses_a_damaged_file(data, damage):
    n = hopper.QUICK.n_rollouts
    path = data / f"hopper_{n}.npz"
    if damage == "checksum":
        write_rollouts(data, np.zeros((n, hopper.N_POINTS, hopper.N_DIMS), np.float32), checksum="0" * 64)
    elif damage == "shape":
        write_rollouts(data, np.zeros((n, 3, hopper.N_DIMS), np.float32))
    else:
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(MissingError, match=r"hopper_\d+\.npz .*Delete it"):
        hopper.load(quick(data), n)


def test_hopper_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "dm_control", None)
    assert command.main(["hopper", "--quick", "--output", str(tmp_path), "--data", str(tmp_path)]) == 1
    assert "pip install '.[paper]'" in capsys.readouterr().err


@pytest.mark.filterwarnings("default")
def test_hopper_simulates_the_published_states(tmp_path):
    pytest.importorskip("dm_control", reason="the extra [paper] is not installed: pip install '.[paper]'")
    rollouts, checksum = hopper.load(quick(tmp_path), 3)
    assert rollouts.shape == (3, 200, 14)
    assert rollouts.isfinite().all()
    first = np.random.RandomState(123)
    expected = [*first.uniform(0, 0.5, 2), *first.uniform(-2, 2, 5), *first.uniform(-5, 5, 7)]
    np.testing.assert_allclose(rollouts[0, 0], expected, rtol=1e-6)
    assert (rollouts[:, 1:] != rollouts[:, :-1]).any(-1).all()
    again, checksum_again = hopper.load(quick(tmp_path), 3)
    assert torch.equal(again, rollouts)
    assert checksum_again == checksum
    assert hashlib.sha256(hopper.simulate(3).tobytes()).hexdigest() == checksum
