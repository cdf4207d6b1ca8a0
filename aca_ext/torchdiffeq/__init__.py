"""A drop-in for torchdiffeq: ``import aca_ext.torchdiffeq as torchdiffeq`` is the whole migration.

Arguments and options have torchdiffeq's meaning, and the solvers of aca_ext do the work. Differences that remain:

* ``odeint`` has aca_ext's exact gradient, without that of the choice of step sizes. So has ``event_fn``, also in
  ``odeint_adjoint``, where torchdiffeq goes back by the adjoint; neither needs ``odeint_event`` for it. Events have
  first derivatives only.
* A solve that starts on the surface of an event waits for the next change of sign, instead of ending there. It is an
  EventError where fixed steps find none in 20 000 steps.
* Adaptive steps end at the last time instead of passing it. The backward solve bounds the error of all parameters'
  gradients together, unless a norm is given. Times are float64, whatever option ``dtype`` says.
* A step of ``min_step`` is accepted only if its error is finite.
* Callbacks on func are called after the step, with a state without a graph. The first part of an adjoint norm, and of
  the state in ``_adjoint`` callbacks, is zero: the gradient of t comes from the slopes at the requested times.
* Parameters that func uses without being its own get gradients from ``odeint_adjoint``, unless ``adjoint_params``, an
  adjoint norm or an ``_adjoint`` callback is given.
* Slopes of another shape are no derivative of the state (SlopeError); components of a tuple are reshaped, as there.
* func is called more often where t requires grad, and its replays in the backward pass leave buffers and counters in
  them unchanged.
* Failures are aca_ext's errors: StepLimitError, StepSizeError, NonFiniteError, in place of AssertionErrors.
* The methods of Adams have formulas for equal steps; after a change of the step size, steps of rk4 follow.
* ``odeint_dense`` takes all adaptive methods and tuple states.
* Implicit methods solve their equations by Newton's method until rounding.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType

from aca_ext.torchdiffeq.dense import odeint_dense
from aca_ext.torchdiffeq.names import SOLVERS
from aca_ext.torchdiffeq.solves import odeint, odeint_adjoint, odeint_event

__all__ = ["SOLVERS", "install", "odeint", "odeint_adjoint", "odeint_dense", "odeint_event"]

__version__ = "0.2.5"  # of torchdiffeq, whose interface this is


def install() -> Callable[[], None]:
    """Makes ``import torchdiffeq`` find this module, in this process.

    Modules that have imported torchdiffeq before keep what they have.

    Returns:
        A function that undoes it.
    """
    inner, module_of_odeint = ModuleType("torchdiffeq._impl"), ModuleType("torchdiffeq._impl.odeint")
    for name in ("odeint", "odeint_adjoint", "odeint_dense", "odeint_event"):
        setattr(inner, name, globals()[name])
    for name in ("SOLVERS", "odeint", "odeint_dense", "odeint_event"):
        setattr(module_of_odeint, name, globals()[name])
    new = {
        "torchdiffeq": sys.modules[__name__],
        "torchdiffeq._impl": inner,
        "torchdiffeq._impl.odeint": module_of_odeint,
    }
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "torchdiffeq"}
    for name in before:
        del sys.modules[name]
    sys.modules.update(new)

    def undo() -> None:
        for name in new:
            sys.modules.pop(name, None)
        sys.modules.update(before)

    return undo
