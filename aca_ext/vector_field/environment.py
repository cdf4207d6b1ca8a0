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
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from aca_ext.errors import ReplayError
from aca_ext.vector_field.contents import Change, get, put_back
from aca_ext.vector_field.holdings import Holdings
from aca_ext.vector_field.visitors import may_hold_more

Location = tuple[int, Any]  # id of a holder, and a key

_MAX_SEARCHED = 1024


class Environment:
    """Contents, in a forward pass, of all places that func's code reaches.

    Args:
        holdings: the walk that found these places, with their contents before the first evaluation.
    """

    def __init__(self, holdings: Holdings) -> None:
        self._holdings, self._contents = holdings, holdings.contents
        self._contents.watch_tensors()
        self._classes = [(module, type(module)) for module in holdings.modules]
        scripts = [m for m in holdings.modules if isinstance(m, torch.jit.ScriptModule)]
        self._script_modes = [(m, m.training) for m in scripts if hasattr(m, "training")]  # frozen modules have no mode
        self._script_buffers = [(b, b._version) for m in scripts for b in m.buffers(recurse=False)]
        self._default_dtype = torch.get_default_dtype()
        self._set_once: set[Location] = set()  # places that the first evaluation wrote to, and no later one
        self._records: set[Location] = set()  # places that later evaluations wrote to
        self._written_first: set[int] = set()  # ids of tensors that the first evaluation wrote to
        self._own_tensors: set[int] = set()  # ids of tensors that later evaluations wrote to
        self._late: list[Change] = []

    def add_module(self, module: nn.Module) -> None:
        """Adds a module that the walk did not find."""
        for holder in (vars(module), module._parameters, module._buffers):
            if isinstance(holder, dict):  # of TorchScript they are something else
                self._contents.add(holder)

    def end_first_evaluation(self) -> None:
        """Ascribes all changes so far to the first evaluation."""
        changes = [Change._make(change) for change in self._contents.update()]
        self._set_once.update(change.place for change in changes)
        self._classes = [(module, type(module)) for module, _ in self._classes]  # lazy modules change theirs
        self._written_first = {id(x) for x, _, _ in self._contents.changed_tensors(True)}
        if any(may_hold_more(change.now) for change in changes):  # new containers, which the walk has not seen
            self._contents = self._holdings.again().contents
            self._contents.watch_tensors()

    def end_solve(self, n_evals: int) -> list[Change]:
        """Ascribes all changes so far to func; later changes are undone for the replay.

        Returns:
            The late tensors: changes that put a tensor where the first evaluation had not put one. Tensors kept by the
            first evaluation are known already, from its graph.
        """
        changes = [Change._make(change) for change in self._contents.update()]
        known = self._set_once
        self._late = [c for c in changes if tensors_near(c.now) and not (c.place in known and tensors_near(c.before))]
        self._records.update(change.place for change in changes)
        if n_evals == 1:  # nothing tells a counter from a value that is set once
            self._records |= self._set_once
            self._own_tensors |= self._written_first
        self._set_once -= self._records
        self._own_tensors |= {id(x) for x, _, _ in self._contents.changed_tensors(True)}
        return self._late

    def settle(self) -> None:
        """Accepts the replacements of late tensors as contents of the forward pass."""
        self._contents.update()

    @property
    def has_own_state(self) -> bool:
        """Tells whether evaluations changed anything."""
        return bool(self._set_once or self._records)

    @property
    def may_remember(self) -> bool:
        """Tells whether evaluations left anything behind that a later one may read."""
        return self.has_own_state or bool(self._own_tensors)

    def _is_record(self, change: Change) -> bool:
        """Tells whether func goes on writing to a place, or to every entry of the container there."""
        x = change.before
        if change.place in self._records or (id(x), None) in self._records:
            return True
        return isinstance(x, dict) and len(x) > 0 and all((id(x), key) in self._records for key in x)

    @property
    def tensors(self) -> list[Tensor]:
        """Tensors in these places."""
        return self._contents.tensors()

    def unfrozen(self) -> list[Tensor]:
        """Tensors that require grad now and did not in the forward pass."""
        return [x for x, unfrozen, _ in self._contents.changed_tensors(False) if unfrozen]

    def overwritten(self) -> list[Tensor]:
        """Tensors written to in place since the forward pass, except those that func writes to itself.

        Raises:
            ReplayError: one is in TorchScript, whose reads cannot be seen.
        """
        for x, version in self._script_buffers:
            if x._version != version and id(x) not in self._own_tensors:
                raise ReplayError(overwritten_message(x))
        changed = self._contents.changed_tensors(False)
        return [x for x, _, written in changed if written and id(x) not in self._own_tensors]

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
        classes = [(module, kind, type(module)) for module, kind in self._classes if type(module) is not kind]
        modes = [(module, mode) for module, mode in self._script_modes if module.training != mode]
        default_dtype = torch.get_default_dtype()
        with put_back(self._changes, self._contents.order_of):
            try:
                for module, kind, _ in classes:
                    module.__class__ = kind
                for module, mode in modes:
                    module.training = mode
                if default_dtype != self._default_dtype:
                    torch.set_default_dtype(self._default_dtype)
                yield
            finally:
                for module, _, kind in classes:
                    module.__class__ = kind
                for module, mode in modes:
                    module.training = not mode
                if default_dtype != self._default_dtype:
                    torch.set_default_dtype(default_dtype)

    def _changes(self) -> list[Change]:
        """Places to put back for a replay."""
        changes = [Change._make(change) for change in self._contents.changes()]
        # Counters of func go on counting. A tensor that func made is that of the forward pass.
        changes = [c for c in changes if isinstance(c.before, Tensor) or not self._is_record(c)]
        return changes + [c._replace(now=get(c.holder, c.key)) for c in self._late]


def overwritten_message(x: Tensor) -> str:
    return (
        f"A tensor of shape {tuple(x.shape)} and {x.dtype}, which func reads, was written to between the forward and "
        "the backward pass, so that a replay would not repeat the forward pass. Write to it after the backward pass, "
        'put a new tensor in its place, or use gradient="direct", which does not replay.'
    )


def tensors_near(x: Any) -> bool:
    """Tells whether a value is a tensor, or a container or object with one right inside."""
    if isinstance(x, Tensor):
        return True
    attributes = getattr(x, "__dict__", None) if not isinstance(x, (type, nn.Module)) else None
    values = x if type(x) in (list, tuple, set, deque) else x.values() if isinstance(x, dict) else ()
    if type(attributes) is dict:
        values = [*values, *attributes.values()]
    return any(isinstance(value, Tensor) for value in islice(values, _MAX_SEARCHED))
