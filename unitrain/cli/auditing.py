"""`unitrain audit` and `unitrain repro`: what a run's own records prove, and a failure of it once more."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import ExitCode
from .runs import Name, counted


def audit(name: Name) -> None:
    """Prove from a run's records that every sample was used exactly once.

    Ends with 70 where a sample was repeated or left out, or where the records themselves are damaged.
    """
    from ..audit import audit as prove
    from ..run import Run

    found = prove(Run.open(name))
    print(f"{'epoch':>5}  {'used once':>10}  {'repeated':>8}  {'missing':>8}  {'skipped':>8}  {'to come':>8}")
    for epoch in found.epochs:
        print(
            f"{epoch.number:>5}  {epoch.once:>10}  {epoch.repeated:>8}  {epoch.missing:>8}  {epoch.skipped:>8}  "
            f"{epoch.to_come:>8}"
        )
    worlds = ", ".join(
        f"{attempt.strategy} {attempt.world_size} from step {attempt.step}" for attempt in found.attempts
    )
    print(f"{counted(found.steps, 'durable step')}, {found.redone} taken back, {counted(found.rollbacks, 'rollback')}")
    print(f"{counted(len(found.attempts), 'attempt')}: {worlds}")
    for problem in found.problems:
        print(f"problem: {problem}")
    print("every sample was used exactly once" if found.clean else "the records do not prove it")
    if not found.clean:
        raise typer.Exit(ExitCode.FAILED)


def repro(
    capsule: Annotated[Path, typer.Argument(metavar="RUN/failures/NNNN", help="The folder of a failure.")],
    strategy: Annotated[str, typer.Option("--strategy", metavar="NAME", help="On which backend.")] = "single",
) -> None:
    """Train up to a failed step again, in one process, and see whether it fails in the same way.

    Ends with 0 where the same exception comes with the same message, and with 70 where it does not.
    """
    from ..repro import reproduce

    found = reproduce(capsule, strategy)
    print(found.words, flush=True)
    if not found.same:
        raise typer.Exit(ExitCode.FAILED)
