"""Checkpoints: written in place, slots of rejected trials used again, memory bounded, rows in order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aca_ext.checkpoints import AcceptedStep, Checkpoints, StepRecord, rows

BLOCK_ROWS = 64
BLOCK_BYTES = 1 << 20
STATES = {
    "0-d": torch.tensor(3.0),
    "empty": torch.zeros(0, 2),
    "vector": torch.arange(5.0, dtype=torch.float64),
    "transposed": torch.arange(12.0).view(3, 4).t(),
    "channels last": torch.arange(210.0).view(2, 3, 5, 7).contiguous(memory_format=torch.channels_last),
}


def filled(y0: Tensor, count: int) -> Checkpoints:
    """Checkpoints of y0, y0 + 1, ..., y0 + count."""
    checkpoints = Checkpoints(y0)
    for i in range(count):
        checkpoints.slot().copy_(y0 + i + 1)
        checkpoints.accept()
    return checkpoints


@pytest.mark.parametrize("y0", STATES.values(), ids=STATES)
class TestEveryState:
    def test_the_first_is_a_copy_of_the_initial_state(self, y0: Tensor) -> None:
        checkpoints = Checkpoints(y0)
        (first,) = rows(checkpoints.blocks, checkpoints.count)
        assert torch.equal(first, y0)
        assert first.data_ptr() != y0.data_ptr() or y0.numel() == 0

    @pytest.mark.parametrize("count", [1, BLOCK_ROWS - 1, BLOCK_ROWS, 2 * BLOCK_ROWS + 3])
    def test_rows_come_in_order_and_no_more_than_were_accepted(self, y0: Tensor, count: int) -> None:
        checkpoints = filled(y0, count)
        checkpoints.slot().fill_(-1)
        states = list(rows(checkpoints.blocks, checkpoints.count))
        assert len(states) == checkpoints.count == count + 1
        assert all(torch.equal(state, y0 + i) for i, state in enumerate(states))

    def test_slots_are_laid_out_like_the_state(self, y0: Tensor) -> None:
        checkpoints = filled(y0, 2)
        assert checkpoints.slot().stride() == y0.stride()
        assert all(row.stride() == y0.stride() for row in rows(checkpoints.blocks, checkpoints.count))
        assert checkpoints.slot().dtype == y0.dtype


class TestSlots:
    def test_a_rejected_trial_leaves_its_slot_to_the_next(self) -> None:
        checkpoints = Checkpoints(torch.zeros(3))
        addresses = {checkpoints.slot().data_ptr() for _ in range(1000)}
        assert len(addresses) == 1
        assert checkpoints.count == 1

    def test_an_accepted_state_is_not_written_again(self) -> None:
        checkpoints = Checkpoints(torch.zeros(3))
        addresses = [row.data_ptr() for row in rows(checkpoints.blocks, 1)]
        for _ in range(3 * BLOCK_ROWS):
            addresses.append(checkpoints.slot().data_ptr())
            checkpoints.accept()
        assert len(set(addresses)) == len(addresses)

    def test_rejected_trials_between_accepted_ones(self) -> None:
        checkpoints = Checkpoints(torch.zeros(2))
        for i in range(1, 100):
            checkpoints.slot().fill_(-i)
            checkpoints.slot().fill_(i)
            checkpoints.accept()
        states = torch.stack(list(rows(checkpoints.blocks, checkpoints.count)))
        assert torch.equal(states[:, 0], torch.arange(100.0))
        assert len(checkpoints.blocks) == 2

    def test_accepting_copies_nothing(self) -> None:
        checkpoints = Checkpoints(torch.zeros(3))
        slot = checkpoints.slot()
        checkpoints.accept()
        *_, last = rows(checkpoints.blocks, checkpoints.count)
        assert last.data_ptr() == slot.data_ptr()


class TestMemory:
    @staticmethod
    def bytes_of(checkpoints: Checkpoints) -> int:
        return sum(block.untyped_storage().nbytes() for block in checkpoints.blocks)

    def test_small_states_share_blocks(self) -> None:
        assert len(filled(torch.zeros(4), BLOCK_ROWS - 1).blocks) == 1
        assert len(filled(torch.zeros(4), BLOCK_ROWS).blocks) == 2

    @pytest.mark.parametrize("numel", [1, 1000, BLOCK_BYTES // 8 // 3, BLOCK_BYTES // 8])
    def test_blocks_are_bounded(self, numel: int) -> None:
        checkpoints = filled(torch.zeros(numel, dtype=torch.float64), 10)
        assert all(block.untyped_storage().nbytes() <= BLOCK_BYTES for block in checkpoints.blocks)
        assert all(len(block) <= BLOCK_ROWS for block in checkpoints.blocks)
        assert self.bytes_of(checkpoints) < checkpoints.count * numel * 8 + BLOCK_BYTES

    def test_large_states_have_a_block_each_and_none_in_reserve(self) -> None:
        y0 = torch.zeros(BLOCK_BYTES // 8 + 1, dtype=torch.float64)
        checkpoints = filled(y0, 5)
        assert [len(block) for block in checkpoints.blocks] == [1] * 6
        assert self.bytes_of(checkpoints) == 6 * y0.numel() * 8


class TestRows:
    def test_none(self) -> None:
        assert list(rows([], 0)) == []
        assert list(rows([torch.zeros(3, 2)], 0)) == []

    def test_are_views(self) -> None:
        block = torch.zeros(3, 2)
        for i, row in enumerate(rows([block], 3)):
            row.fill_(i)
        assert block[:, 0].tolist() == [0.0, 1.0, 2.0]


class TestStepRecord:
    def test_bounds(self) -> None:
        record = StepRecord()
        assert record.bounds().shape == (0, 2)
        record.steps.append(AcceptedStep(0.0, 0.1, 0.1, []))
        record.steps.append(AcceptedStep(0.1, 0.2, 0.3, [(1, 0.5)]))
        assert record.bounds().dtype == torch.float64
        assert record.bounds().tolist() == [[0.0, 0.1], [0.1, 0.3]]

    def test_records_do_not_share_their_steps(self) -> None:
        StepRecord().steps.append(AcceptedStep(0.0, 0.1, 0.1, []))
        assert StepRecord().steps == []
