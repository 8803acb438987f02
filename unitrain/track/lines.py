"""Records of metrics.jsonl as lines for people."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

# said in a place of their own, or not worth a person's line
_KNOWN = frozenset({
    "step", "split", "loss", "lr", "grad_norm", "samples", "tokens", "seconds", "samples_per_second",
    "tokens_per_second", "memory_bytes", "mfu", "weight", "applied", "skipped",
    "approx_kl", "ratio", "kl_loss", "kl_coef", "gap", "gap_max", "generated", "ended",
    "importance", "staleness", "staleness_max", "dropped", "replaced", "generate_seconds", "generating_seconds",
    "reward_seconds", "sync_seconds", "logprobs_seconds", "update_seconds",
})  # fmt: skip


def progress_line(record: Mapping[str, Any], steps: int) -> str:
    """`step  10/300  loss 3.2145  lr 9.5e-04  norm 1.23  21.3k tok/s  mfu 41%  mem 412 MB  eta 0:42`."""
    width = len(str(steps))
    parts = [f"step {record['step']:>{width}}/{steps}", f"loss {number(record['loss'])}"]
    parts += [f"{name} {number(value)}" for name, value in metrics(record).items()]
    if "lr" in record:
        parts.append(f"lr {rate(record['lr'])}")
    if "grad_norm" in record:
        parts.append(f"norm {short(record['grad_norm'])}")
    if skipped(record):
        parts.append("update skipped")
    if speed := throughput(record):
        parts.append(speed)
    if record.get("mfu"):
        parts.append(f"mfu {record['mfu']:.0%}")
    if record.get("memory_bytes"):
        parts.append(f"mem {size(record['memory_bytes'])}")
    if left := seconds_left(record, steps):
        parts.append(f"eta {duration(left)}")
    return "  ".join(parts)


def evaluation_line(record: Mapping[str, Any]) -> str:
    """`eval step 100  loss 2.3450  accuracy 0.4100`."""
    parts = [f"eval step {record['step']}"]
    if "loss" in record:
        parts.append(f"loss {number(record['loss'])}")
    return "  ".join(parts + [f"{name} {number(value)}" for name, value in metrics(record).items()])


def metrics(record: Mapping[str, Any]) -> dict[str, float | None]:
    """What the loss function reported besides the loss: accuracy and its like."""
    return {
        name: value
        for name, value in record.items()
        if name not in _KNOWN and (value is None or (isinstance(value, int | float) and not isinstance(value, bool)))
    }


def skipped(record: Mapping[str, Any]) -> bool:
    """True when the gradient was not finite, so that no rank moved."""
    return bool(record.get("applied", 1) == 0)


def throughput(record: Mapping[str, Any]) -> str:
    """Tokens a second, or samples where there are no tokens; empty where unknown."""
    for key, unit in (("tokens_per_second", "tok/s"), ("samples_per_second", "samples/s")):
        if record.get(key):
            return f"{quantity(record[key])} {unit}"
    return ""


def seconds_left(record: Mapping[str, Any], steps: int) -> float | None:
    """Seconds to the last step at the speed of the record; None where the record does not tell."""
    speed, samples, step = record.get("samples_per_second"), record.get("samples"), record["step"]
    if not speed or not samples or not step:
        return None
    return float((steps - step) * samples / step / speed)


def number(value: float | None) -> str:
    """Four decimals, or an exponent where they would say little; null, which stands for them in JSON, is `nan`."""
    if value is None or not math.isfinite(value):
        return _odd(value)
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:.3e}"


def short(value: float | None) -> str:
    """Three digits of a size: `1.23`, `12.3`, `4.6e-04`."""
    if value is None or not math.isfinite(value):
        return _odd(value)
    return _three(value) if value == 0 or 0.01 <= value < 1e4 else f"{value:.1e}"


def rate(value: float | None) -> str:
    """A learning rate: `9.5e-04`."""
    return "nan" if value is None else f"{value:.1e}"


def quantity(value: float) -> str:
    """`21.3k`, `1.20M`: three digits and a suffix."""
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit * 0.9995:
            return f"{_three(value / limit)}{suffix}"
    return _three(value)


def size(num_bytes: float) -> str:
    """Bytes in MB or GB of 10^6 and 10^9 bytes."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"


def duration(seconds: float) -> str:
    """`0:42`, `12:05`, `3:07:00`, `2d 04:10`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02}:{minutes:02}"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def sparkline(values: list[float | None], width: int) -> str:
    """The newest `width` values as a row of bars, the highest full; a gap for what is no number."""
    newest = values[-width:] if width > 0 else []
    finite = [value for value in newest if value is not None and math.isfinite(value)]
    if not finite:
        return ""
    low, span = min(finite), max(finite) - min(finite)
    bars = "▁▂▃▄▅▆▇█"
    return "".join(
        " " if value is None or not math.isfinite(value) else bars[round((value - low) / span * 7) if span else 0]
        for value in newest
    )


def _odd(value: float | None) -> str:
    return "nan" if value is None else str(value)


def _three(value: float) -> str:
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
