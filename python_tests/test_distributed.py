"""Training on two processes, which gives the parameters of one; solves in threads, forks and on other devices."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from autograd_reference import relative_error
from distributed_worker import STEPS, batch, model_of, train
from problems import Mlp, sample
from torch import Tensor

import aca_ext
from aca_ext import errors

CASES = [
    *("ddp/fixed", "ddp/independent", "ddp/thinned", "ddp inside/fixed"),
    *("fsdp/fixed", "fsdp by layer/independent", "fsdp inside/fixed"),
]
T = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)
PATIENCE = 180  # seconds


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Results of both processes for every case."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    folder = tmp_path_factory.mktemp("processes")
    worker = Path(__file__).with_name("distributed_worker.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(worker), str(rank), "2", str(folder), *CASES],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        output = [process.communicate(timeout=PATIENCE)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(output)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", [case for case in CASES if " inside" not in case])
def test_two_processes_train_to_the_parameters_of_one(results: list[dict[str, Any]], case: str) -> None:
    if "ImportError" in results[0][case].get("error", ""):
        pytest.skip("this torch has no fully_shard")
    model = model_of(case.split("/")[1])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, *batch())
    for rank in range(2):
        assert "error" not in results[rank][case]
        for name, p in model.named_parameters():
            assert relative_error(results[rank][case]["state"][name], p) <= 1e-12
            assert relative_error(before[name], p) > 1e-3


def test_gradient_hooks_fire_once_in_each_process(results: list[dict[str, Any]]) -> None:
    for kind in ("fixed", "independent", "thinned"):
        count = STEPS * len(list(model_of(kind).parameters()))
        assert [results[rank][f"ddp/{kind}"]["fired"] for rank in range(2)] == [count, count]


@pytest.mark.parametrize("case", ["ddp inside/fixed", "fsdp inside/fixed"])
def test_a_distributed_module_inside_a_solve_is_refused(results: list[dict[str, Any]], case: str) -> None:
    if "ImportError" in results[0][case]["error"]:
        pytest.skip("this torch has no fully_shard")
    for rank in range(2):
        assert "Wrap the module that holds the solve" in results[rank][case]["error"]


def test_solves_from_several_threads_at_once() -> None:
    net = Mlp()

    def gradient(seed: int) -> list[Tensor]:
        y0 = sample(4, 3, seed=seed).requires_grad_()
        y = aca_ext.odeint(net, y0, T, rtol=1e-6, atol=1e-6)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), [y0, *net.parameters()])]

    expected = [gradient(seed) for seed in range(4)]
    found: dict[tuple[int, int], list[Tensor]] = {}
    failures: list[str] = []

    def work(seed: int) -> None:
        try:
            for i in range(5):
                found[seed, i] = gradient(seed)
        except Exception:
            failures.append(traceback.format_exc())

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    for (seed, _), grads in found.items():
        for one, other in zip(grads, expected[seed], strict=True):
            assert torch.equal(one, other)
    assert len(found) == 20


FORK = """
import multiprocessing, torch, aca_ext
torch.set_num_threads(1)
def solve(_=None):
    y0 = torch.ones(3, requires_grad=True)
    y = aca_ext.odeint(lambda t, y: -y, y0, [0.0, 1.0], rtol=1e-6, atol=1e-6)
    y[-1].sum().backward()
    return y0.grad.tolist()
def in_forked_processes():
    with multiprocessing.get_context("fork").Pool(2) as pool:
        return pool.map_async(solve, range(4)).get(60)
after_import = in_forked_processes()
expected = [solve()] * 4
assert after_import == expected, after_import
assert in_forked_processes() == expected
print("done")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_processes_forked_after_the_import_and_after_a_solve(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", FORK]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE)
    assert done.stdout == "done\n", done.stderr


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two GPUs")
@pytest.mark.parametrize("options", [{}, {"batch": "independent"}])
def test_a_model_on_another_cuda_device_than_the_current(options: dict[str, Any]) -> None:
    found = []
    for device in ("cpu", "cuda:1"):
        net, y0 = Mlp().to(device), sample(4, 3).to(device).requires_grad_()
        y = aca_ext.odeint(net, y0, T, rtol=1e-6, atol=1e-6, options=options)
        found.append([y.detach().cpu(), *(g.cpu() for g in torch.autograd.grad(y.sum(), [y0, *net.parameters()]))])
    assert torch.cuda.current_device() == 0
    for one, other in zip(*found, strict=True):
        assert relative_error(one, other) <= 1e-9


def test_errors_cross_processes() -> None:
    """The error of a solve in a worker process (of a DataLoader or a pool) keeps its class in the parent."""
    with pytest.raises(errors.StepLimitError) as caught:
        aca_ext.odeint(lambda t, y: -y, torch.ones(2), [0.0, 9.0], options={"max_num_steps": 2})
    copy = pickle.loads(pickle.dumps(caught.value))
    assert type(copy) is errors.StepLimitError
    assert str(copy) == str(caught.value)
    assert vars(copy) == vars(caught.value)
