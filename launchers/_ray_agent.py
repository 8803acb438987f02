"""The agent of a node as a child of the Ray actor that holds the node: it is gone when the actor is.

`python -m unitrain.launchers._ray_agent PARENT_PID RUN_DIR ...` runs `python -m unitrain.agent RUN_DIR ...`.
"""

from __future__ import annotations

import signal
import sys

from unitrain.agent.__main__ import main as run_agent
from unitrain.agent.rank import die_with
from unitrain.agent.signals import STOPPING


def main() -> int:
    """Run the agent; its exit code."""
    # SIGKILL: a node that is lost must not tell the others to stop, as its agent would after SIGTERM.
    die_with(int(sys.argv.pop(1)), signal.SIGKILL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)  # Ray blocks SIGINT in all that it starts
    for number in STOPPING:
        signal.signal(number, signal.SIG_DFL)
    sys.argv.append("--detached")  # or the kernel would send SIGTERM instead
    return run_agent()


if __name__ == "__main__":
    sys.exit(main())
