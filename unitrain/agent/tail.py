"""Lines of one rank's log from a run's folder, for a launcher that reaches the folder only through a pod.

`python -m unitrain.agent.tail RUN_DIR RANK [--follow]`
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import UnitrainError
from .logs import find_log, log_lines, no_log
from .records import EXIT


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the lines, with `--follow` until the run has ended."""
    parser = argparse.ArgumentParser(prog="python -m unitrain.agent.tail", description=__doc__)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("rank", type=int, metavar="RANK")
    parser.add_argument("--follow", action="store_true", help="go on until the run ends")
    known = parser.parse_args(arguments)
    try:
        if not known.follow and find_log(known.run_dir, known.rank) is None:
            raise no_log(known.run_dir, known.rank)
        for line in log_lines(
            lambda: find_log(known.run_dir, known.rank),
            (known.run_dir / EXIT).exists,
            follow=known.follow,
        ):
            print(line, flush=known.follow)
    except UnitrainError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
