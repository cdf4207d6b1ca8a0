"""engine="compiled" for funcs that cannot be compiled: the eager engine, and the reason for it in the statistics."""

from __future__ import annotations

import re

from aca_ext.engines.base import Request
from aca_ext.engines.eager import EagerEngine
from aca_ext.errors import CompileError
from aca_ext.gradients.base import Result

_EAGER = EagerEngine()


def solve_uncompiled(request: Request, reason: str) -> Result:
    """Solves by the eager engine; ``reason`` tells why."""
    result = _EAGER.solve(request)
    result.stats.reason = reason
    return result


def shortened(error: CompileError) -> str:
    """The first line of an error without its advice to use the eager engine, which is followed."""
    return re.sub(r' Use engine="eager".*?\.(?= |$)', "", str(error)).partition("\n")[0]
