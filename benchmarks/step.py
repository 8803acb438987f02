"""What does a Trainer add to a step? Against a tuned loop by hand, Lightning Fabric and Accelerate, side by side.

    python benchmarks/step.py [--quick] [--counts-only] [--rounds N] [--json FILE] [--markdown FILE]

Exits with 1 where a goal that no other load on the machine can move is missed: losses and weights equal by hand and
by ours bit for bit, Python calls, collectives, host syncs. Times are shown and judged by eye.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ranks import read_case, run_ranks, write_found
from report import Machine, facts_in_words, ratio, table, write

from unitrain import World
from unitrain.world import STARTERS

HERE = Path(__file__).parent
HAND, OURS = "by hand", "unitrain"
MOST_EXTRA_CALLS, CPU_GOAL = 30, 1.05
RANKS = {"single": 1, "ddp": 2, "fsdp2": 2}
# (size, strategy) -> steps of one timed block: some tens of milliseconds, so that what else runs meets all loops alike
BLOCKS = {
    ("tiny", "single"): 60,
    ("tiny", "ddp"): 16,
    ("tiny", "fsdp2"): 6,
    ("small", "single"): 3,
    ("small", "ddp"): 2,
    ("small", "fsdp2"): 1,
}
CHECKED_STEPS = 40  # whose losses must be equal; they also warm up
TIMEOUT_SECONDS = 1200


@dataclass(frozen=True, kw_only=True)
class Case:
    """One group of processes that runs all loops in turn."""

    size: str
    strategy: str
    rounds: int  # 0: counts only
    peers: bool


def main() -> int:
    """Run the cases, print the table; 1 where a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100, help="rounds of timed blocks, each loop twice a round")
    parser.add_argument("--quick", action="store_true", help="the tiny model and 10 rounds")
    parser.add_argument("--counts-only", action="store_true", help="the tiny model, no times, no other libraries")
    parser.add_argument("--sizes", nargs="+", choices=("tiny", "small"), default=None)
    parser.add_argument("--strategies", nargs="+", choices=tuple(RANKS), default=tuple(RANKS))
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    known = parser.parse_args()
    few = known.quick or known.counts_only
    sizes = known.sizes or (["tiny"] if few else ["tiny", "small"])
    rounds = 0 if known.counts_only else min(known.rounds, 10) if known.quick else known.rounds

    machine, rows = Machine(), []
    for size in sizes:
        for strategy in known.strategies:
            case = Case(size=size, strategy=strategy, rounds=rounds, peers=not known.counts_only)
            rows += run_case(case)
    facts = {**machine.facts(), "rounds": rounds}
    missed = [problem for row in rows for problem in problems(row)]
    text = f"{facts_in_words(facts)}- rounds: {rounds}\n\n{_table(rows)}\n{_verdict(missed)}"
    print(text, end="")
    if known.json:
        write(known.json, {"facts": facts, "rows": rows, "missed": missed})
    if known.markdown:
        write(known.markdown, f"# The cost of a step, CPU\n\n{text}")
    return 1 if missed else 0


def run_case(case: Case) -> list[dict[str, Any]]:
    """One row for each loop, from ranks that our own agent starts."""
    ranks = run_ranks(
        "step:measure",
        asdict(case),
        strategy=case.strategy,
        ranks=RANKS[case.strategy],
        timeout_seconds=TIMEOUT_SECONDS,
        PYTHONHASHSEED="0",
    )
    return [_row(case, name, ranks) for name in ranks[0]]


def measure(arguments: list[str]) -> int:
    """One rank's part: run every loop, write down what it gave and what it took."""
    folder = Path(arguments[0])
    case, world = Case(**read_case(folder)), World.from_environment()
    if world.size == 1:
        for name in STARTERS["torchrun"].values():
            os.environ.pop(name, None)  # else Accelerate would wrap one rank for several
    found = _measured(case, world, folder)
    write_found(folder, world.rank, found)
    return 0


@contextlib.contextmanager
def _no_questions() -> Iterator[None]:
    """Ranks ask each other about five times a second whether to stop: no cost of a step, and no fixed share of one."""
    from unitrain.stopping import Agreement

    stop = Agreement.stop
    Agreement.stop = lambda agreement, step, caught: caught
    try:
        yield
    finally:
        Agreement.stop = stop


def _measured(case: Case, world: World, folder: Path) -> dict[str, dict[str, Any]]:
    import torch
    import torch.distributed as dist
    from counts import count_step
    from loops import make_loops

    loops = make_loops(case.size, case.strategy, world, folder / "run", peers=case.peers)
    found: dict[str, dict[str, Any]] = {}
    for name, loop in loops.items():
        losses: list[torch.Tensor] = []
        loop.advance(CHECKED_STEPS, losses)
        found[name] = {"losses": loop.global_losses(losses)}
    with _no_questions():
        for name, loop in loops.items():
            found[name]["counts"] = asdict(count_step(loop.advance))
    found_times = _times(case, loops, dist.barrier if world.size > 1 else lambda: None) if case.rounds else {}
    for name, loop in loops.items():
        pairs = zip(loop.params(), loops[HAND].params(), strict=True)
        found[name]["same_weights"] = all(torch.equal(param, by_hand) for param, by_hand in pairs)
        found[name]["times"] = found_times.get(name, [])
    for loop in reversed(loops.values()):  # ours closes the process group
        loop.close()
    return found


def _times(case: Case, loops: Mapping[str, Any], meet: Any) -> dict[str, list[list[float]]]:
    """(CPU seconds, wall seconds) a step of each round, every loop twice a round: forwards, then backwards."""
    steps = BLOCKS[case.size, case.strategy]
    gc.collect()
    gc.freeze()
    times: dict[str, list[list[float]]] = {name: [] for name in loops}
    for _ in range(case.rounds):
        totals = {name: [0.0, 0.0] for name in loops}
        for name in (*loops, *reversed(list(loops))):
            meet()
            cpu, wall = time.process_time(), time.perf_counter()
            loops[name].advance(steps)
            totals[name][0] += (time.process_time() - cpu) / (2 * steps)
            totals[name][1] += (time.perf_counter() - wall) / (2 * steps)
        for name, total in totals.items():
            times[name].append(total)
    return times


def _row(case: Case, name: str, ranks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What all ranks found of one loop; counts are rank 0's, CPU time is all ranks' together."""
    mine, by_hand = [rank[name] for rank in ranks], [rank[HAND] for rank in ranks]
    row: dict[str, Any] = {
        "size": case.size,
        "strategy": case.strategy,
        "ranks": len(ranks),
        "loop": name,
        "counts": mine[0]["counts"],
        "by_hand_counts": by_hand[0]["counts"],
        "last_checked_loss": mine[0]["losses"][-1],
        "bit_equal": all(m["losses"] == b["losses"] and m["same_weights"] for m, b in zip(mine, by_hand, strict=True)),
    }
    if case.rounds:
        cpu, cpu_by_hand = _summed(mine, 0), _summed(by_hand, 0)
        wall, wall_by_hand = _column(mine[0], 1), _column(by_hand[0], 1)
        row |= {
            "cpu_microseconds": 1e6 * statistics.median(cpu),
            "wall_microseconds": 1e6 * statistics.median(wall),
            "cpu_ratio": ratio(cpu, cpu_by_hand),
            "wall_ratio": ratio(wall, wall_by_hand),
        }
    return row


def _column(found: Mapping[str, Any], column: int) -> list[float]:
    return [pair[column] for pair in found["times"]]


def _summed(found: Sequence[Mapping[str, Any]], column: int) -> list[float]:
    return [sum(values) for values in zip(*(_column(rank, column) for rank in found), strict=True)]


def problems(row: Mapping[str, Any]) -> list[str]:
    """Which goals a row of ours misses, of those that hold on any machine under any load."""
    if row["loop"] != OURS:
        return []
    where = f"{row['size']} {row['strategy']}"
    mine, by_hand = row["counts"], row["by_hand_counts"]
    found = []
    if not row["bit_equal"]:
        found.append(f"{where}: losses or weights differ from the loop by hand, so the row is void")
    extra = mine["calls"] - by_hand["calls"]
    if extra > MOST_EXTRA_CALLS:
        found.append(f"{where}: {extra:+.0f} Python calls a step, at most +{MOST_EXTRA_CALLS}")
    if mine["collectives"] != by_hand["collectives"]:
        found.append(f"{where}: collectives {mine['collectives']}, by hand {by_hand['collectives']}")
    if mine["host_syncs"]:
        found.append(f"{where}: {mine['host_syncs']:g} host syncs a step, none allowed")
    return found


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    timed = "cpu_ratio" in rows[0]
    head = ["model", "strategy", "ranks", "loop", "calls", "operators", "collectives", "host syncs", "same bits"]
    if timed:
        head += ["CPU us", "CPU ratio", "95 %", "wall us", "wall ratio", "95 %"]
    return table(head, [_cells(row, timed) for row in rows])


def _cells(row: Mapping[str, Any], timed: bool) -> list[str]:
    counts, by_hand = row["counts"], row["by_hand_counts"]
    reference = row["loop"] == HAND

    def counted(name: str) -> str:
        return f"{counts[name]:.0f}" if reference else f"{counts[name] - by_hand[name]:+.0f}"

    cells = [row["size"], row["strategy"], str(row["ranks"]), row["loop"], counted("calls"), counted("operators")]
    cells += [f"{sum(counts['collectives'].values()):g}", f"{counts['host_syncs']:g}"]
    cells.append("yes" if row["bit_equal"] else "NO")
    for clock in ("cpu", "wall") if timed else ():
        middle, low, high = row[f"{clock}_ratio"]
        cells.append(f"{row[f'{clock}_microseconds']:.0f}")
        cells += ["1", ""] if reference else [f"{middle:.3f}", f"{low:.2f}-{high:.2f}"]
    return cells


def _verdict(missed: Sequence[str]) -> str:
    goals = f"at most +{MOST_EXTRA_CALLS} calls, the collectives of the loop by hand, no host sync, the same bits"
    if not missed:
        return f"Goals met: {goals}. For times: CPU ratio at most {CPU_GOAL}.\n"
    return "Goals missed:\n" + "".join(f"- {problem}\n" for problem in missed)


if __name__ == "__main__":
    sys.exit(main())
