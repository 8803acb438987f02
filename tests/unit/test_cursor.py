"""The order of samples: a pure function of seed and step, the same for any number of ranks, pinned forever."""

from __future__ import annotations

import time
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unitrain.cursor import Cursor, micro_rows, mix, num_microbatches, permute, rank_rows, sample_ids

pytestmark = pytest.mark.fast

counts = st.integers(min_value=0, max_value=200)
seeds = st.integers(min_value=0, max_value=2**63)


def test_the_order_of_samples_never_changes():
    assert sample_ids(0, 0, 8, 10).tolist() == [6, 8, 7, 2, 5, 4, 3, 1]
    assert sample_ids(0, 1, 8, 10).tolist() == [9, 0, 3, 7, 8, 6, 1, 5]
    assert sample_ids(7, 123456, 4, 1_000_003).tolist() == [70978, 691557, 195987, 564539]
    assert sample_ids(1, 10**9, 4, 10**9).tolist() == [141300201, 625426807, 644753280, 448893363]
    keys = [mix(), mix(0), mix(0, 0), mix(1, 2, 3)]
    assert keys == [0, 16294208416658607535, 12035550249420947055, 7702586659592502839]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 9, 63, 64, 65, 255, 256, 257, 1000, 4097])
def test_each_epoch_holds_every_sample_once(size):
    for epoch in range(3):
        places = np.arange(size)
        assert sorted(permute(places, size, mix(5, epoch))) == places.tolist()


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 3000), key=seeds)
def test_a_permutation_is_one_at_any_size_and_key(size, key):
    assert np.array_equal(np.sort(permute(np.arange(size), size, key)), np.arange(size))


@settings(max_examples=60, deadline=None)
@given(seed=seeds, global_batch=st.integers(1, 40), size=st.integers(1, 90))
def test_steps_run_through_whole_epochs_wherever_they_are_cut(seed, global_batch, size):
    steps = -(-2 * size // global_batch)
    ids = np.concatenate([sample_ids(seed, step, global_batch, size) for step in range(steps)])
    for epoch in range(2):
        assert sorted(ids[epoch * size : (epoch + 1) * size]) == list(range(size))
    whole = sample_ids(seed, 0, steps * global_batch, size)
    assert np.array_equal(ids, whole)


def test_every_epoch_and_every_seed_has_an_order_of_its_own():
    orders = {tuple(sample_ids(seed, epoch, 1000, 1000).tolist()) for seed in range(5) for epoch in range(20)}
    assert len(orders) == 100


def test_the_order_looks_random():
    size = 10_000
    order = sample_ids(3, 0, size, size)
    places = np.arange(size)
    # Of a random permutation: correlation 0 within 1/sqrt(n), one fixed point, half of the neighbours rise.
    assert abs(np.corrcoef(places, order)[0, 1]) < 0.05
    assert (order == places).sum() < 10
    assert 0.47 < (np.diff(order) > 0).mean() < 0.53
    halves = np.bincount(order[: size // 2] * 10 // size, minlength=10)
    assert halves.min() > 400
    assert halves.max() < 600


def test_each_sample_comes_first_about_as_often():
    firsts = np.bincount([sample_ids(seed, 0, 1, 7)[0] for seed in range(1400)], minlength=7)
    assert firsts.min() > 140
    assert firsts.max() < 260


def test_any_step_of_a_huge_source_costs_the_same():
    began = time.perf_counter()
    for step in (0, 10**3, 10**6, 10**9):
        ids = sample_ids(0, step, 256, 10**9)
        assert ids.dtype == np.int64
        assert ids.shape == (256,)
        assert ids.min() >= 0
        assert ids.max() < 10**9
        assert len(set(ids.tolist())) == 256
    assert time.perf_counter() - began < 1


def test_consecutive_batches_of_a_huge_source_share_nothing():
    batches = [set(sample_ids(0, step, 1000, 10**9).tolist()) for step in range(10)]
    assert len(set().union(*batches)) == 10_000


@settings(deadline=None)
@given(rows=counts, size=st.integers(1, 64))
def test_ranks_share_all_rows_evenly_and_in_order(rows, size):
    parts = [rank_rows(rows, rank, size) for rank in range(size)]
    assert [row for part in parts for row in part] == list(range(rows))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@settings(deadline=None)
@given(start=counts, rows=counts, num_micro=st.integers(1, 32))
def test_microbatches_share_a_ranks_rows_in_order(start, rows, num_micro):
    parts = micro_rows(range(start, start + rows), num_micro)
    assert len(parts) == num_micro
    assert [row for part in parts for row in part] == list(range(start, start + rows))
    assert all(before.stop == after.start for before, after in pairwise(parts))


@settings(deadline=None)
@given(rows=st.integers(1, 200), size=st.integers(1, 64), micro_batch=st.integers(1, 50))
def test_no_rank_holds_more_than_a_microbatch_at_once(rows, size, micro_batch):
    num_micro = num_microbatches(rows, size, micro_batch)
    for rank in range(size):
        assert all(len(part) <= micro_batch for part in micro_rows(rank_rows(rows, rank, size), num_micro))
    assert num_microbatches(rows, size, None) == 1


@settings(deadline=None)
@given(parts=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4), bit=st.integers(0, 63), data=st.data())
def test_every_bit_of_every_part_changes_the_key(parts, bit, data):
    number = data.draw(st.integers(0, len(parts) - 1))
    others = [part ^ (1 << bit) if place == number else part for place, part in enumerate(parts)]
    assert 0 <= mix(*parts) < 2**64
    assert mix(*parts) != mix(*others)


def test_the_clock_counts_steps_samples_and_tokens():
    assert Cursor().advanced(32, 4096).advanced(16, 2048) == Cursor(step=2, samples=48, tokens=6144)
