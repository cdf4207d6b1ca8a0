"""Adds the pictures of the benchmark results to the documentation, so that the repository holds them once.

The pages link to them as files of the repository, so that they show there, too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"


def on_files(files: Files, *, config: Any) -> Files:
    """Makes every picture in ``benchmarks/results`` available as ``results/NAME.png``."""
    for picture in sorted(RESULTS.glob("*.png")):
        files.append(File.generated(config, f"results/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Makes links to the pictures point to where ``on_files`` put them."""
    return markdown.replace("](../benchmarks/results/", "](results/")
