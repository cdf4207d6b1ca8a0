"""Suggestions for unknown names: names from other libraries, other spellings, typing errors."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# Names from scipy, diffrax, torchode, torchdyn, DifferentialEquations.jl and MATLAB, in lower case, without separators.
_FOREIGN = {
    "dopri5": "rk45 ode45 dopri dopri45 dormandprince runge_kutta45",
    "bosh3": "rk23 ode23 bs3 bosh bogackishampine",
    "dopri8": "dop853 dopri853 ode78 ode89 dopri7",
    "tsit5": "tsit tsitouras tsitouras5 tsit45",
    "rk4": "rk38 threeeighths",
    "rk4_classic": "rk4classical classicrk4 rungekutta4",
    "euler": "forwardeuler expliciteuler",
    "heun2": "heun explicittrapezoid",
    "fehlberg2": "rkf12 fehlberg rkf2",
    "adaptive_heun": "heun21 heun12",
    "explicit_adams": "adamsbashforth ab",
    "implicit_adams": "adams adamsmoulton adamsbashforthmoulton abm vcabm",
    "max_num_steps": "maxsteps maxstepcount maxiter maxiters maxiterations mxstep maxnumiters maxnumsteps",
    "step_size": "dt h stepsize deltat timestep constantstepsize",
    "first_step": "dt0 h0 initialstep initstep dtinit initialstepsize firststepsize",
    "min_step": "dtmin mindt hmin minstepsize minimumstepsize",
    "max_step": "dtmax maxdt hmax maxstepsize maximumstepsize",
    "step_t": "tstops stepts stept",
    "jump_t": "jumpts discontinuities ddiscontinuities",
    "safety": "safetyfactor gamma",
    "ifactor": "maxfactor factormax qmax",
    "dfactor": "minfactor factormin qmin",
    "n_steps": "numsteps numbersteps nsteps",
    "grid_constructor": "grid gridpoints",
    "method": "solver integrator stepper alg algorithm",
    "gradient": "sensitivity adjoint backprop sensealg",
    "rtol": "reltol",
    "atol": "abstol",
    "adjoint_rtol": "rtoladjoint",
    "adjoint_atol": "atoladjoint",
    "adjoint_method": "solveradjoint",
    "progress": "progressmeter verbose progressbar",
}
_MEANT = {foreign.replace("_", ""): name for name, others in _FOREIGN.items() for foreign in others.split()}
_IMPLICIT = (
    "implicit", "bdf", "radau", "lsoda", "kvaerno", "vode", "ode15s", "rosenbrock", "rodas", "trbdf2",
    "backwardeuler", "cranknicolson", "sdirk",
)  # fmt: skip


def meant_by(name: object, allowed: Iterable[str]) -> str | None:
    """The most similar name among ``allowed``; None if none is similar."""
    plain = _plain(str(name))
    spelled = {_plain(known): known for known in allowed}
    if plain in spelled:
        return spelled[plain]
    foreign = _MEANT.get(plain)
    if foreign in spelled.values():
        return foreign
    close = difflib.get_close_matches(plain, spelled, n=1)
    return spelled[close[0]] if close else None


def option_meant_by(name: str, options: Iterable[str], arguments: Iterable[str]) -> str | None:
    """The option that an unknown argument is, or resembles if it resembles no argument; None if there is none."""
    options = list(options)
    if name in options:
        return name
    return meant_by(name, options) if meant_by(name, arguments) is None else None


def is_implicit(name: object) -> bool:
    """Tells whether ``name`` looks like a method for stiff problems."""
    return any(part in _plain(str(name)) for part in _IMPLICIT)


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())
