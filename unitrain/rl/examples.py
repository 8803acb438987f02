"""Small tasks that the recipes train on: rows of data and rewards, no download."""

from __future__ import annotations

import dataclasses
import functools
import re
import zlib
from typing import Any

import numpy as np

from ..cursor import permute
from ..data.files import PYTHON_STDLIB, find_files
from .advantages import Advantages, Episodes, grpo
from .samples import token_rewards

_HELD_OUT = 1000  # additions
_FIRST, _COUNT = 10, 90  # two-digit numbers
_KEY = 0x414444
_WINDOW = 48  # bytes of a line
_COMMON = """
    the be to of and a in that have it for not on with as you do at this but by from or one all would there what so
    up out if about who get which go when make can like no just into some could them see other than then now only its
    over also after use how first any these because is are was has must may should set given default return
"""


def addition(split: str) -> list[dict[str, Any]]:
    """`12+34=` and its answer, of all pairs of two-digit numbers; 1,000 of them are held out."""
    return [
        {"prompt": f"{one}+{two}=", "completion": str(one + two), "answer": str(one + two)}
        for one, two in _operands(split)
    ]


def addition_pairs(split: str) -> list[dict[str, Any]]:
    """The same with the right answer chosen and one rejected that is off by 1, 2, 10 or 100."""
    rows = []
    for one, two in _operands(split):
        right = one + two
        wrong = right + (1, -1, 2, -2, 10, -10, 100)[(7 * one + 3 * two) % 7]
        rows.append({"prompt": f"{one}+{two}=", "chosen": str(right), "rejected": str(wrong), "answer": str(right)})
    return rows


def addition_labels(split: str) -> list[dict[str, Any]]:
    """The same as single answers, one in two right."""
    found = []
    for number, row in enumerate(addition_pairs(split)):
        good = number % 2 == 0
        found.append({**row, "completion": row["chosen" if good else "rejected"], "label": good})
    return found


def letters(split: str) -> list[dict[str, Any]]:
    """One lower-case letter each: prompts for a model that knows nothing."""
    return [{"prompt": chr(97 + number)} for number in range(26)]


def lines(split: str) -> list[dict[str, Any]]:
    """16 bytes of text out of Python's standard library, and the 32 that follow."""
    text = _library()
    order = permute(np.arange(len(text) // _WINDOW), len(text) // _WINDOW, _KEY)
    chosen = order[:200] if split == "eval" else order[200:4200]
    windows = [text[number * _WINDOW : (number + 1) * _WINDOW] for number in chosen.tolist()]
    return [{"prompt": window[:16], "completion": window[16:]} for window in windows]


def lines_pairs(split: str) -> list[dict[str, Any]]:
    """The same with two ways to go on, of which the one with more common words is chosen."""
    rows, found = lines(split), []
    for row, other in zip(rows, [*rows[1:], rows[0]], strict=True):
        better, worse = sorted((row["completion"], other["completion"]), key=common_words, reverse=True)
        if common_words(better) > common_words(worse):
            found.append({"prompt": row["prompt"], "chosen": better, "rejected": worse})
    return found


def common_words(completion: str) -> float:
    """How many different common English words there are, up to 4, as a share: what `lines_pairs` prefers."""
    return min(len(frozenset(_COMMON.split()).intersection(re.findall("[a-z]+", completion))), 4) / 4


def exact_match(completion: str, answer: str) -> float:
    """1 for the right answer."""
    return float(completion.strip() == answer)


def vowels(completion: str) -> float:
    """Share of vowels in the first 8 characters."""
    return sum(letter in "aeiou" for letter in completion[:8]) / 8


def shuffled(episodes: Episodes) -> Advantages:
    """GRPO's advantages of rewards that were dealt out to other samples: a control, which can learn nothing."""
    rewards, alive = episodes.totals(), np.flatnonzero(episodes.alive)
    seed = zlib.crc32(episodes.mask.tobytes() + rewards.tobytes())  # another order in each step
    dealt = np.zeros_like(rewards)
    dealt[alive] = rewards[np.random.default_rng(seed).permutation(alive)]
    return grpo(dataclasses.replace(episodes, rewards=token_rewards(dealt, episodes.mask)))


@functools.cache
def _library() -> str:
    """The first 2 MB of it, as ASCII."""
    text = b""
    for file in find_files([PYTHON_STDLIB], "**/*.py"):
        text += file.read()
        if len(text) > 2_000_000:
            break
    return text[:2_000_000].decode("ascii", errors="replace").replace("\ufffd", "?")


def _operands(split: str) -> list[tuple[int, int]]:
    size = _COUNT * _COUNT
    order = permute(np.arange(size), size, _KEY)
    chosen = order[:_HELD_OUT] if split == "eval" else order[_HELD_OUT:]
    return [(_FIRST + number // _COUNT, _FIRST + number % _COUNT) for number in chosen.tolist()]
