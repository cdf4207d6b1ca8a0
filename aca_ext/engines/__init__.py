"""Registry of the engines, which run the solves; each is one file or folder."""

from __future__ import annotations

from aca_ext.engines.base import Engine, Request
from aca_ext.engines.compiled.engine import CompiledEngine
from aca_ext.engines.cuda_graph.engine import GraphEngine
from aca_ext.engines.eager import EagerEngine

ENGINES: dict[str, Engine] = {
    "eager": EagerEngine(),
    "compiled": CompiledEngine(),
    "graph": GraphEngine(),
}

__all__ = ["ENGINES", "Engine", "Request"]
