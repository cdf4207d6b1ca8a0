"""Option preconditioner: GMRES on a diffusion with drift, whose Jacobian is not symmetric."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from aca_ext import odeint
from aca_ext.errors import OptionError, ReplayError
from aca_ext.solver.implicit import krylov

CELLS = 24
T = torch.tensor([0.0, 0.1], dtype=torch.float64)
HOW: dict[str, Any] = {"method": "kvaerno3", "rtol": 1e-3, "atol": 1e-4}


def transport() -> Tensor:
    """Diffusion and drift on the unit interval, by differences."""
    ones = torch.ones(CELLS - 1, dtype=torch.float64)
    laplacian = -2 * torch.eye(CELLS, dtype=torch.float64) + ones.diag(1) + ones.diag(-1)
    return CELLS**2 * laplacian + 20 * CELLS * (ones.diag(1) - torch.eye(CELLS, dtype=torch.float64))


def func(t: Tensor, y: Tensor, k: Tensor) -> Tensor:
    return k * (transport() @ y) + y * (1 - y) + torch.sin(t)


def factorised(t: Tensor, y: Tensor, c: float, k: Tensor) -> Callable[[Tensor], Tensor]:
    """The exact inverse without the reaction."""
    factors = torch.linalg.lu_factor(torch.eye(CELLS, dtype=torch.float64) - c * k.detach() * transport())
    return lambda v: torch.linalg.lu_solve(*factors, v[:, None])[:, 0]


def poor(t: Tensor, y: Tensor, c: float, k: Tensor) -> Callable[[Tensor], Tensor]:
    """The inverse of a matrix far from that of Newton's method."""
    matrix = torch.eye(CELLS, dtype=torch.float64) + 0.3 * torch.ones(CELLS, CELLS, dtype=torch.float64).triu(1)
    return lambda v: torch.linalg.solve(matrix, v)


class Solved:
    """A solve and its gradient; ``n_products`` counts products with the Jacobian and its transpose."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, method: str = "kvaerno3", **options: Any) -> None:
        self.n_products = 0
        for name in ("product", "transposed_product"):
            monkeypatch.setattr(krylov.Linearisation, name, self._counted(getattr(krylov.Linearisation, name)))
        y0 = torch.sin(torch.linspace(0, 3, CELLS, dtype=torch.float64)).requires_grad_()
        k = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        how = HOW if method == "kvaerno3" else {}
        self.y = odeint(func, y0, T, args=(k,), options={"newton_tol": 1e-6, **options} if how else options,
                        **(how | {"method": method}))  # fmt: skip
        self.gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(self.y[-1].square().sum(), (y0, k))])
        monkeypatch.undo()

    def _counted(self, function: Any) -> Any:
        def counted(*args: Any) -> Any:
            self.n_products += 1
            return function(*args)

        return counted


def test_needs_fewer_iterations_for_the_same_solution_and_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = Solved(monkeypatch)
    plain = Solved(monkeypatch, jacobian="krylov")
    better = Solved(monkeypatch, jacobian="krylov", preconditioner=factorised)
    assert better.n_products < 0.4 * plain.n_products
    for found in (plain, better):
        torch.testing.assert_close(found.y, dense.y, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(found.gradient, dense.gradient, rtol=1e-8, atol=1e-10)


def test_gradient_does_not_depend_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, found = Solved(monkeypatch), Solved(monkeypatch, jacobian="krylov", preconditioner=poor)
    torch.testing.assert_close(found.gradient, dense.gradient, rtol=1e-8, atol=1e-10)


def test_of_several_stages_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"step_size": 0.05}
    dense = Solved(monkeypatch, "radauIIA3", **options)
    found = Solved(monkeypatch, "radauIIA3", jacobian="krylov", preconditioner=factorised, **options)
    torch.testing.assert_close(found.gradient, dense.gradient, rtol=1e-8, atol=1e-10)


def test_receives_the_state_as_the_user_gave_it() -> None:
    seen: list[Any] = []

    def parts(t: Tensor, y: Any, c: float) -> Callable[[Any], Any]:
        seen.append((t, y, c))
        return lambda v: (v[0] / (1 + 100 * c), v[1])

    y0 = torch.ones(3, dtype=torch.float64), torch.ones(2, 2, dtype=torch.float64)
    options = {"jacobian": "krylov", "preconditioner": parts}
    _, z = odeint(lambda t, y: (-100 * y[0], -y[1]), y0, T, options=options, **HOW)
    torch.testing.assert_close(z[-1], y0[1] * torch.exp(-T[1]), rtol=1e-3, atol=1e-3)
    assert all(c > 0 and y[1].shape == (2, 2) and t.shape == () for t, y, c in seen)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preconditioner": factorised}, "option jacobian is 'dense'"),
        ({"preconditioner": 1.0, "jacobian": "krylov"}, "is a float; it must be a function"),
        ({"preconditioner": lambda t, y, c, k: y, "jacobian": "krylov"}, "is a Tensor. It must be a function"),
        ({"preconditioner": lambda t, y, c, k: lambda v: v[1:], "jacobian": "krylov"}, r"\(24,\).* to shape \(23,\)"),
        ({"preconditioner": lambda t, y, c, k: lambda v: v + 1, "jacobian": "krylov"}, "must be linear"),
        ({"preconditioner": lambda t, y, c, k: torch.Tensor.detach, "jacobian": "krylov"}, "outside of autograd"),
    ],
)
def test_that_cannot_be_used(options: dict[str, Any], message: str) -> None:
    k = torch.tensor(0.5, dtype=torch.float64)
    with pytest.raises(OptionError, match=message):
        odeint(func, torch.ones(CELLS, dtype=torch.float64), T, args=(k,), options=options, **HOW)


def test_rodas5p_has_none() -> None:
    k, y0 = torch.tensor(0.5, dtype=torch.float64), torch.ones(CELLS, dtype=torch.float64)
    with pytest.raises(OptionError, match="does not take the given preconditioner"):
        odeint(func, y0, T, args=(k,), method="rodas5p", options={"preconditioner": factorised})


def test_a_transposed_system_that_is_not_solved_gives_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    y0 = torch.ones(CELLS, dtype=torch.float64, requires_grad=True)
    k = torch.tensor(0.5, dtype=torch.float64)
    y = odeint(func, y0, T, args=(k,), options={"jacobian": "krylov", "preconditioner": factorised}, **HOW)
    solved = krylov.gmres
    monkeypatch.setattr(krylov, "gmres", lambda *args: (solved(*args)[0], 1e-6))
    with pytest.raises(ReplayError, match="so the gradient would be wrong"):
        y[-1].sum().backward()
