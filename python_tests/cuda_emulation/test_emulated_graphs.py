"""csrc's graph that loops on the device, its refusal of other nodes than it can repeat, and failed captures."""

from __future__ import annotations

import numpy as np
import pytest
from emulation import Emulation, address_of

KERNEL_NODE, MEMCPY_NODE, MEMSET_NODE, HOST_NODE, _, EMPTY_NODE, ALLOC_NODE = range(7)


def captured(cuda: Emulation, node: int, copied_from: int = 0, copied_to: int = 0) -> int:
    stream = cuda.library.new_stream()
    cuda.library.begin_capture(stream)
    cuda.library.record_node(stream, node, copied_from, copied_to)
    graph: int = cuda.library.end_capture(stream)
    return graph


class TestObstacles:
    @pytest.mark.parametrize("node", [KERNEL_NODE, MEMSET_NODE, EMPTY_NODE])
    def test_none(self, cuda: Emulation, node: int) -> None:
        assert cuda.library.obstacle(captured(cuda, node)) == b""

    def test_an_empty_graph(self, cuda: Emulation) -> None:
        stream = cuda.library.new_stream()
        cuda.library.begin_capture(stream)
        assert cuda.library.obstacle(cuda.library.end_capture(stream)) == b"nothing"

    @pytest.mark.parametrize(("node", "name"), [(HOST_NODE, b"on the host"), (ALLOC_NODE, b"an allocation")])
    def test_nodes_that_no_loop_may_contain(self, cuda: Emulation, node: int, name: bytes) -> None:
        assert name in cuda.library.obstacle(captured(cuda, node))

    def test_copies(self, cuda: Emulation) -> None:
        on_device, on_host = cuda.buffer(np.zeros(4)), np.zeros(4)
        here, there = address_of(on_device), address_of(on_host)
        assert cuda.library.obstacle(captured(cuda, MEMCPY_NODE, here, here)) == b""
        assert b"pageable" in cuda.library.obstacle(captured(cuda, MEMCPY_NODE, there, here))
        assert b"pageable" in cuda.library.obstacle(captured(cuda, MEMCPY_NODE, here, there))


def test_a_capture_restarts(cuda: Emulation) -> None:
    """The new capture holds a kernel that does nothing, and none of what the old one held."""
    stream = cuda.library.new_stream()
    out = cuda.buffer(np.zeros(4))
    cuda.library.begin_capture(stream)
    cuda.write_scalars(cuda.target("float64", stream), address_of(out), [1.0, 2.0, 3.0, 4.0])
    cuda.library.restart_capture(stream)
    graph = cuda.library.end_capture(stream)
    assert cuda.library.obstacle(graph) == b""
    cuda.library.launch_graph(graph)
    assert out.tolist() == [0.0] * 4


def test_a_captured_kernel_runs_at_each_launch_only(cuda: Emulation) -> None:
    stream = cuda.library.new_stream()
    x, out = cuda.buffer(np.ones(300)), cuda.buffer(np.zeros(300))
    cuda.library.begin_capture(stream)
    on = cuda.target("float64", stream)
    cuda.weighted_sum(on, 300, address_of(out), address_of(out), 1.0, [address_of(x)], [2.0])
    graph = cuda.library.end_capture(stream)
    assert not out.any()
    for i in (1, 2):
        cuda.library.launch_graph(graph)
        assert (out == 2 * i).all()
