"""The experiments on the paper's analysis (toy, reverse, cost): a quick run of each, and continued runs."""

import json
import math

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
pytest.importorskip("sklearn")

from benchmarks.paper import cost, reverse, toy
from benchmarks.paper.__main__ import main
from benchmarks.paper.claims import CLAIMS
from benchmarks.paper.common import Progress, Settings, plain


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A function that runs an experiment at its quick size, once, and returns the content of its JSON."""
    folder = tmp_path_factory.mktemp("results")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def record(name):
        path = folder / f"paper_{name}_quick.json"
        if not path.exists():
            assert main([name, "--quick", "--output", str(folder)]) == 0
        assert path.with_suffix(".png").stat().st_size > 10_000
        assert not list(folder.glob("*.progress.pt"))
        return json.loads(path.read_text())

    yield record
    torch.set_num_threads(threads)


def rows_of(record, title):
    """Rows of the first table whose title starts with ``title``, as dicts by column."""
    table = next(t for t in record["tables"] if t["title"].startswith(title))
    return [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]


def test_json_names_where_it_comes_from(results):
    record = results("toy")
    assert record["experiment"] == "toy"
    assert record["scale"] == "quick"
    assert record["seed"] == 0
    assert {"machine", "versions", "commit", "date", "values"} <= record.keys()
    assert record["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("name", ["toy", "reverse", "cost"])
def test_page_takes_its_numbers_from_the_results(results, name):
    assert all(ours(results(name)) for _, _, of, ours, _ in CLAIMS if of == name)


def test_toy_has_the_paper_beside_ours(results):
    rows = rows_of(results("toy"), "|error of dL/dy0|")
    assert {(row[""], row["gradient"]) for row in rows} >= {
        (who, gradient) for who in ("paper", "ours") for gradient in ("aca", "adjoint", "naive")
    }


@pytest.mark.parametrize("variable", ["y0", "k"])
def test_toy_aca_alone_is_exact_for_the_discrete_solution(results, variable):
    i = {"y0": 2, "k": 3}[variable]
    for solver in results("toy")["values"]["errors"]:
        if "torchdiffeq" in solver["solver"]:
            continue
        errors = [row[i] for row in solver["errors"]]
        if solver["solver"].startswith("aca"):
            assert max(errors) < 1e-14
        else:
            assert max(errors) > 1e-7


def test_toy_aca_is_at_most_the_papers(results):
    errors = next(x for x in results("toy")["values"]["errors"] if x["solver"] == "aca ifactor 2")
    ours = [row[0] for end, row in zip(errors["T"], errors["errors"], strict=True) if end in toy.PAPER_T]
    assert all(a <= b for a, b in zip(ours, toy.PAPER["aca"], strict=True))


def test_toy_error_is_made_of_those_of_both_solves(results):
    errors = {x["solver"]: x for x in results("toy")["values"]["errors"]}
    for control in toy.CONTROLS:
        for name in ("aca", "adjoint"):
            solver = errors[f"{name} {control}"]
            for end, (error, *_, forward, backward) in zip(solver["T"], solver["errors"], strict=True):
                relative = error / (2 * math.exp(2 * toy.K * end))
                assert abs((1 + forward) * (1 + backward) - 1) == pytest.approx(relative, rel=1e-6)
                if name == "aca":
                    assert backward == pytest.approx(forward, rel=1e-6)
                else:
                    assert abs(backward) < abs(forward)


def test_stability_polynomial_is_the_exponential_series_up_to_the_order():
    series = [1.0, 1.0, 1 / 2, 1 / 6, 1 / 24, 1 / 120]
    assert toy.stability_polynomial("dopri5") == pytest.approx([*series, 1 / 600, 0], rel=1e-15)


@pytest.mark.parametrize("problem", ["van der Pol", "picture"])
def test_reverse_only_aca_meets_the_forward_states(results, problem):
    rows = {row[""]: row for row in rows_of(results("reverse"), problem)}
    aca, adjoint = rows["aca"], rows["adjoint"]
    assert aca["on forward states"] == aca["backward evaluations"] > 0
    assert aca["off y(0)"] == 0
    assert adjoint["on forward states"] <= 1  # only at the end, where the adjoint's backward solve starts
    assert adjoint["off y(0)"] is None or adjoint["off y(0)"] > 0.1
    assert rows["reverse solve"]["off y(0)"] > 0.1
    assert aca["gradient error"] < 1e-14


def test_reverse_round_trip_gains_an_order_where_p_is_even(results):
    rows = rows_of(results("reverse"), "round trip")
    assert {row["order p"] for row in rows} == {2, 3, 4, 5}
    for row in rows:
        assert float(row["round trip's order"]) == pytest.approx(
            row["predicted"], abs=0.6 if row["order p"] == 5 else 0.1
        )


@pytest.mark.parametrize("name", ["N_f", "N_t", "m"])
@pytest.mark.parametrize("measure", ["forward", "backward"])
def test_cost_of_computation_grows_as_the_paper_says(results, name, measure):
    table = next(t for t in results("cost")["tables"] if t["title"].startswith(f"exponents of {name}"))
    i = table["columns"].index(measure)
    assert {row[0] for row in table["rows"]} == {"aca", "adjoint", "naive", "direct"}
    for row in table["rows"]:
        assert row[i] == pytest.approx(row[i + 1], abs=0.03)


def test_cost_of_memory_and_depth_does_not_grow_with_trials_except_for_naive(results):
    rows = {row[""]: row for row in rows_of(results("cost"), "exponents of m")}
    for gradient in ("aca", "direct", "adjoint"):
        assert abs(rows[gradient]["memory"]) < 0.05
    for gradient in ("aca", "direct"):
        assert abs(rows[gradient]["depth"]) < 0.05
    assert rows["naive"]["memory"] > 0.8
    assert rows["naive"]["depth"] > 0.8


def test_cost_memory_orders_the_methods(results):
    rows = {row[""]: row for row in rows_of(results("cost"), "costs of one gradient")}
    memory = {gradient: float(row["peak memory / state"]) for gradient, row in rows.items()}
    assert memory["adjoint"] < memory["aca"] < memory["direct"] < memory["naive"]


def test_depth_is_the_longest_path():
    x = torch.ones((), requires_grad=True)
    short, long = x.exp(), x.exp().exp().exp()
    assert cost.depth_of(short + long) == 5  # add, three exponentials, the leaf


def test_an_interrupted_run_is_continued(tmp_path, monkeypatch):
    settings = Settings(scale="quick", output=tmp_path)
    solved = []
    round_trip = reverse._round_trip

    def interrupted(method, *rest):
        if method == "rk4" and "rk4" not in solved:
            solved.append(method)
            raise KeyboardInterrupt
        solved.append(method)
        return round_trip(method, *rest)

    monkeypatch.setattr(reverse, "_round_trip", interrupted)
    with pytest.raises(KeyboardInterrupt):
        reverse.run(settings)
    assert settings.output.joinpath("paper_reverse_quick.progress.pt").exists()
    reverse.run(settings)
    methods = list(reverse.ORDERS)
    before = methods[: methods.index("rk4")]
    assert solved == [*before, "rk4", *methods[len(before) :]]
    assert not list(tmp_path.glob("*.progress.pt"))


def test_progress_of_other_settings_is_ignored(tmp_path):
    settings = Settings(scale="quick", output=tmp_path)
    Progress(settings, "x", {"size": 1}).put("unit", torch.ones(2))
    assert torch.equal(Progress(settings, "x", {"size": 1}).get("unit"), torch.ones(2))
    assert Progress(settings, "x", {"size": 2}).get("unit") is None
    assert Progress(Settings(scale="quick", output=tmp_path, seed=1), "x", {"size": 1}).get("unit") is None
    assert Progress(Settings(scale="quick", output=tmp_path, fresh=True), "x", {"size": 1}).get("unit") is None


def test_json_knows_no_infinity():
    assert plain({"a": (float("inf"), torch.tensor([1.0, float("nan")]))}) == {"a": ["inf", [1.0, "nan"]]}
