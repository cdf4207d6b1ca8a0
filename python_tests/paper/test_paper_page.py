"""The documentation's page on the reproduction: it is what the results' files say, and says when they say nothing."""

import json
import shutil

import pytest

pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

from benchmarks.paper import __main__ as command
from benchmarks.paper import page
from benchmarks.paper.common import Settings

RESULTS = Settings.output


def test_the_page_is_what_the_results_say():
    assert page.PAGE.read_text() == page.rendered(RESULTS), "stale: python -m benchmarks.paper page"


def test_the_command_writes_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "PAGE", tmp_path / "paper.md")
    assert command.main(["page"]) == 0
    assert (tmp_path / "paper.md").read_text() == page.rendered(RESULTS)


def test_all_leaves_out_what_takes_hours_unless_quick(monkeypatch):
    ran = []
    monkeypatch.setattr(command, "_run", lambda name, settings: ran.append(name) or True)
    assert command.main(["all"]) == 0
    assert ran == [name for name in command.NAMES if name not in command.LONG]
    ran.clear()
    assert command.main(["all", "--quick"]) == 0
    assert ran == list(command.NAMES)


def test_parts_of_an_experiment_that_has_none_are_refused(capsys):
    with pytest.raises(SystemExit):
        command.main(["toy", "--quick", "--only", "aca"])
    assert "toy runs as a whole" in capsys.readouterr().err


def test_a_changed_number_changes_the_page(tmp_path):
    shutil.copy(RESULTS / "paper_hopper.json", tmp_path)
    before = page.rendered(tmp_path)
    record = json.loads((tmp_path / "paper_hopper.json").read_text())
    row = next(row for row in record["tables"][0]["rows"] if row[0] == "latent ODE, aca")
    row[1], record["date"], record["commit"] = "0.123", "2031-02-03T04:05:06", "c0ffee0123456789"
    (tmp_path / "paper_hopper.json").write_text(json.dumps(record))
    after = page.rendered(tmp_path)
    for text in ("0.123/", "| latent ODE, aca | 0.123 |", "2031-02-03", "`c0ffee0123`"):
        assert text not in before
        assert text in after


def test_claims_without_results_are_not_yet_run(tmp_path):
    empty = page.rendered(tmp_path)
    assert empty.count(page.NOT_YET) == len(page.CLAIMS)
    shutil.copy(RESULTS / "paper_toy.json", tmp_path / "paper_toy_quick.json")
    record = json.loads((RESULTS / "paper_toy.json").read_text())
    (tmp_path / "paper_toy_quick.json").write_text(json.dumps({**record, "scale": "quick"}))
    assert page.rendered(tmp_path) == empty


def test_bars_and_lines_stay_inside_a_cell():
    assert page._markdown(("a", "|b|"), [("x\ny", None)]) == "| a | \\|b\\| |\n| --- | --- |\n| x y | - |\n"
