"""The stiff problems of Hairer's and of Bari's test sets, for PyTorch, JAX and NumPy, with their published end values.

Each slope is written once, over the module ``xp`` of arrays. Equations: Hairer & Wanner, Solving ODEs II, IV.10, and
the drivers of Hairer's test set (www.unige.ch/~hairer/testset); Pollution: Verwer, SIAM J. Sci. Comput. 15 (1994).
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

END_VALUES = json.loads(Path(__file__).with_name("stiff_end_values.json").read_text())


@dataclass(frozen=True)
class StiffProblem:
    """dy/dt = slope(t, y, p, xp, \\*constants) from y0 at t = 0 to t_end.

    Attributes:
        parameters: the rates p, with respect to which solves are differentiated.
        atol: absolute tolerance at the relative tolerance rtol; that of Hairer's drivers.
        end: published values at t_end.
        measured: the components that ``end`` holds; None for all.
        constants: arrays that the slope uses.
        bandwidth: of a banded Jacobian, on either side of the diagonal; None if it is dense.
    """

    name: str
    slope: Callable[..., Any]
    y0: tuple[float, ...]
    t_end: float
    parameters: tuple[float, ...]
    atol: Callable[[float], float]
    end: tuple[float, ...]
    measured: tuple[int, ...] | None = None
    constants: tuple[np.ndarray, ...] = ()
    bandwidth: int | None = None

    def error(self, y_end: Any, rtol: float) -> float:
        """The largest error of a component, in units of its tolerance, times rtol: at most rtol if it is kept."""
        given = np.asarray(y_end, dtype=float)
        given = given if self.measured is None else given[list(self.measured)]
        end = np.array(self.end)
        return float(np.max(np.abs(given - end) / (self.atol(rtol) / rtol + np.abs(end))))

    def for_numpy(self) -> Callable[[float, np.ndarray], np.ndarray]:
        p = np.array(self.parameters)
        return lambda t, y: self.slope(t, y, p, np, *self.constants)


class StiffFunction(nn.Module):
    """The slope of a problem in PyTorch, with the rates as a parameter."""

    def __init__(self, problem: StiffProblem) -> None:
        super().__init__()
        self.slope = problem.slope
        self.p = nn.Parameter(torch.tensor(problem.parameters, dtype=torch.float64))
        self.names = [f"constant_{i}" for i in range(len(problem.constants))]
        for name, constant in zip(self.names, problem.constants, strict=True):
            if constant.dtype.kind == "i":  # an index; lanes take constant ones alone
                setattr(self, name, constant.tolist())
            else:
                self.register_buffer(name, torch.from_numpy(constant))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.slope(t, y, self.p, torch, *(getattr(self, name) for name in self.names))


def _robertson(t, y, p, xp):
    made, back, used = p[0] * y[..., 0], p[1] * y[..., 1] * y[..., 2], p[2] * y[..., 1] ** 2
    return xp.stack([back - made, made - back - used, used], -1)


def _van_der_pol(t, y, p, xp):
    return xp.stack([y[..., 1], ((1 - y[..., 0] ** 2) * y[..., 1] - y[..., 0]) / p[0]], -1)


def _oregonator(t, y, p, xp):
    a, b, c = y[..., 0], y[..., 1], y[..., 2]
    return xp.stack([p[0] * (b + a * (1 - p[1] * a - b)), (c - (1 + a) * b) / p[0], p[2] * (a - c)], -1)


def _hires(t, y, p, xp):
    a, b, c, d, e, f, g, h = (y[..., i] for i in range(8))
    bound, decayed = p[0] * f * h, 1.81 * g
    return xp.stack(
        [
            -1.71 * a + 0.43 * b + 8.32 * c + 0.0007,
            1.71 * a - 8.75 * b,
            -10.03 * c + 0.43 * d + 0.035 * e,
            8.32 * b + 1.71 * c - 1.12 * d,
            -1.745 * e + 0.43 * (f + g),
            -bound + 0.69 * d + 1.71 * e - 0.43 * f + 0.69 * g,
            bound - decayed,
            decayed - bound,
        ],
        -1,
    )


def _e5(t, y, p, xp):
    made, used = p[0] * y[..., 0], p[1] * y[..., 0] * y[..., 2]
    lost, back = p[2] * y[..., 1] * y[..., 2], p[3] * y[..., 3]
    second, fourth = made - lost, used - back
    # As a difference, so that y2 - y3 - y4 is conserved but for rounding.
    return xp.stack([-made - used, second, second - fourth, fourth], -1)


# The reactions of the pollution problem: the two species whose concentrations make the rate (0: none), the consumed
# ones and the made ones, in the numbering of Verwer.
_REACTIONS = (
    (1, 0, "1", "2 3"),
    (2, 4, "2 4", "1"),
    (5, 2, "5 2", "1 6"),
    (7, 0, "7", "5 5 8"),
    (7, 0, "7", "8"),
    (7, 6, "7 6", "5 8"),
    (9, 0, "9", "5 8 10"),
    (9, 6, "9 6", "11"),
    (11, 2, "11 2", "1 10 12"),
    (11, 1, "11 1", "13"),
    (13, 0, "13", "1 11"),
    (10, 2, "10 2", "1 14"),
    (14, 0, "14", "5 7"),
    (1, 6, "1 6", "15"),
    (3, 0, "3", "4"),
    (4, 0, "4", "16"),
    (4, 0, "4", "3"),
    (16, 0, "16", "6 6"),
    (16, 0, "16", "3"),
    (17, 6, "17 6", "5 18"),
    (19, 0, "19", "2"),
    (19, 0, "19", "1 3"),
    (1, 4, "1 4", "19"),
    (19, 1, "19 1", "20"),
    (20, 0, "20", "1 19"),
)
_RATES = (0.35, 26.6, 1.23e4, 8.6e-4, 8.2e-4, 1.5e4, 1.3e-4, 2.4e4, 1.65e4, 9e3, 0.022, 1.2e4, 1.88, 1.63e4, 4.8e6)
_RATES += (3.5e-4, 0.0175, 1e8, 4.44e11, 1.24e3, 2.1, 5.78, 0.0474, 1.78e3, 3.12)


def _pollution(t, y, p, xp, first, second, has_second, changes):
    return (p * y[..., first] * (has_second * y[..., second] + (1 - has_second))) @ changes


def _pollution_constants() -> tuple[np.ndarray, ...]:
    changes = np.zeros((len(_REACTIONS), 20))
    for row, (_, _, used, made) in zip(changes, _REACTIONS, strict=True):
        for species, sign in [(s, -1) for s in used.split()] + [(s, 1) for s in made.split()]:
            row[int(species) - 1] += sign
    first = np.array([a - 1 for a, *_ in _REACTIONS])
    second = np.array([max(b - 1, 0) for _, b, *_ in _REACTIONS])
    return first, second, np.array([float(b > 0) for _, b, *_ in _REACTIONS]), changes


def _brusselator(t, y, p, xp, u_end, v_end):
    """u and v in turn, cell by cell, with u = 1 and v = 3 at both ends."""
    u, v = y[0::2], y[1::2]
    u_padded, v_padded = xp.concatenate([u_end, u, u_end]), xp.concatenate([v_end, v, v_end])
    diffusion = p[0] * (u.shape[0] + 1) ** 2
    product = u * u * v
    du = 1 + product - 4 * u + diffusion * (u_padded[:-2] - 2 * u + u_padded[2:])
    dv = 3 * u - product + diffusion * (v_padded[:-2] - 2 * v + v_padded[2:])
    return xp.stack([du, dv], -1).reshape(-1)


def _brusselator_y0(cells: int) -> tuple[float, ...]:
    u = 1 + 0.5 * np.sin(2 * np.pi * np.arange(1, cells + 1) / (cells + 1))
    return tuple(np.stack([u, np.full(cells, 3.0)], -1).reshape(-1).tolist())


ROBERTSON = StiffProblem(
    "Robertson",
    _robertson,
    y0=(1.0, 0.0, 0.0),
    t_end=1e11,
    parameters=(0.04, 1e4, 3e7),
    atol=lambda rtol: 1e-6 * rtol,
    end=tuple(END_VALUES["robertson"]["values"]),
)
VAN_DER_POL = StiffProblem(
    "Van der Pol",
    _van_der_pol,
    y0=(2.0, 0.0),
    t_end=2.0,
    parameters=(1e-6,),
    atol=lambda rtol: rtol,
    end=tuple(END_VALUES["van_der_pol"]["values"]),
)
OREGONATOR = StiffProblem(
    "Oregonator",
    _oregonator,
    y0=(1.0, 2.0, 3.0),
    t_end=360.0,
    parameters=(77.27, 8.375e-6, 0.161),
    atol=lambda rtol: 1e-6 * rtol,
    end=tuple(END_VALUES["oregonator"]["values"]),
)
HIRES = StiffProblem(
    "HIRES",
    _hires,
    y0=(1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0057),
    t_end=321.8122,
    parameters=(280.0,),
    atol=lambda rtol: 1e-4 * rtol,
    end=tuple(END_VALUES["hires"]["values"]),
)
E5 = StiffProblem(
    "E5",
    _e5,
    y0=(1.76e-3, 0.0, 0.0, 0.0),
    t_end=1e13,
    parameters=(7.89e-10, 1.1e7, 1.13e9, 1.13e3),
    atol=lambda rtol: 1.7e-24,
    end=tuple(END_VALUES["e5"]["values"]),
)
POLLUTION = StiffProblem(
    "Pollution",
    _pollution,
    y0=tuple({1: 0.2, 3: 0.04, 6: 0.1, 7: 0.3, 8: 0.01, 16: 0.007}.get(i, 0.0) for i in range(20)),
    t_end=60.0,
    parameters=_RATES,
    atol=lambda rtol: rtol,
    end=tuple(END_VALUES["pollution"]["values"]),
    constants=_pollution_constants(),
)
BRUSSELATOR = StiffProblem(
    "Brusselator, 500 cells",
    _brusselator,
    y0=_brusselator_y0(500),
    t_end=10.0,
    parameters=(0.02,),
    atol=lambda rtol: rtol,
    end=tuple(END_VALUES["brusselator"]["values"]),
    measured=tuple(range(0, 1000, 7)),
    constants=(np.array([1.0]), np.array([3.0])),
    bandwidth=2,
)
PROBLEMS = (ROBERTSON, VAN_DER_POL, OREGONATOR, HIRES, E5, POLLUTION, BRUSSELATOR)
