"""What one step of a loop costs whatever else the machine does: Python calls, operators, collectives, host syncs."""

from __future__ import annotations

import cProfile
import pstats
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.profiler import ProfilerActivity, profile

SHORT, LONG, REPEATS = 10, 30, 3
TRACED_STEPS = 4
# Operators whose result the host must see before it can go on. `_local_scalar_dense` is behind item(), float(), bool().
WAITING = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal")
# On CPU these read memory without an operator, and only the call is seen.
WAITING_METHODS = ("tolist", "numpy", "cpu")


@dataclass(frozen=True)
class Counts:
    """Per step."""

    calls: float  # of Python and C functions, on the main thread
    operators: float  # that Python, or autograd, asked for; on a GPU each is a kernel or more
    collectives: dict[str, float]
    host_syncs: float


def count_step(advance: Callable[[int], None]) -> Counts:
    """Counts of a loop of which `advance(n)` runs n more steps."""
    short, long = _profiles(advance, SHORT), _profiles(advance, LONG)
    operators, collectives, waits = _trace(advance)
    methods = _method_calls(long) - _method_calls(short)
    return Counts(
        calls=_slope(_calls(short), _calls(long)),
        operators=operators,
        collectives=collectives,
        host_syncs=waits + methods / (LONG - SHORT),
    )


def _profiles(advance: Callable[[int], None], steps: int) -> pstats.Stats:
    """The profile with the fewest calls: a loader that is behind makes its taker wait, by some calls more."""
    found = []
    for _ in range(REPEATS):
        profiler = cProfile.Profile()
        profiler.enable()
        advance(steps)
        profiler.disable()
        found.append(pstats.Stats(profiler))
    return min(found, key=_calls)


def _calls(stats: pstats.Stats) -> int:
    return sum(entry[1] for entry in _entries(stats).values())


def _method_calls(stats: pstats.Stats) -> int:
    """Calls of tensor methods that wait for the device."""
    names = tuple(f"<method '{method}' of 'torch._C.TensorBase' objects>" for method in WAITING_METHODS)
    return sum(entry[1] for (_, _, name), entry in _entries(stats).items() if name in names)


def _entries(stats: pstats.Stats) -> dict[tuple[str, int, str], tuple[Any, ...]]:
    """(file, line, function) -> (primitive calls, calls, ...)."""
    entries: dict[tuple[str, int, str], tuple[Any, ...]] = stats.stats  # type: ignore[attr-defined]  # set by the constructor
    return entries


def _slope(short: int, long: int) -> float:
    """What a step adds, without what every run costs once."""
    return (long - short) / (LONG - SHORT)


def _trace(advance: Callable[[int], None]) -> tuple[float, dict[str, float], float]:
    """(operators, collectives by name, waiting operators) of a step, from torch's profiler.

    A collective is an operator of c10d, whoever starts it: Python, DDP's reducer or FSDP2's hooks.
    """
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        advance(TRACED_STEPS)
    events = trace.events() or []
    asked = [event for event in events if event.name.startswith("aten::") and not _inside_operator(event)]
    collectives = Counter(event.name for event in events if event.name.startswith("c10d::"))
    waits = sum(event.name in WAITING and not _inside_kernel(event) for event in events)
    by_name = {name.removeprefix("c10d::"): count / TRACED_STEPS for name, count in sorted(collectives.items())}
    return len(asked) / TRACED_STEPS, by_name, waits / TRACED_STEPS


def _inside_operator(event: Any) -> bool:
    """Whether another operator called this one."""
    return any(name.startswith("aten::") for name in _callers(event))


def _inside_kernel(event: Any) -> bool:
    """Whether it is a CPU kernel that reads a scalar, as the fused ones do: on a GPU nothing waits there."""
    return any(name.startswith("aten::") and name not in ("aten::item", "aten::is_nonzero") for name in _callers(event))


def _callers(event: Any) -> list[str]:
    names = []
    while (event := event.cpu_parent) is not None:
        names.append(event.name)
    return names
