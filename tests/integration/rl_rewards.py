"""Reward functions for tests, by a name that reward workers can import."""

from __future__ import annotations


def picky(completion):
    """Likes vowels, and nothing that is long."""
    if len(completion) > 3 and completion[0] < "h":
        raise ValueError("too long")
    return sum(letter in "aeiou" for letter in completion)
