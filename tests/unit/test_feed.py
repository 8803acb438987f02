"""The feed: the same samples for any number of ranks, loaded ahead, and failures that name the sample."""

from __future__ import annotations

import cProfile
import threading
import time
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unitrain.cursor import mix, sample_ids
from unitrain.data import ArraySource, DatasetSource, Source
from unitrain.data.feed import Feed
from unitrain.errors import DataError

pytestmark = pytest.mark.fast


class Numbers(Source):
    """Sample i is the number i; counts what is fetched, and fails or waits where it is told to."""

    tokens_per_sample = 3

    def __init__(self, size, *, broken=(), error=None):
        self.size, self.broken = size, set(broken)
        self.error = error or ValueError("the disk coughed")
        self.fetched = []
        self.gate = threading.Event()
        self.gate.set()

    def __len__(self):
        return self.size

    def fetch(self, ids):
        assert self.gate.wait(30)
        assert threading.current_thread() is not threading.main_thread()
        self.fetched.append(ids.tolist())
        if self.broken & set(ids.tolist()):
            raise self.error
        return {"x": ids.copy()}


@pytest.fixture
def feed():
    """Makes feeds and closes them."""
    feeds = []

    def make(source, **options):
        options = {"seed": 0, "global_batch": 8, "micro_batch": None, "rank": 0, "size": 1, "place": dict, **options}
        feeds.append(Feed(source, **options))
        return feeds[-1]

    yield make
    for each in feeds:
        each.close()


def numbers(batch):
    """Samples of this rank, without fillers."""
    return [int(x) for micro in batch.micro() if not micro.filler for x in micro.arrays["x"]]


def wait_until(true):
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 30),
    size=st.integers(1, 7),
    micro_batch=st.none() | st.integers(1, 9),
    samples=st.integers(1, 40),
    sweeping=st.booleans(),
)
def test_ranks_and_microbatches_change_no_sample(rows, size, micro_batch, samples, sweeping):
    feeds = [
        Feed(Numbers(samples), seed=9, global_batch=rows, micro_batch=micro_batch, rank=rank, size=size, place=dict)
        for rank in range(size)
    ]
    try:
        if sweeping:
            steps = list(zip(*(feed.sweep() for feed in feeds), strict=True))
            expected = [list(range(samples))[start : start + rows] for start in range(0, samples, rows)]
        else:
            steps = [[feed.batch(step) for feed in feeds] for step in range(3)]
            expected = [sample_ids(9, step, rows, samples).tolist() for step in range(3)]
        assert len(steps) == len(expected)
        for batches, ids in zip(steps, expected, strict=True):
            assert [number for batch in batches for number in numbers(batch)] == ids
            assert len({len(batch.micro()) for batch in batches}) == 1
            for batch in batches:
                assert batch.ids.tolist() == ids
                assert batch.tokens == 3 * len(ids)
                assert all(micro.rows == len(micro.arrays["x"]) for micro in batch.micro())
                assert all(micro.rows <= (micro_batch or rows) for micro in batch.micro())
                fillers = [micro for micro in batch.micro() if micro.filler]
                assert all(micro.arrays["x"].tolist() == ids[:1] for micro in fillers)
    finally:
        for feed in feeds:
            feed.close()


def test_a_rank_fetches_only_its_own_rows(feed):
    source = Numbers(100)
    own = numbers(feed(source, rank=1, size=4, ahead=0).batch(0))
    assert own == sample_ids(0, 0, 8, 100)[2:4].tolist()
    assert source.fetched == [own]


def test_ranks_without_rows_run_fillers_as_often_as_others_run_microbatches(feed):
    last = [list(feed(Numbers(9), micro_batch=2, rank=rank, size=4).sweep())[-1] for rank in range(4)]
    assert [numbers(batch) for batch in last] == [[], [], [], [8]]
    assert [[(micro.filler, micro.rows) for micro in batch.micro()] for batch in last] == [[(True, 1)]] * 3 + [
        [(False, 1)]
    ]


def test_resuming_in_the_middle_gives_the_batches_that_would_have_come(feed):
    through, resumed = feed(Numbers(50), micro_batch=3), feed(Numbers(50), micro_batch=3)
    expected = [through.batch(step) for step in range(12)]
    for step in (7, 8, 9, 3, 4, 11):
        batch = resumed.batch(step)
        assert batch.step == step
        assert numbers(batch) == numbers(expected[step])
        assert [micro.key for micro in batch.micro()] == [micro.key for micro in expected[step].micro()]


def test_the_same_step_can_be_asked_again(feed):
    numbers_feed = feed(Numbers(50))
    assert numbers(numbers_feed.batch(4)) == numbers(numbers_feed.batch(4))


def test_a_late_step_of_a_huge_source_comes_at_once(feed):
    began = time.perf_counter()
    batch = feed(Numbers(10**9)).batch(10**8)
    assert numbers(batch) == sample_ids(0, 10**8, 8, 10**9).tolist()
    assert time.perf_counter() - began < 2


def test_keys_follow_from_seed_step_and_place(feed):
    batch = feed(Numbers(50), seed=5, micro_batch=2, rank=1, size=2).batch(3)
    assert [micro.key for micro in batch.micro()] == [mix(5, 3, 4), mix(5, 3, 6)]


def test_evaluation_has_keys_of_its_own(feed):
    numbers_feed = feed(Numbers(16), micro_batch=2)
    training = [micro.key for step in range(2) for micro in numbers_feed.batch(step).micro()]
    sweeping = [micro.key for batch in numbers_feed.sweep() for micro in batch.micro()]
    assert len({*training, *sweeping}) == 16


def test_an_evaluation_between_two_steps_disturbs_neither(feed):
    numbers_feed = feed(Numbers(20))
    for step in range(4):
        assert numbers(numbers_feed.batch(step)) == sample_ids(0, step, 8, 20).tolist()
        assert [number for batch in numbers_feed.sweep() for number in numbers(batch)] == list(range(20))


def test_an_evaluation_can_be_limited_and_left(feed):
    numbers_feed = feed(Numbers(100))
    assert [len(batch) for batch in numbers_feed.sweep(limit=2)] == [8, 8]
    for batch in numbers_feed.sweep():
        assert numbers(batch) == list(range(8))
        break
    assert len(list(numbers_feed.sweep(limit=99))) == 13


@pytest.mark.parametrize("ahead", [0, 1, 2, 5])
def test_the_next_batches_are_loaded_while_nobody_waits(feed, ahead):
    source = Numbers(1000)
    feed(source, ahead=ahead).batch(10).micro()
    wait_until(lambda: len(source.fetched) == 1 + ahead)
    time.sleep(0.02)
    assert source.fetched == [sample_ids(0, 10 + number, 8, 1000).tolist() for number in range(1 + ahead)]


def test_a_jump_leaves_what_nobody_wants_any_more_unread(feed):
    source = Numbers(1000)
    source.gate.clear()
    numbers_feed = feed(source)
    numbers_feed.batch(0)  # being read; 1 and 2 wait behind it
    threading.Timer(0.05, source.gate.set).start()
    numbers_feed.batch(50).micro()
    wait_until(lambda: len(source.fetched) == 4)
    assert source.fetched == [sample_ids(0, step, 8, 1000).tolist() for step in (0, 50, 51, 52)]


def test_ids_are_known_before_their_samples_are_read(feed):
    source = Numbers(1000)
    source.gate.clear()
    assert feed(source).batch(0).ids.tolist() == sample_ids(0, 0, 8, 1000).tolist()
    source.gate.set()


def test_a_step_whose_batch_is_there_pays_at_most_eight_calls(feed):
    source = Numbers(1000)
    numbers_feed = feed(source)
    numbers_feed.batch(0).micro()
    wait_until(lambda: len(source.fetched) == 3)  # the third is being read, so the second is there
    profile = cProfile.Profile()
    profile.enable()
    numbers_feed.batch(1).micro()
    profile.disable()
    assert sum(entry.callcount for entry in profile.getstats()) - 1 <= 8  # one is the profiler's own


def test_batches_are_placed_in_the_loading_thread(feed):
    threads = []

    def place(arrays):
        threads.append(threading.current_thread())
        return {"x": arrays["x"] + 1}

    batch = feed(Numbers(8), place=place).batch(0)
    assert sorted(numbers(batch)) == list(range(1, 9))
    assert threading.main_thread() not in threads


def test_a_failure_names_the_sample_and_the_source_where_the_step_needs_it(feed):
    source = Numbers(100, broken=[sample_ids(0, 1, 8, 100)[5]])
    numbers_feed = feed(source, micro_batch=4)
    numbers_feed.batch(0).micro()
    batch = numbers_feed.batch(1)
    with pytest.raises(DataError, match="the disk coughed") as caught:
        batch.micro()
    (number,) = source.broken
    assert f"sample {number} of Numbers could not be read: ValueError" in str(caught.value)
    assert caught.value.__cause__ is source.error
    with pytest.raises(DataError, match="the disk coughed"):
        batch.micro()
    assert len(numbers_feed.batch(2).micro()) == 2  # a caller may go on with the next


def test_an_evaluation_reports_failures_too(feed):
    with pytest.raises(DataError, match="sample 12 of Numbers"):
        [batch.micro() for batch in feed(Numbers(20, broken=[12])).sweep()]


def test_an_error_that_names_its_sample_is_kept(feed):
    error = DataError("sample 12 is a picture of 0 pixels; remove it")
    with pytest.raises(DataError) as caught:
        [batch.micro() for batch in feed(Numbers(20, broken=[12], error=error)).sweep()]
    assert caught.value is error
    assert error.__cause__ is None


def test_an_error_that_names_none_of_the_samples_is_explained(feed):
    error = DataError("sample 1200 is bad")
    with pytest.raises(DataError, match="sample 12 of Numbers could not be read: DataError: sample 1200 is bad"):
        [batch.micro() for batch in feed(Numbers(20, broken=[12], error=error)).sweep()]


def test_samples_that_fail_only_together_are_listed(feed):
    ragged = DatasetSource([[1.0], [2.0, 3.0]], collate=lambda rows: {"x": np.stack([np.array(row) for row in rows])})
    with pytest.raises(DataError, match=r"samples 0, 1 of DatasetSource\(list\) could not be fetched together"):
        next(feed(ragged).sweep()).micro()


def test_arrays_that_the_device_refuses_are_listed(feed):
    def place(arrays):
        raise TypeError("no such dtype")

    with pytest.raises(DataError, match=r"no such dtype; they are x int64\[8\]"):
        feed(Numbers(8), place=place).batch(0).micro()


def test_fetched_arrays_must_have_one_row_for_each_id(feed):
    class Short(Numbers):
        def fetch(self, ids):
            return {"x": ids[:-1]}

    with pytest.raises(DataError, match=r"Short fetched 'x' of shape \(7,\) for 8 samples"):
        feed(Short(8)).batch(0).micro()


def test_even_a_source_that_exits_does_not_hang_the_step(feed):
    with pytest.raises(SystemExit):
        feed(Numbers(8, broken=[0], error=SystemExit("enough"))).batch(0).micro()


def test_closing_does_not_wait_for_a_source_that_never_answers(feed, monkeypatch):
    monkeypatch.setattr("unitrain.data.feed._CLOSE_SECONDS", 0.1)
    source = Numbers(100)
    source.gate.clear()
    numbers_feed = feed(source)
    batch = numbers_feed.batch(0)
    began = time.perf_counter()
    numbers_feed.close()
    assert time.perf_counter() - began < 1
    with pytest.raises(DataError, match="closed while Numbers was still reading"):
        batch.micro()
    source.gate.set()


def test_a_closed_feed_says_so(feed):
    numbers_feed = feed(Numbers(100))
    taken = numbers_feed.batch(0)
    numbers_feed.close()
    numbers_feed.close()
    for ask in (lambda: numbers_feed.batch(0), lambda: numbers_feed.batch(1), lambda: list(numbers_feed.sweep())):
        with pytest.raises(DataError, match="is closed"):
            ask()
    assert len(numbers(taken)) == 8


def test_closing_ends_the_thread(feed):
    before = set(threading.enumerate())
    numbers_feed = feed(Numbers(100))
    numbers_feed.batch(0).micro()
    assert set(threading.enumerate()) - before
    numbers_feed.close()
    assert not set(threading.enumerate()) - before


def test_an_empty_source_is_refused():
    with pytest.raises(DataError, match="ArraySource has no samples"):
        Feed(
            ArraySource(x=np.empty((0, 3))),
            seed=0,
            global_batch=2,
            micro_batch=None,
            rank=0,
            size=1,
            place=dict,
        )


def test_epochs_wrap_inside_a_batch(feed):
    numbers_feed = feed(Numbers(3))
    joined = [number for step in range(3) for number in numbers(numbers_feed.batch(step))]
    assert all(sorted(joined[start:stop]) == [0, 1, 2] for start, stop in pairwise(range(0, 25, 3)))
