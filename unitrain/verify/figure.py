"""The loss curves of a verification in one picture, and how far each is from the reference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import MissingExtra
from .compare import Comparison
from .trial import Outcome

FLOOR = 1e-9  # where equal losses are drawn: a logarithmic axis has no zero
# Okabe and Ito's colours, which most colour-blind people can tell apart; and marks, for print
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D1F")
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*", "<")
REFERENCE_COLOR = "#BBBBBB"


def draw(path: Path, title: str, reference: Outcome, compared: Sequence[tuple[Outcome, Comparison]]) -> None:
    """Write a PNG. Raises MissingExtra without matplotlib."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ModuleNotFoundError as error:
        raise MissingExtra("the picture", "matplotlib", "plot") from error
    figure = Figure(figsize=(9, 7.5), dpi=120, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    steps = range(1, len(reference.losses) + 1)
    upper.plot(steps, _numbers(reference.losses), color=REFERENCE_COLOR, linewidth=7, label=_label(reference))
    for number, (outcome, comparison) in enumerate(compared):
        style = {"color": COLORS[number % len(COLORS)], "marker": MARKS[number % len(MARKS)], "markersize": 4.5}
        # Curves that agree lie upon each other: marks take turns, so that each is seen.
        turns = (number % len(steps), max(len(compared), 1))
        upper.plot(steps, _numbers(outcome.losses), linewidth=1, markevery=turns, label=_label(outcome), **style)
        far = [min(max(value, FLOOR), 1e3) for value in comparison.differences]
        lower.plot(steps, far, linewidth=1, label=_label(outcome), **style)
    for tier in dict.fromkeys(comparison.tier for _, comparison in compared):
        lower.axhline(tier.losses, color="#AA0000", linestyle="--", linewidth=1)
        text = f"limit of the tier '{tier.name}': {tier.losses:g}"
        lower.text(len(steps), tier.losses * 1.2, text, color="#AA0000", ha="right", va="bottom", fontsize=9)
    upper.set_title(title)
    upper.set_ylabel("training loss")
    upper.legend(frameon=False, fontsize=9)
    lower.set_yscale("log")
    highest = max([value for _, found in compared for value in (*found.differences, found.tier.losses)], default=1.0)
    lower.set_ylim(FLOOR / 2, 30 * min(highest, 1e3))
    lower.set_ylabel(f"relative difference from {reference.trial.strategy}\n(equal losses are drawn at {FLOOR:g})")
    lower.set_xlabel("step")
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (upper, lower):
        axes.grid(color="#E5E5E5", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def _numbers(losses: Sequence[float | None]) -> list[float]:
    return [float("nan") if loss is None else loss for loss in losses]


def _label(outcome: Outcome) -> str:
    ranks = outcome.trial.ranks
    return f"{outcome.trial.strategy}, {ranks} rank{'' if ranks == 1 else 's'}"
