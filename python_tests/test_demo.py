"""The demo as a user runs it, with a small budget: its table, its picture, and its messages for bad options."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from aca_ext.__main__ import main

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")


def test_compares_the_gradients(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "new" / "demo.png"
    gradients = ["aca", "adjoint", "naive"]
    assert main(["demo", "--epochs", "1", "--method", "bosh3", "--output", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    rows = {}
    for line in capsys.readouterr().out.splitlines():
        found = re.fullmatch(r"(\w+) +([\d.]+)% +[\d.]+ +(\d+) +([\d.]+) MiB +([\d.e+-]+)", line)
        if found:
            rows[found[1]] = [float(x) for x in found.groups()[1:]]
    assert list(rows) == gradients
    accuracy, evaluations, memory, error = zip(*rows.values(), strict=True)
    assert all(50 < x <= 100 for x in accuracy)
    assert min(evaluations) > 0
    assert memory[2] > 2 * memory[0]
    assert error[0] < 1e-12 < 1e-6 < min(error[1:])


def test_takes_one_gradient_and_repeats_by_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables = []
    for seed in (1, 1, 2):
        arguments = ["--gradient", "direct", "--epochs", "1", "--seed", str(seed), "--output", str(tmp_path / "x.png")]
        assert main(["demo", *arguments]) == 0
        tables.append(re.findall(r"direct +([\d.]+%) +[\d.]+ +(\d+)", capsys.readouterr().out))
    assert len(tables[0]) == 1
    assert tables[0] == tables[1] != tables[2]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "nowhere"], ["--device nowhere"]),
        (["--output", "/dev/null/x.png"], ["--output /dev/null/x.png", "cannot be written"]),
    ],
)
def test_what_cannot_be_used_is_said_before_training(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", *arguments]) == 1
    told = capsys.readouterr()
    assert all(word in told.err for word in words)
    assert not told.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["demo", "--epochs", "0"], "'0' is no whole number of at least 1"),
        (["demo", "--epochs", "x"], "'x' is no whole number of at least 1"),
        (["demo", "--gradient", "exact"], "'aca', 'direct', 'naive', 'adjoint'"),
        (["demo", "--method", "rk4"], "'heun_euler'"),
        (["demon"], "'demo', 'examples', 'config'"),
        ([], "COMMAND"),
    ],
)
def test_bad_options(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert words.replace("'", "") in capsys.readouterr().err.replace("'", "")  # Python 3.12 lists choices unquoted


def test_says_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert main(["demo"]) == 1
    message = capsys.readouterr().err
    assert "needs the package sklearn" in message
    assert "pip install 'aca_ext[demo]'" in message
