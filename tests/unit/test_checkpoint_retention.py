"""What is deleted, and what never is."""

from __future__ import annotations

import pytest

from unitrain.checkpoint.retention import FolderName, abandoned, doomed

pytestmark = pytest.mark.fast


def names(*texts: str) -> list[FolderName]:
    found = [FolderName.parse(text) for text in texts]
    assert None not in found
    return [name for name in found if name]


@pytest.mark.parametrize(
    ("keep", "gone"),
    [
        (1, ["s00000100-a", "s00000200-a", "s00000300-b"]),
        (2, ["s00000100-a", "s00000200-a"]),
        (3, ["s00000100-a"]),
        (4, []),
        (9, []),
    ],
)
def test_the_newest_are_kept(keep: int, gone: list[str]) -> None:
    published = names("s00000300-b", "s00000100-a", "s00000400-b", "s00000200-a")
    assert [str(name) for name in doomed(published, keep=keep, newest=published[2])] == gone


def test_what_was_just_published_stays_though_a_damaged_one_has_a_later_step() -> None:
    published = names("s00000100-a", "s00000150-b", "s00000200-a")
    assert doomed(published, keep=1, newest=published[1]) == names("s00000100-a")


def test_the_same_step_saved_again_replaces_the_first() -> None:
    published = names("s00000100-a", "s00000100-a.2")
    assert doomed(published, keep=1, newest=published[1]) == published[:1]


def test_unfinished_saves_of_other_attempts_and_earlier_ones_of_this_are_abandoned() -> None:
    unpublished = names("s00000100-a", "s00000300-a", "s00000100-b", "s00000200-b", "s00000200-b.2", "s00000300-b")
    (coming,) = names("s00000200-b.2")
    assert abandoned(unpublished, coming=coming) == names("s00000100-a", "s00000100-b", "s00000200-b", "s00000300-a")


def test_a_save_begun_ahead_by_another_writer_of_this_attempt_is_not_abandoned() -> None:
    (coming,) = names("s00000200-b.9")
    assert abandoned(names("s00000200-b.10", "s00000200-b.9"), coming=coming) == []


@pytest.mark.parametrize(
    "text",
    ["latest", "s100-a", "s00000100", "s00000100-", "s000000100-a", "s00000100-a.1", "s00000100-a/..", "s00000100-ä"],
)
def test_other_names_are_no_checkpoints(text: str) -> None:
    assert FolderName.parse(text) is None


@pytest.mark.parametrize("text", ["s00000100-a", "s123456789012-a_B-9", "s00000000-0.2", "s00000100-a.10"])
def test_a_name_is_read_as_it_is_written(text: str) -> None:
    assert str(FolderName.parse(text)) == text
