"""Loss spikes, lost updates and differing replicas from values alone; windows, ledger lines and what is no secret."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unitrain.capsule import write_capsule
from unitrain.cursor import ids_at, positions, sample_ids, with_window
from unitrain.errors import Diverged, ReplicasDiffer, UserError
from unitrain.guard import Guard, Reading, refuse_differing
from unitrain.ledger import FILE, Ledger, Trail, read_ledger
from unitrain.recipe import GuardRecipe
from unitrain.redaction import kept_environment, redacted
from unitrain.repro import reproduce

pytestmark = pytest.mark.fast

NAN = float("nan")


def readings(*losses: float, first: int = 1) -> list[Reading]:
    return [Reading(step, loss, loss == loss) for step, loss in enumerate(losses, start=first)]


def test_a_loss_far_above_the_last_ones_is_a_spike_and_the_last_such_step_ends_its_window() -> None:
    guard = Guard(GuardRecipe(spike=10))
    calm = [1.0, 1.1, 0.9, 1.2] * 4
    assert guard.take(readings(*calm)) == ([], None)
    _, spike = guard.take(readings(1.3, 9.0, 1.0, 8.0, 1.0, first=17))
    assert spike is not None
    assert (spike.step, spike.last_step, spike.loss) == (18, 20, 9.0)
    assert spike.median < spike.limit < 9


def test_nothing_is_a_spike_before_there_are_losses_to_compare_with_or_when_not_asked() -> None:
    assert Guard(GuardRecipe(spike=3)).take(readings(*[1.0] * 15, 1e9)) == ([], None)
    assert Guard(GuardRecipe()).take(readings(*[1.0] * 50, 1e9)) == ([], None)


def test_a_loss_that_is_not_finite_is_a_lost_update_and_no_spike() -> None:
    guard = Guard(GuardRecipe(spike=3, max_skips=3))
    assert guard.take(readings(*[1.0] * 20, NAN, NAN, 1.0)) == ([21, 22], None)
    guard.refuse_lost(23)
    guard.take(readings(NAN, NAN, NAN, 1.0, first=24))
    with pytest.raises(Diverged, match="the updates of 3 steps in a row, up to step 27"):
        guard.refuse_lost(27)


def test_a_guard_restored_decides_as_the_one_that_was_saved() -> None:
    guard = Guard(GuardRecipe(spike=10, window=16))
    guard.take(readings(*np.linspace(1, 2, 20).tolist()))
    guard.skip((30, 40), 1)
    other = Guard(guard.recipe)
    other.restore(json.loads(json.dumps(guard.state())))
    assert other.state() == guard.state()
    assert other.take(readings(5.0)) == guard.take(readings(5.0))


def test_the_rank_that_differs_from_most_is_named_with_its_tensors() -> None:
    refuse_differing("model", 3, {"param a": [1, 1, 1]})
    with pytest.raises(ReplicasDiffer, match=r"after step 3 .* 'model' differ: rank 0 holds another param a;"):
        refuse_differing("model", 3, {"param a": [2, 1, 1], "param b": [5, 5, 5]})
    with pytest.raises(ReplicasDiffer, match="rank 1 holds another param a, param b;"):
        refuse_differing("model", 3, {"param a": [2, 1], "param b": [5, 6]})


windows = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9)), max_size=6)


@given(windows, st.integers(1, 7), st.integers(1, 40))
def test_steps_take_every_position_once_but_the_skipped_ones(
    pairs: list[tuple[int, int]], batch: int, steps: int
) -> None:
    skipped: tuple[tuple[int, int], ...] = ()
    for begin, length in pairs:
        skipped = with_window(skipped, (begin, begin + length))
    left_out = {place for begin, end in skipped for place in range(begin, end)}
    taken = np.concatenate([positions(step, batch, skipped) for step in range(steps)]).tolist()
    assert taken == [place for place in range(taken[-1] + 1) if place not in left_out]


def test_a_window_ahead_changes_no_sample_before_it() -> None:
    assert sample_ids(3, 5, 10, 77, ((50, 60),)).tolist() == sample_ids(3, 6, 10, 77).tolist()
    assert sample_ids(3, 4, 10, 77, ((50, 60),)).tolist() == sample_ids(3, 4, 10, 77).tolist()
    assert sorted(ids_at(np.arange(77), 3, 77).tolist()) == list(range(77))


def test_what_no_disk_took_is_written_later_and_a_torn_line_harms_nothing(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.append("begin", attempt="a")
    path = tmp_path / FILE
    path.rename(tmp_path / "aside")
    path.mkdir()
    ledger.append("steps", attempt="a", first=1, last=2, ids_crc="0")
    path.rmdir()
    (tmp_path / "aside").rename(path)
    path.write_bytes(path.read_bytes() + b'{"n": 1, "k')
    ledger.append("steps", attempt="a", first=3, last=4, ids_crc="0")
    found = read_ledger(path)
    assert [line.get("last") for line in found.lines] == [None, 2, 4]
    assert found.problems == []


def test_a_failed_save_leaves_its_steps_for_the_next_one() -> None:
    trail = Trail(0, "a")
    trail.take(np.arange(3))
    assert [facts["last"] for facts in trail.close(4)] == [4]
    trail.take(np.arange(3))
    assert [(facts["first"], facts["last"]) for facts in trail.close(8)] == [(1, 4), (5, 8)]
    assert [facts["last"] for facts in trail.durable(8)] == [4, 8]
    assert trail.durable(8) == []


SECRETS = {
    "HF_TOKEN": "hf_abcdef123",
    "AWS_SECRET_ACCESS_KEY": "qwerty/xyz",
    "NCCL_KEYS": "aaaabbbb",
    "PGPASS": "s3cr3t!",
}


def test_no_secret_is_kept_of_an_environment() -> None:
    shown = kept_environment(
        {**SECRETS, "NCCL_DEBUG": "INFO", "HF_HOME": "/x", "EDITOR": "vi", "TORCH_X": "qwerty/xyz"}
    )
    assert shown == {"NCCL_DEBUG": "INFO", "HF_HOME": "/x", "TORCH_X": "[redacted AWS_SECRET_ACCESS_KEY]"}


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("401 for hf_abcdef123 at host", "401 for [redacted HF_TOKEN] at host"),
        ("https://me:word@host/x", "https://[redacted]@host/x"),
        ("data: {name: x, api_key: abc}", "data: {name: x, api_key: [redacted]}"),
        ("  token: abc\n  size: 3", "  token: [redacted]\n  size: 3"),
        ("tokenizer: byte, tokens: 5, key: 7, max_tokens: 4", "tokenizer: byte, tokens: 5, key: 7, max_tokens: 4"),
        ("token: null", "token: null"),
    ],
)
def test_no_secret_is_kept_of_a_text(text: str, kept: str) -> None:
    assert redacted(text, SECRETS) == kept


def test_capsules_are_numbered_and_need_no_trainer(tmp_path: Path) -> None:
    Ledger(tmp_path).append(
        "begin", attempt="a", step=0, strategy="ddp", world_size=2, seed=1, global_batch=4, size=9, skipped=[[0, 4]]
    )
    for number in (1, 2):
        folder = write_capsule(tmp_path, SECRETS, rank=1, how="end", error="killed: hf_abcdef123", step=3)
        assert folder == tmp_path / "failures" / f"000{number}"
    capsule = json.loads((folder / "capsule.json").read_text())
    assert capsule["sample_ids"] == sample_ids(1, 2, 4, 9, ((0, 4),)).tolist()
    assert (capsule["world_size"], capsule["error"]) == (2, "killed: [redacted HF_TOKEN]")


@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"step": "x"}', '{"step": 1, "skipped": [3]}', "[" * 10**5])
def test_what_is_no_capsule_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "capsule.json").write_text(text)
    with pytest.raises(UserError, match=r"capsule|JSON|does not tell"):
        reproduce(tmp_path)
