"""Registry of the engines, which run the solves; each is one file or folder."""

from __future__ import annotations

from aca_ext.engines.auto import AutoEngine
from aca_ext.engines.base import Engine, Request
from aca_ext.engines.cuda_graph.engine import GraphEngine
from aca_ext.engines.eager import EagerEngine
from aca_ext.engines.ensemble.engine import EnsembleEngine

ENGINES: dict[str, Engine] = {
    "eager": EagerEngine(),
    "compiled": EnsembleEngine(takes_gpu=True),
    "graph": GraphEngine(),
    "auto": AutoEngine(),
}

__all__ = ["ENGINES", "Engine", "Request"]
