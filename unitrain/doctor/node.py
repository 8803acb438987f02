"""What one rank of the doctor's job does: `launcher.options.entry=unitrain.doctor.node:main`, by any launcher.

The first rank leaves RUN_DIR/doctor.json, and the same in its log, for whoever does not see the folder. A check that
fails is no failure of the job.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..agent.records import hostname, read_record, write_record
from ..capsule import versions
from ..errors import ExitCode, UnitrainError
from ..meeting import Meeting
from ..world import World
from . import between
from .finding import Finding, failed
from .machine import judge, look

REPORT = "doctor.json"
ENTRY = "unitrain.doctor.node:main"
MARK = "unitrain doctor: "  # begins the line of the log
MEET_SECONDS = 60.0


def main(arguments: Sequence[str]) -> int:
    """Look, and say it; the arguments are the run's folder."""
    run_dir, world = Path(arguments[0]), World.from_environment()
    own = judge(look(run_dir), world.nodes) if world.local_rank == 0 else []
    try:
        findings = _together(world, run_dir, own)
    except UnitrainError as error:
        fix = "see the logs of all ranks; a firewall between the nodes is the usual cause"
        findings = [[replace(one, node=hostname()) for one in (*own, failed("meeting", str(error), fix))]]
    _leave(world, run_dir, findings)
    return ExitCode.DONE


def _together(world: World, run_dir: Path, own: list[Finding]) -> list[list[Finding]]:
    """The findings of every rank, on every rank."""
    with contextlib.closing(Meeting(world, timeout=MEET_SECONDS)) as meeting:
        everyone = meeting.gather({"host": hostname(), "local_rank": world.local_rank, "versions": versions()})
        hosts = [one["host"] for one in everyone]
        nodes = {rank: one["host"] for rank, one in enumerate(everyone) if one["local_rank"] == 0}
        here = [*own]
        if world.rank in nodes:
            here += between.names_resolve(hosts, hostname())
        here += between.folder_is_shared(meeting, run_dir, nodes)
        here += between.ports_reach(meeting, nodes)
        mine = [replace(finding, node=hostname()) for finding in here]
        if world.first:
            mine += between.versions_agree([(one["host"], one["versions"]) for one in everyone])
        mine += between.clocks_agree(meeting, hosts)
        mine += between.ranks_sum(meeting)
        gathered = meeting.gather([asdict(finding) for finding in mine])
    return [[Finding.from_json(values) for values in findings] for findings in gathered]


def _leave(world: World, run_dir: Path, findings: Sequence[Sequence[Finding]]) -> None:
    """The first rank's report is of all; what others leave counts where there is none."""
    if world.first or len(findings) == 1:
        values = {"findings": [asdict(finding) for one in findings for finding in one]}
        write_record(run_dir / (REPORT if world.first else f"{world.rank}-{REPORT}"), **values)
        print(f"{MARK}{json.dumps(values)}", flush=True)


def read_report(run_dir: Path, log: Callable[[], Iterable[str]]) -> list[Finding]:
    """What the ranks have left in the folder, else in the first one's log; nothing where none came so far."""
    records: list[dict[str, Any]] = [
        record for path in sorted(run_dir.glob(f"*{REPORT}")) if (record := read_record(path)) is not None
    ]
    if not records:
        with contextlib.suppress(UnitrainError):  # there is no log either
            records = [json.loads(line.removeprefix(MARK)) for line in log() if line.startswith(MARK)]
    return [Finding.from_json(values) for record in records for values in record["findings"]]
