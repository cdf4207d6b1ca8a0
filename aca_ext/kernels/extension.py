"""Python interface of the compiled extension ``_C``, except for its kernels, which ``fused`` calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from aca_ext import _C
from aca_ext.kernels.operations import Array
from aca_ext.kernels.references import OF_A_LEAF_OF_A_GRAPH

# True for a plain contiguous tensor with all of its memory; False for most others, which ``check_readable`` decides on.
is_surely_readable: Callable[[Tensor], bool] = _C.is_surely_readable
STATUSES: tuple[str, ...] = _C.STATUSES  # names of a step control's statuses, indexed by their numbers

_COEFFICIENTS = (
    "order", "safety", "ifactor", "dfactor", "pcoeff", "icoeff", "dcoeff", "min_step", "max_step",
)  # fmt: skip

# Newer versions of torch let C++ code read a tensor's address and layout without a call into Python.
_C.use_torch(
    Tensor,
    torch.nn.Parameter,
    getattr(Tensor, "__dlpack_c_exchange_api__", None),
    getattr(torch._C, "_storage_Use_Count", None),
    (torch.empty(1, device="cpu"), torch.empty(2, device="cpu")[:1]),
)


@lru_cache(maxsize=64)
def controller_for(controller: Any) -> _C.Controller:
    """The C++ counterpart of a ``Controller``; an arbitrary one for None, since fixed steps do not use it."""
    return _C.Controller(**(dict.fromkeys(_COEFFICIENTS, 1) if controller is None else controller.coefficients))


def step_control_for(
    controller: Any, max_num_steps: int, times: Sequence[float], stops: Sequence[float]
) -> _C.SolveControl:
    """The C++ counterpart of ``StepControl``, with the same arguments and attributes."""
    return _C.SolveControl(controller_for(controller), controller is not None, max_num_steps, times, stops)


def batch_control_for(controller: Any, max_num_steps: int, times: Array) -> _C.BatchControl:
    """The step controls of independent samples, one per row of ``times``; its attributes are arrays over samples."""
    return _C.BatchControl(controller_for(controller), controller.first_step or 0.0, max_num_steps, times)


def slope_function(
    func: Callable[..., Any], args: tuple[Any, ...], like: Tensor, checked: Any, changed: Any, versioned: bool
) -> _C.Slope:
    """f(t, y) = func(t, y, \\*args) with a validated result, callable from C++ without a Python frame in between.

    The result has an autograd graph only if gradients are enabled. The attribute ``n_evals`` counts evaluations.

    Args:
        like: tensor with the dtype, device and strides of the packed state.
        checked: converts a result that is not laid out like ``like``, or raises.
        changed: raises; called if ``versioned`` and func changed its state in place.
    """
    return _C.Slope(func, args, like, checked, changed, torch.is_grad_enabled, versioned)


def own_result(function: Callable[..., Tensor | None], *args: Any) -> Tensor | None:
    """The result of ``function``, copied if another object refers to it or its memory and could change it later."""
    return _C.own_result(function, args)


def module_walk(atoms: Iterable[type], names: frozenset[str]) -> _C.ModuleWalk:
    """The walk over trees of modules.

    Args:
        atoms: types whose objects hold no tensors.
        names: attributes that every module has, which the walk skips.
    """
    return _C.ModuleWalk(atoms, names)


def contents(missing: object) -> _C.Contents:
    """An empty snapshot of the contents of dicts, lists, sets and closure cells; ``missing`` marks absent values."""
    return _C.Contents(missing)


def known_tensors(tensors: Iterable[Tensor]) -> _C.KnownTensors:
    """The tensors at which a walk through an autograd graph ends; the walk finds leaves that are not among them."""
    return _C.KnownTensors(tensors, OF_A_LEAF_OF_A_GRAPH)


def running_sums(totals: list[Tensor | None]) -> _C.RunningSums:
    """Adds gradients to ``totals``, none of which is None, with less overhead than torch where they are small."""
    return _C.RunningSums(totals)


def compiled_loop(specification: _C.CompiledSpecification) -> _C.CompiledLoop:
    """The C++ loop of engine="compiled" for one solve."""
    return _C.CompiledLoop(specification)


def checksums_of(sizes: Sequence[int]) -> _C.Checksums:
    """A callable from the addresses of blocks of these sizes, in bytes, to their checksums, eight bytes per block."""
    return _C.Checksums(sizes)


def config() -> dict[str, str]:
    """Returns the version of the package and of torch, and the CPU and CUDA backends of this build, as a dict."""
    cuda = f"built for {_C.CUDA_ARCHITECTURES}; {_C.cuda_device_count()} device(s) here" if _C.HAS_CUDA else "not built"
    threads = f"{torch.get_num_threads()}" if _C.HAS_OPENMP else "1 (built without OpenMP)"
    return {
        "aca_ext": _C.VERSION,
        "torch": torch.__version__,
        "cpu kernels": f"{_C.cpu_instruction_set()}, {threads} thread(s)",
        "cuda kernels": cuda,
    }


def show_config() -> None:
    """Prints the entries of ``config()``, one per line."""
    for name, value in config().items():
        print(f"{name:13} {value}")
