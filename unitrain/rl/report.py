"""What a run of RL or of preferences ends with: a table and a plot of reward, KL, entropy and length over samples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import MissingExtra
from ..track.lines import number, quantity

PANELS = {"reward": "reward\n(mean of samples)", "kl": "KL to the reference\n(nats a sample)",
          "entropy": "entropy\n(nats a token)", "length": "length\n(tokens a response)"}  # fmt: skip
# of runs that learn from pairs or labels, whose policy draws nothing but at evaluations
LEARNT = {"accuracy": "accuracy\n(share of pairs)", "margin": "margin\n(of pairs)",
          "signed_reward": "implicit reward\n(its sign the label's)"}  # fmt: skip
_LINES = 8
_SMOOTHED = 40  # points from which on their moving mean is drawn too


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Some steps of metrics.jsonl from first to last, with the evaluation at or before each."""
    train, samples = _train(records)
    if not train:
        return ""
    evals = {record["step"]: record for record in records if record["split"] == "eval"}
    held = [name for name in PANELS if any(name in record for record in evals.values())]
    held = [name for name in held if name == "reward" or name not in train[-1]]
    parts = [name for name in train[-1] if name.startswith("reward/")]
    names = [name for name in ("reward", *parts, *PANELS, *LEARNT, "clip_fraction", "gap") if name in train[-1]]
    names = list(dict.fromkeys(names))
    count = min(_LINES, len(train))
    chosen = [train[round(place * (len(train) - 1) / max(count - 1, 1))] for place in range(count)]
    lines = [["step", "samples", *names, *(f"held-out {name}" for name in held)]]
    for record in chosen:
        line = [
            str(record["step"]),
            quantity(samples[record["step"]]),
            *(number(record.get(name)) for name in names),
        ]
        before = max((step for step in evals if step <= record["step"]), default=None)
        line += ["" if before is None else number(evals[before].get(name)) for name in held]
        lines.append(line)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def plot(path: Path, title: str, records: Sequence[Mapping[str, Any]]) -> None:
    """Write a PNG. Raises MissingExtra without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise MissingExtra("the plot of an RL run", "matplotlib", "plot") from error
    train, samples = _train(records)
    held_out = [record for record in records if record["split"] == "eval"]
    panels = _panels(train, held_out)
    figure = Figure(figsize=(8, 1.9 * len(panels) + 0.6), dpi=120, layout="constrained")
    rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, label) in zip(rows, panels.items(), strict=True):
        found = [(samples[record["step"]], record[name]) for record in train if record.get(name) is not None]
        many = len(found) >= _SMOOTHED
        if found:
            alpha = 0.35 if many else 1
            axes.plot(*zip(*found, strict=True), color="#0072B2", linewidth=1.2, alpha=alpha, label="a step")
        if many:
            axes.plot(*zip(*_smoothed(found), strict=True), color="#0072B2", linewidth=1.6, label="moving mean")
        held = [record for record in held_out if record.get(name) is not None]
        if held:
            at = [(_samples_at(samples, record["step"]), record[name]) for record in held]
            axes.plot(*zip(*at, strict=True), color="#D55E00", marker="o", markersize=4, label="held out")
        if name in ("kl", "entropy", "length"):
            axes.set_ylim(0, 1.1 * axes.dataLim.ymax or 1)  # a flat line is flat, and on the page
        axes.set_ylabel(label, fontsize=9)
        axes.grid(color="#E5E5E5", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
    lines = {line.get_label(): line for axes in rows for line in axes.lines}
    if len(lines) > 1:
        rows[0].legend(lines.values(), lines.keys(), frameon=False, fontsize=8, ncols=3, loc="lower right")
    rows[0].set_title(title)
    drawn = bool(train) and "generated" in train[-1]
    rows[-1].set_xlabel("samples drawn so far" if drawn else "examples learnt from so far")
    rows[-1].xaxis.set_major_formatter(lambda value, place: f"{value:,.0f}")
    figure.savefig(path)


def _train(records: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], dict[int, int]]:
    """The records that are shown, and how many samples had been drawn, or examples learnt from, by each step."""
    train = [record for record in records if record["split"] == "train"]
    if drawn := [record for record in train if "generated" in record]:
        return drawn, {record["step"]: record["generated"] for record in drawn}
    learnt = [record for record in train if any(name in record for name in LEARNT)]
    return learnt, {record["step"]: record.get("samples", 0) for record in learnt}


def _samples_at(samples: Mapping[int, int], step: int) -> float:
    """Of any step: every step has as many."""
    near = min(samples, key=lambda known: abs(known - step))
    return samples[near] * step / near


def _panels(train: Sequence[Mapping[str, Any]], held_out: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Metrics that are drawn, and their labels: also the parts of a reward where they say more than the sum."""
    names = [name for name in train[-1] if name.startswith("reward/")] if train else []
    parts = {
        name: f"{name.partition('/')[2].replace('_', ' ')}\n(part of the reward)"
        for name in names
        if not all(_alike(record.get(name), record.get("reward")) for record in train)
    }
    known = {"reward": PANELS["reward"], **parts, **PANELS, **LEARNT}
    return {name: label for name, label in known.items() if any(name in each for each in (*train, *held_out))}


def _alike(one: float | None, other: float | None) -> bool:
    return one == other if one is None or other is None else math.isclose(one, other, rel_tol=1e-5, abs_tol=1e-9)


def _smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Each as the mean of the fifteenth of all points around it."""
    half = max(len(points) // 30, 1)
    found = []
    for place, (at, _) in enumerate(points):
        near = [value for _, value in points[max(place - half, 0) : place + half + 1]]
        found.append((at, sum(near) / len(near)))
    return found
