"""The state that func reads besides its arguments, recorded in the forward pass and put back for the replay.

An autograd graph keeps the tensors that an evaluation used. A replay evaluates func again instead, so everything that
its code reads must be as it was: attributes, entries of containers, closure cells, globals, training modes. Changes
that others made between the two passes are undone while the replay runs. Changes that func itself made stay, since they
may be counters of its evaluations.
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
    """Contents, in a forward pass, of all places that func's code reaches.

    Args:
        holdings: the walk that found these places, with their contents before the first evaluation.
    """

    def __init__(self, holdings: Holdings) -> None:
        self._contents = holdings.contents
        self._contents.watch_tensors()
        scripts = [m for m in holdings.modules if isinstance(m, torch.jit.ScriptModule)]
        self._script_modes = [
            (m, m.training) for m in scripts if hasattr(m, "training")
        ]  # frozen scripted modules have no mode
        self._own: set[tuple[int, Any]] = set()  # places that func itself writes to
        self._own_tensors: list[Tensor] = []
        self._late: list[Change] = []

    def add_module(self, module: nn.Module) -> None:
        """Adds a module that the walk did not find."""
        for holder in (vars(module), module._parameters, module._buffers):
            if isinstance(holder, dict):  # of TorchScript they are something else
                self._contents.add(holder)

    def end_first_evaluation(self) -> None:
        """Ascribes all changes so far to func."""
        self._note_own()

    def end_solve(self) -> list[Change]:
        """Ascribes all changes so far to func; later changes are undone for the replay.

        Returns:
            The late tensors: changes that put a tensor where the first evaluation had put none. Tensors kept by the
            first evaluation are known already, from its graph.
        """
        changes = self._note_own()
        self._own_tensors = [x for x, _ in self._contents.changed_tensors(True)]
        self._late = [c for c in changes if tensors_in(c.now) and not tensors_in(c.before)]
        return self._late

    def settle(self) -> None:
        """Accepts the replacements of late tensors as contents of the forward pass."""
        self._note_own()

    def _note_own(self) -> list[Change]:
        changes = [Change._make(change) for change in self._contents.update()]
        self._own.update(change.place for change in changes)
        return changes

    def _is_record(self, change: Change) -> bool:
        """Tells whether func itself writes to a place, or to every entry of the container there."""
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
        """Tensors in these places."""
        return self._contents.tensors()

    def unfrozen(self) -> list[Tensor]:
        """Tensors that require grad now and did not in the forward pass."""
        return [x for x, requires_grad in self._contents.changed_tensors(False) if requires_grad]

    def overwritten(self) -> list[Tensor]:
        """Tensors written to in place since the forward pass, except those that func writes to itself."""
        own = {id(x) for x in self._own_tensors}
        changed = self._contents.changed_tensors(False)
        return [x for x, requires_grad in changed if not requires_grad and id(x) not in own]

    @property
    def has_late_tensors(self) -> bool:
        """Tells whether ``begin_evaluation`` has anything to do."""
        return bool(self._late)

    def begin_evaluation(self) -> None:
        """Removes late tensors, so that a replayed evaluation computes them again, with their graph."""
        for change in self._late:
            change.put(change.before)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Restores the contents of the forward pass inside the context, and the present ones afterwards."""
        changes = [Change._make(change) for change in self._contents.changes()]
        # Counters of func go on counting. A tensor that func made once, such as noise, is that of the forward pass.
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
