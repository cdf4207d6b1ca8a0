"""The examples at small size: each finds what it claims to find and draws a picture; and the command that runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from aca_ext.__main__ import main
from aca_ext.examples.command import EXAMPLES, description

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
# From torch's own formulas for forward-mode derivatives.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")

DOCS = Path(__file__).resolve().parent.parent / "docs"
Numbers = dict[str, float]


def learns(numbers: Numbers) -> bool:
    first, last = (next(numbers[f"{when} {what}"] for what in ("loss", "error") if f"{when} {what}" in numbers)
                   for when in ("first", "last"))  # fmt: skip
    return last < 0.98 * first


CLAIMS: dict[str, Callable[[Numbers], bool]] = {
    "spiral": learns,
    "latent_ode": learns,
    "cnf": lambda n: learns(n) and abs(n["mass on the plane"] - 1) < 0.05,
    "flow_matching": lambda n: n["loss"] < 2.9,  # 3 without a velocity
    "hamiltonian": lambda n: learns(n) and n["relative drift of its energy"] < 0.01,
    "lotka_volterra": lambda n: n["largest error in standard deviations"] < 3,
    "bouncing_ball": lambda n: abs(n["restitution"] - 0.8) < 1e-3 and abs(n["drag"] - 0.02) < 1e-3,
    "stiff_chemistry": lambda n: n["last loss"] < 0.1 * n["first loss"] and n["accepted steps"] < 100,
    "sir": lambda n: learns(n) and n["peak, lockdown ten days earlier"] < n["peak"],
    "image_classifier": lambda n: n["test accuracy"] > 0.25,
    "ten_thousand": lambda n: n["fewest steps"] < n["most steps"] and n["elasticity of breakdown"] < 0,
    "long_solve": lambda n: n["portions"] > 1 and n["smallest step"] < 0.1 * n["largest step"],
}


def test_every_example_has_a_claim() -> None:
    assert list(CLAIMS) == list(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_finds_what_it_claims(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "new" / "picture.png"
    assert main(["examples", name, "--quick", "--output", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    lines = (line.rpartition(": ") for line in capsys.readouterr().out.splitlines()[:-1])
    numbers = {what: float(number) for what, colon, number in lines if colon and "=" not in what}
    assert CLAIMS[name](numbers), numbers


def test_two_processes_train_one_classifier(tmp_path: Path) -> None:
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    command = "-m torch.distributed.run --standalone --nproc-per-node 2 -m aca_ext examples image_classifier --quick"
    run = subprocess.run(
        [sys.executable, *command.split(), "--output", str(tmp_path / "picture.png")],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    accuracies = [float(line.split()[-1]) for line in run.stdout.splitlines() if line.startswith("test accuracy")]
    assert len(accuracies) == 2
    assert accuracies[0] == accuracies[1] > 0.25


def test_are_listed_with_one_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["examples"]) == 0
    listed = capsys.readouterr().out
    for name in EXAMPLES:
        assert f"{description(name)}\n" in listed
        assert description(name).endswith(".")


@pytest.mark.parametrize("name", EXAMPLES)
def test_have_a_page_with_program_and_picture(name: str) -> None:
    page = (DOCS / "examples" / f"{name}.md").read_text()
    assert f'--8<-- "aca_ext/examples/{name}.py"' in page
    assert f"(../images/examples/{name}.png)" in page
    assert f"({name}.md)" in (DOCS / "examples" / "index.md").read_text()


def test_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert main(["examples", "image_classifier", "--quick", "--output", str(tmp_path / "x.png")]) == 1
    assert "needs the package sklearn" in capsys.readouterr().err


def test_output_that_cannot_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["examples", "spiral", "--output", "/dev/null/x.png"]) == 1
    assert "cannot be written" in capsys.readouterr().err


def test_unknown_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["examples", "spirals"])
    assert "spiral" in capsys.readouterr().err
