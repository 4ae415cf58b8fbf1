"""SequenceLoader: its order, what each process gets, and the tail."""

from __future__ import annotations

import pytest
import torch

from lowrank_pl.training.data import SequenceLoader

ELEVEN = torch.arange(22).view(11, 2)


def test_order_follows_from_seed_and_epoch():
    loaders = [SequenceLoader(ELEVEN, batch_size=2, seed=seed) for seed in (1, 1, 2)]
    first, same, other = ([[b.tolist() for b in loader] for _ in range(3)] for loader in loaders)
    assert first == same != other
    assert first[0] != first[1] != first[2]
    assert all(len(epoch) == 5 for epoch in first)
    assert loaders[0].batches(2)[0] == [row[0] // 2 for row in first[2][0]]


def test_processes_share_every_step_and_leave_the_same_tail(caplog):
    whole = SequenceLoader(ELEVEN, batch_size=4, seed=3).batches(7)
    caplog.clear()
    halves = [SequenceLoader(ELEVEN, batch_size=2, seed=3, rank=rank, world_size=2).batches(7) for rank in range(2)]
    assert [one + two for one, two in zip(*halves, strict=True)] == whole
    assert "3 of 11 sequences are left out, different ones in each epoch: 4 are taken at a time" in caplog.text
    assert len(caplog.records) == 1


def test_validation_keeps_its_tail_and_gives_every_process_as_many(caplog):
    assert SequenceLoader(ELEVEN, batch_size=4, seed=None, drop_tail=False).batches(0)[-1] == [8, 9, 10]
    assert not caplog.records
    shares = [
        SequenceLoader(ELEVEN, batch_size=4, seed=None, drop_tail=False, rank=rank, world_size=2) for rank in range(2)
    ]
    assert [[len(batch) for batch in share] for share in shares] == [[4, 1], [4, 1]]
    assert [len(share) for share in shares] == [2, 2]
    assert sorted(n for share in shares for batch in share.batches(0) for n in batch) == list(range(10))
    assert "1 of 11 sequences are left out: 2 are taken at a time" in caplog.text


def test_too_few_windows_for_a_batch():
    with pytest.raises(ValueError, match="11 sequences of text are fewer than one batch of 6 for each of 2 processes"):
        SequenceLoader(ELEVEN, batch_size=6, seed=None, world_size=2)


def test_the_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    list(SequenceLoader(ELEVEN, batch_size=2, seed=1))
    assert torch.equal(torch.get_rng_state(), before)
