"""A library's noise is taken out of what the terminal shows, however the text is cut, and nothing else is."""

from __future__ import annotations

import pytest

from unitrain.agent.noise import NoiseFilter

pytestmark = pytest.mark.fast

NOISE = "[Gloo] Rank 0 is connected to 1 peer ranks. Expected number of connected peer ranks is : 1\n"


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_noise_is_taken_out_however_the_text_is_cut(size: int) -> None:
    text = f"step 1\n{NOISE}{NOISE}step 2\n[Gloo] Rank 0 has more to say\n[G\n[Gloo] Rank 1"
    noise = NoiseFilter()
    shown = "".join(noise.without_noise(text[begin : begin + size]) for begin in range(0, len(text), size))
    assert shown + noise.rest() == "step 1\nstep 2\n[Gloo] Rank 0 has more to say\n[G\n[Gloo] Rank 1"


def test_an_unfinished_line_is_shown_at_once() -> None:
    assert NoiseFilter().without_noise("how much? ") == "how much? "
