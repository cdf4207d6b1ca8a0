"""The experiments on the hopper at their quick size: their data, their claims, and continued runs."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

from benchmarks.paper import __main__ as command
from benchmarks.paper import hopper, hopper_data, hopper_models, hopper_schedule
from benchmarks.paper.claims import CLAIMS
from benchmarks.paper.common import MissingError, Settings, write_json


def quick(output: Path, **changes) -> Settings:
    return Settings(scale="quick", output=output, data=output, **changes)


@pytest.fixture
def data(tmp_path) -> Path:
    """A folder with a file of rollouts as ``load`` writes it, with smooth curves in place of simulated physics."""
    t = np.linspace(0, 1, hopper_data.N_POINTS)[:, None]
    random = np.random.default_rng(0)
    frequency, phase = random.uniform(1, 4, (2, hopper.QUICK.n_rollouts, 1, hopper_data.N_DIMS))
    write_rollouts(tmp_path, np.sin(frequency * t + phase).astype(np.float32))
    return tmp_path


def write_rollouts(folder: Path, rollouts: np.ndarray, checksum: str | None = None) -> Path:
    path = folder / f"hopper_{len(rollouts)}.npz"
    np.savez(path, rollouts=rollouts, sha256=checksum or hashlib.sha256(rollouts.tobytes()).hexdigest())
    return path


def rows(record: dict, table: int) -> list[tuple[str, ...]]:
    return [tuple(map(str, row)) for row in record["tables"][table]["rows"]]


def test_hopper_writes_all_its_models(data):
    assert command.main(["hopper", "--quick", "--output", str(data), "--data", str(data)]) == 0
    record = json.loads((data / "paper_hopper_quick.json").read_text())
    assert [row[0] for row in rows(record, 0)] == list(hopper.PAPER)
    assert rows(record, 0)[-1][2::2] == tuple(map(str, hopper.PAPER["latent ODE, aca"]))
    assert len(record["values"]["runs"]) == 3 * len(hopper.PAPER)
    assert all(ours(record) for _, _, name, ours, _ in CLAIMS if name == "hopper")
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
    rollouts, _ = hopper_data.load(quick(data), hopper.QUICK.n_rollouts)
    train, test = hopper_data.windows(rollouts, 0)
    torch.manual_seed(0)
    model = hopper_models.LatentODE(train, hopper.QUICK, "aca")
    for parameter in model.f.parameters():
        torch.nn.init.normal_(parameter, std=3.0)  # makes the solve take several steps and reject some
    errors = hopper.gradient_errors(hopper.QUICK, model.state_dict(), hopper_data.batch_of(test, 20, 0))
    assert errors["aca"] < 1e-5
    assert errors["adjoint"] > 10 * errors["aca"]


def test_windows_and_shown_points(data):
    rollouts, _ = hopper_data.load(quick(data), hopper.QUICK.n_rollouts)
    train, test = hopper_data.windows(rollouts, 0)
    assert train.shape == (40, 100, 14)
    assert test.shape == (10, 100, 14)
    shown = hopper_data.shown_points(6, 20, torch.Generator().manual_seed(0))
    assert shown.shape == (6, 20)
    assert (shown.diff(dim=1) > 0).all()
    assert (shown[0] != shown[1]).any()


def test_latent_ode_sees_only_the_shown_points(data):
    rollouts, _ = hopper_data.load(quick(data), hopper.QUICK.n_rollouts)
    train, test = hopper_data.windows(rollouts, 0)
    batch = hopper_data.batch_of(test, 10, 0)
    hidden = torch.ones_like(batch.x[..., 0], dtype=torch.bool).scatter(1, batch.shown, False)
    other = hopper_data.Batch(torch.where(hidden[..., None], 99.0, batch.x), batch.shown)
    for build in (hopper_models.LatentODE, hopper_models.Recurrent):
        model = build(train, hopper.QUICK, "aca" if build is hopper_models.LatentODE else torch.nn.GRUCell)
        assert torch.equal(model(batch), model(other))


@pytest.mark.parametrize("damage", ["checksum", "shape", "cut"])
def test_hopper_refuses_a_damaged_file(data, damage):
    n = hopper.QUICK.n_rollouts
    path = data / f"hopper_{n}.npz"
    if damage == "checksum":
        write_rollouts(data, np.zeros((n, hopper_data.N_POINTS, hopper_data.N_DIMS), np.float32), checksum="0" * 64)
    elif damage == "shape":
        write_rollouts(data, np.zeros((n, 3, hopper_data.N_DIMS), np.float32))
    else:
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(MissingError, match=r"hopper_\d+\.npz .*Delete it"):
        hopper_data.load(quick(data), n)


def test_hopper_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "dm_control", None)
    assert command.main(["hopper", "--quick", "--output", str(tmp_path), "--data", str(tmp_path)]) == 1
    assert "pip install '.[paper]'" in capsys.readouterr().err


@pytest.mark.filterwarnings("default")
def test_hopper_simulates_the_published_states(tmp_path):
    pytest.importorskip("dm_control", reason="the extra [paper] is not installed: pip install '.[paper]'")
    rollouts, checksum = hopper_data.load(quick(tmp_path), 3)
    assert rollouts.shape == (3, 200, 14)
    assert rollouts.isfinite().all()
    first = np.random.RandomState(123)
    expected = [*first.uniform(0, 0.5, 2), *first.uniform(-2, 2, 5), *first.uniform(-5, 5, 7)]
    np.testing.assert_allclose(rollouts[0, 0], expected, rtol=1e-6)
    assert (rollouts[:, 1:] != rollouts[:, :-1]).any(-1).all()
    again, checksum_again = hopper_data.load(quick(tmp_path), 3)
    assert torch.equal(again, rollouts)
    assert checksum_again == checksum
    assert hashlib.sha256(hopper_data.simulate(3).tobytes()).hexdigest() == checksum


def test_the_compiled_engine_gives_the_gradients_of_the_eager_one(data):
    rollouts, _ = hopper_data.load(quick(data), hopper.QUICK.n_rollouts)
    train, test = hopper_data.windows(rollouts, 0)
    batch, points = hopper_data.batch_of(test, 20, 0), torch.arange(5)
    gradients = []
    for engine in ("eager", "compiled"):
        torch.manual_seed(0)
        model = hopper_models.LatentODE(train, hopper.QUICK, "aca", engine)
        model.loss(batch, points, torch.zeros(len(test), hopper.QUICK.latent)).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert model.stats.compiled == "solve", model.stats.reason
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6 * gradients[0].abs().max().item())


def test_the_schedule_resumes_after_its_last_measurement(data, monkeypatch):
    def points(settings: Settings) -> list[dict]:
        return [unit["points"] for unit in hopper_schedule.run(settings).values["units"]]

    whole = points(quick(data, fresh=True))
    assert all(len(curve) == hopper_schedule.QUICK.iterations for curve in whole)

    measure, left = hopper_schedule._measured, [2]

    def interrupted(*args):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return measure(*args)

    with monkeypatch.context() as patched:
        patched.setattr(hopper_schedule, "_measured", interrupted)
        with pytest.raises(KeyboardInterrupt):
            hopper_schedule.run(quick(data))
    clocks = {"seconds", "cpu_seconds"}
    for resumed, at_once in zip(points(quick(data)), whole, strict=True):
        for point, expected in zip(resumed, at_once, strict=True):
            assert {k: v for k, v in point.items() if k not in clocks} == {
                k: v for k, v in expected.items() if k not in clocks
            }
    assert not list(data.glob("*.progress.pt"))


def test_the_schedule_reports_on_unfinished_trainings(data):
    settings = quick(data, only="naive")
    report = hopper_schedule.run(settings)
    record = json.loads(write_json(settings, report).read_text())
    assert all("naive" in ours(record) for _, _, name, ours, _ in CLAIMS if name == "hopper_schedule")
    assert not report.values["is_complete"]
    assert [row[0] for row in report.tables[0].rows] == ["naive"]
    assert report.tables[1].rows == []
    without_time = hopper_schedule.run(quick(data, until=0.0))
    assert [unit["points"] for unit in without_time.values["units"]] == [
        unit["points"] for unit in report.values["units"]
    ]


def test_the_extrapolation_continues_a_power_law():
    points = [{"iteration": n, "mse": 3.0 * n**-0.4} for n in range(1, 11)]
    assert hopper_schedule.extrapolated(points, 1000) == pytest.approx(3.0 * 1000**-0.4)
    assert hopper_schedule.extrapolated(points, 10) is None
    assert hopper_schedule.extrapolated(points[:3], 1000) is None


def test_the_last_point_within_a_budget():
    points = [{"evaluations": n} for n in (10, 20, 30)]
    assert hopper_schedule.last_within(points, "evaluations", 29) == {"evaluations": 20}
    assert hopper_schedule.last_within(points, "evaluations", 9) is None
