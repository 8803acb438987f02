"""What people see of a run: lines, and the panel."""

from __future__ import annotations

import io
import math
import re

import pytest
from rich.console import Console

from unitrain.track.lines import (
    duration,
    evaluation_line,
    number,
    progress_line,
    quantity,
    seconds_left,
    short,
    size,
    sparkline,
)
from unitrain.track.panel import Panel

pytestmark = pytest.mark.fast

RECORD = {
    "step": 10,
    "split": "train",
    "loss": 3.21447,
    "lr": 9.5e-4,
    "grad_norm": 1.2345,
    "samples": 320,
    "tokens": 40960,
    "seconds": 2.0,
    "samples_per_second": 320 / 1.45,
    "tokens_per_second": 21300.0,
    "mfu": 0.408,
    "memory_bytes": 412_000_000,
    "weight": 4096.0,
    "applied": 1.0,
}


def test_a_progress_line_tells_all_that_is_known():
    assert progress_line(RECORD, 300) == (
        "step  10/300  loss 3.2145  lr 9.5e-04  norm 1.23  21.3k tok/s  mfu 41%  mem 412 MB  eta 0:42"
    )


def test_a_progress_line_leaves_out_what_is_not_known():
    assert progress_line({"step": 3, "split": "train", "loss": 0.5}, 9) == "step 3/9  loss 0.5000"
    assert (
        progress_line({"step": 3, "loss": 0.5, "samples_per_second": 12.0}, 9)
        == "step 3/9  loss 0.5000  12.0 samples/s"
    )


def test_metrics_of_the_loss_stand_beside_it():
    line = progress_line({**RECORD, "accuracy": 0.25, "note": "x"}, 300)
    assert "loss 3.2145  accuracy 0.2500  lr" in line
    assert "note" not in line


def test_what_went_wrong_can_be_seen():
    line = progress_line({**RECORD, "loss": None, "grad_norm": math.inf, "applied": 0.0}, 300)
    assert "loss nan" in line
    assert "norm inf  update skipped" in line


def test_an_evaluation_line_tells_the_step_and_the_metrics():
    record = {"step": 100, "split": "eval", "loss": 2.345, "accuracy": 0.41, "seconds": 3.0}
    assert evaluation_line(record) == "eval step 100  loss 2.3450  accuracy 0.4100"
    assert evaluation_line({"step": 1, "split": "eval", "reward": 2}) == "eval step 1  reward 2.0000"


def test_the_time_left_follows_the_speed_and_not_the_time_since_the_start():
    resumed = {**RECORD, "step": 200, "samples": 6400, "samples_per_second": 32.0, "seconds": 1.0}
    assert seconds_left(resumed, 300) == 100.0
    assert seconds_left({"step": 0, "samples": 0, "samples_per_second": 3.0}, 300) is None
    assert seconds_left({"step": 5}, 300) is None


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (number, 3.21447, "3.2145"),
        (number, 0.0, "0.0000"),
        (number, 1.5e-5, "1.500e-05"),
        (number, 123456.0, "1.235e+05"),
        (number, None, "nan"),
        (number, -math.inf, "-inf"),
        (short, 1.2345, "1.23"),
        (short, 12.345, "12.3"),
        (short, 1234.5, "1234"),
        (short, 4.6e-4, "4.6e-04"),
        (short, 0.0, "0.00"),
        (quantity, 7.123, "7.12"),
        (quantity, 999.4, "999"),
        (quantity, 999.9, "1.00k"),
        (quantity, 21_300, "21.3k"),
        (quantity, 999_999, "1.00M"),
        (quantity, 2.5e9, "2.50G"),
        (size, 412_000_000, "412 MB"),
        (size, 1_500_000_000, "1.50 GB"),
        (duration, 42.4, "0:42"),
        (duration, 59.9, "1:00"),
        (duration, 725, "12:05"),
        (duration, 11220, "3:07:00"),
        (duration, 187800, "2d 04:10"),
    ],
)
def test_numbers_are_short_and_of_one_width(function, value, text):
    assert function(value) == text


def test_a_sparkline_shows_the_newest_values_and_gaps():
    assert sparkline([1, 2, 3, 4, 5, 6, 7, 8], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([100.0, 2.0, 1.0], 2) == "█▁"
    assert sparkline([1.0, None, math.nan, 2.0], 9) == "▁  █"
    assert sparkline([3.0, 3.0], 9) == "▁▁"
    assert sparkline([], 9) == sparkline([None], 9) == sparkline([1.0], 0) == ""


def drawn(width: int, *records: dict[str, object], color: bool = False) -> list[str]:
    """The lines of the panel's last state on a terminal of that width."""
    output = io.StringIO()
    console = Console(file=output, width=width, force_terminal=True, color_system="truecolor" if color else None)
    with Panel("gpt-tiny-20261120-081501-3f2a", 300, console) as panel:
        for record in records:
            panel.update(record)
    text = output.getvalue()
    return [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for line in text.split("\x1b[2K")[-1].splitlines()]


RECORDS = (
    {**RECORD, "loss": 5.0, "accuracy": 0.125},
    {**RECORD, "step": 20, "samples": 640, "accuracy": 0.25},
    {"step": 20, "split": "eval", "loss": 3.5, "accuracy": 0.5},
    {"time": 1.0, "event": "checkpoint", "step": 20},
)


def test_the_panel_shows_how_far_how_well_and_how_fast():
    lines = drawn(80, *RECORDS)
    assert [len(line) for line in lines if line] == [80] * 8
    text = "\n".join(lines)
    for part in (
        "gpt-tiny-20261120-081501-3f2a",
        "20/300",
        "7%  eta 0:41",
        "3.2145  accuracy 0.2500  █▁",
        "9.5e-04  norm 1.23",
        "21.3k tok/s  mfu 41%  memory 412 MB",
        "step 20  loss 3.5000  accuracy 0.5000",
    ):
        assert part in text
    assert re.search(r"saved\s+step 20 ", text)


@pytest.mark.parametrize("width", [20, 30, 36, 50, 60, 100, 200])
def test_the_panel_fits_any_terminal(width):
    lines = drawn(width, *RECORDS)
    assert all(len(line) <= min(width, 100) for line in lines)
    assert any("20/300" in line for line in lines)


def test_the_panel_starts_before_the_first_record_and_survives_a_diverged_loss():
    assert any("0/300" in line for line in drawn(80))
    assert any("nan" in line for line in drawn(80, {**RECORD, "loss": None, "grad_norm": None, "applied": 0.0}))


def test_no_color_is_honoured(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    output = io.StringIO()
    with Panel("run", 3, Console(file=output, width=80, force_terminal=True)) as panel:
        panel.update(RECORD)
    assert not re.search(r"\x1b\[[0-9;]*3\d", output.getvalue())


def test_a_line_is_printed_above_the_panel_as_it_is():
    output = io.StringIO()
    panel = Panel("run", 3, Console(file=output, width=40, force_terminal=True, color_system=None))
    panel.print("see [bold]this[/bold] path " + "/x" * 30)
    panel.close()
    panel.close()
    assert "see [bold]this[/bold] path " + "/x" * 30 in output.getvalue()
