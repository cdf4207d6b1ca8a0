"""Neural ODEs in PyTorch with exact gradients at checkpoint memory, on fused C++/CUDA kernels."""

import importlib.util
import sys
from importlib.machinery import PathFinder
from pathlib import Path

if importlib.util.find_spec("aca_ext._C") is None:
    # Python was started in the repository's root, so it found the source folder first. Import the installed package in
    # its place, if there is one: the source has no compiled extension.
    here = Path(__file__).resolve().parent.parent
    spec = PathFinder.find_spec("aca_ext", [p for p in sys.path if Path(p).resolve() != here])
    if spec is None or spec.loader is None or PathFinder.find_spec("_C", spec.submodule_search_locations) is None:
        from aca_ext.errors import NotCompiledError

        raise NotCompiledError(
            f"{Path(__file__).parent} is the source of aca_ext without its compiled extension aca_ext._C, and no "
            "installed aca_ext was found. Install it: run `pip install .` in the repository's root."
        )
    sys.modules["aca_ext"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
else:
    import torch as _torch  # noqa: F401  loads the OpenMP runtime, which the kernels then share

    from aca_ext import errors, flows
    from aca_ext.controls.cdeint import cdeint
    from aca_ext.controls.interpolation import Interpolation
    from aca_ext.engines.default import get_default_engine, set_default_engine
    from aca_ext.gradients import GRADIENTS
    from aca_ext.kernels.extension import config, show_config
    from aca_ext.known_steps.replay import replay
    from aca_ext.neural_ode import NeuralODE
    from aca_ext.numerics.implicit_tableaus import IMPLICIT_METHODS
    from aca_ext.numerics.methods import METHODS
    from aca_ext.odeint import odeint, solve
    from aca_ext.problem.events import Event
    from aca_ext.progress import Step
    from aca_ext.solution import EventRecord, Solution
    from aca_ext.solver.stats import BatchStats, Stats

    __version__ = config()["aca_ext"]

    __all__ = [
        "GRADIENTS",
        "IMPLICIT_METHODS",
        "METHODS",
        "BatchStats",
        "Event",
        "EventRecord",
        "Interpolation",
        "NeuralODE",
        "Solution",
        "Stats",
        "Step",
        "__version__",
        "cdeint",
        "config",
        "errors",
        "flows",
        "get_default_engine",
        "odeint",
        "replay",
        "set_default_engine",
        "show_config",
        "solve",
    ]

    def __dir__() -> list[str]:
        """Lists only the public names, for completion and help."""
        return sorted(__all__)
