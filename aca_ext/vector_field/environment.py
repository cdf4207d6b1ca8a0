"""The state that func reads besides its arguments, recorded in the forward pass and put back for the replay.

PyTorch's own graphs keep what an evaluation used. A replay evaluates func again, so what its code reads has to be what
it was: attributes, entries of containers, closure cells, globals, training modes. What others changed between the two
passes is put back while the replay runs. What func itself changed stays, since it may count its evaluations.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from aca_ext.problem.state import tensors_in
from aca_ext.vector_field.contents import Change, get, put_back
from aca_ext.vector_field.holdings import Holdings


class Environment:
    """Contents of the places that func's code reaches, in a forward pass.

    Args:
        holdings: where these places are, and their contents before the first evaluation.
    """

    def __init__(self, holdings: Holdings) -> None:
        self._contents = holdings.contents
        self._contents.watch_tensors()
        scripts = [m for m in holdings.modules if isinstance(m, torch.jit.ScriptModule)]
        self._script_modes = [(m, m.training) for m in scripts if hasattr(m, "training")]  # frozen ones have none
        self._own: dict[tuple[int, Any], Change] = {}  # changes of the first evaluation and of the others
        self._own_tensors: list[Tensor] = []
        self._late: list[Change] = []

    def add_module(self, module: nn.Module) -> None:
        """Notes the contents of a module that the walk did not find."""
        for holder in (vars(module), module._parameters, module._buffers):
            if isinstance(holder, dict):  # of TorchScript they are something else
                self._contents.add(holder)

    def end_first_evaluation(self) -> None:
        """Takes what has changed for changes by func."""
        self._note_own()

    def end_solve(self) -> list[Change]:
        """Takes what has changed for changes by func, and returns where it put tensors that came up late.

        These are tensors where the first evaluation had put none: those that it puts somewhere are known by its graph.
        """
        changes = self._note_own()
        self._late = [c for c in changes if tensors_in(c.now) and not tensors_in(c.before)]
        return self._late

    def settle(self) -> None:
        """Takes what has changed for what the replay is to find."""
        self._note_own()
        self._own_tensors = [x for x, _ in self._contents.changed_tensors()]
        self._contents.watch_tensors()

    def _note_own(self) -> list[Change]:
        changes = [Change._make(change) for change in self._contents.update()]
        self._own.update((change.place, change) for change in changes)
        return changes

    def _is_record(self, change: Change) -> bool:
        """Tells whether func itself changes a place, or the container there and nothing else in it."""
        x = change.before
        if isinstance(x, (list, deque)):
            keys: Any = range(len(x))
            if (id(x), None) in self._own:
                return True
        else:
            keys = x if isinstance(x, dict) else ()
        return change.place in self._own or (len(keys) > 0 and all((id(x), key) in self._own for key in keys))

    @property
    def tensors(self) -> list[Tensor]:
        """Tensors that the places held."""
        return self._contents.tensors()

    def unfrozen(self) -> list[Tensor]:
        """Tensors that require grad and did not in the forward pass."""
        return [x for x, requires_grad in self._contents.changed_tensors() if requires_grad]

    def overwritten(self) -> list[Tensor]:
        """Tensors that were written to since the forward pass, without those that func writes to."""
        own = {id(x) for x in self._own_tensors}
        changed = self._contents.changed_tensors()
        return [x for x, requires_grad in changed if not requires_grad and id(x) not in own]

    @property
    def has_late_tensors(self) -> bool:
        """Tells whether ``begin_evaluation`` has anything to do."""
        return bool(self._late)

    def begin_evaluation(self) -> None:
        """Removes tensors that came up late, so that a replayed evaluation computes them anew, with their graph."""
        for change in self._late:
            change.put(change.before)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Puts back what the forward pass found; afterwards everything is as before."""
        changes = [Change._make(change) for change in self._contents.changes()]
        # A counter of func goes on counting. A tensor that func made, noise drawn once for a solve, is that of before.
        changes = [c for c in changes if not self._is_record(c) or isinstance(c.before, Tensor)]
        changes += [c._replace(now=get(c.holder, c.key)) for c in self._late]
        modes = [(module, mode) for module, mode in self._script_modes if module.training != mode]
        try:
            for module, mode in modes:
                module.training = mode
            with put_back(changes):
                yield
        finally:
            for module, mode in modes:
                module.training = not mode
