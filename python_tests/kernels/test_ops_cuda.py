"""CUDA kernels: streams, CUDA graphs, devices, repeatability."""

from __future__ import annotations

import pytest
import torch
from operands import (
    VERY_LARGE,
    Operands,
    both_dtypes,
    check_error_norm,
    check_solution_and_error,
    check_weighted_sum,
    kernels,
    on_cuda,
    tolerance_of,
)

from aca_ext import _C


@on_cuda
class TestCuda:
    def test_runs_on_the_current_stream(self) -> None:
        x = torch.zeros(1 << 20, device="cuda")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000_000)
            x.fill_(1.0)
            ops = kernels(x)
            y1, error = ops.solution_and_error(x, 2.0, [x], (1.0,), (3.0,))
            tripled = ops.weighted_sum(x, 2.0, [x], (1.0,))
            norm = ops.error_norm(x, None, 0.0, x, x)
            (scalar,) = ops.scalars([0.25])
        stream.synchronize()
        assert torch.equal(tripled, torch.full_like(x, 3.0))
        assert torch.equal(y1, tripled)
        assert torch.equal(error, torch.full_like(x, 6.0))
        assert norm == pytest.approx(1 / (1e-5 + 1e-3), rel=1e-5)
        assert scalar.item() == 0.25

    def test_neither_synchronises_nor_allocates_so_it_can_be_captured(self) -> None:
        x = torch.zeros(1031, device="cuda")
        out = torch.zeros_like(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kernels(x).weighted_sum(x, 2.0, [x, x], (1.0, 0.5), out)
        x.fill_(1.0)
        graph.replay()
        assert torch.equal(out, torch.full_like(x, 4.0))

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device or none")
    def test_runs_on_the_device_of_the_tensors(self) -> None:
        with torch.cuda.device(0):
            operands = Operands(1031, torch.float32, "cuda:1")
            check_weighted_sum(operands, 3, True)
            check_solution_and_error(operands, 3)
            check_error_norm(operands, tolerance_of(1031))
            assert torch.cuda.current_device() == 0

    @both_dtypes
    def test_repeats_bitwise_whatever_the_alignment_of_other_calls(self, dtype: torch.dtype) -> None:
        n = VERY_LARGE
        partial, k, y0, y1 = Operands(n, dtype, "cuda").many(4)
        ops = kernels(y0)
        norms = set()
        for _ in range(10):
            norms.add(ops.error_norm(partial, k, 0.3, y0, y1))
            ops.error_norm(partial, None, 0.0, y0, y1)
        assert len(norms) == 1

    def test_a_failure_is_reported_once(self) -> None:
        target = _C.Target("cuda", "float32", 1, torch.cuda.device_count() + 7, 0, 0)
        with pytest.raises(RuntimeError, match="CUDA: cudaSetDevice"):
            _C.weighted_sum(target, 4, 0, 0, 1.0, [0], (1.0,))
        check_weighted_sum(Operands(37, torch.float32, "cuda"), 3, True)
