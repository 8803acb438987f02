"""What runs at the far end of an ssh connection: it looks around, starts the node's agent, and ends with it.

`python -m unitrain.launchers._ssh_host RUN_DIR --node N [--meet HOST:PORT]` says hello and does what it is asked, one
JSON object a line (see `_ssh_team`). Values of variables come this way too: never as arguments, which anybody can read.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import select
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from unitrain import __version__
from unitrain.agent.records import Process, hostname, read_record, write_record
from unitrain.agent.signals import STOPPING, SignalPipe
from unitrain.errors import UserError

FOLDER = "ssh"  # in the run's folder
MARK = "\x1eunitrain "  # begins what is for the other end; shells greet and warn, and that is passed over
IDLE_SECONDS = 300.0  # without a request, before an agent is started
SEEN_SECONDS = 5.0  # a new file may take that long to be seen on another host
KILL_MARGIN_SECONDS = 10.0  # that an agent gets beyond the grace of its ranks
_POLL_SECONDS, _TICK_SECONDS = 0.05, 0.5


def main() -> int:
    """Do what is asked until nobody asks any more; the agent's exit code where one was started."""
    parser = argparse.ArgumentParser(prog="python -m unitrain.launchers._ssh_host", description=__doc__)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--node", type=int, required=True)
    parser.add_argument("--meet", metavar="HOST:PORT")
    known = parser.parse_args()
    end = FarEnd(known.run_dir, known.node, known.meet)
    with SignalPipe((*STOPPING, signal.SIGCHLD)) as signals:
        return end.run(signals)


class FarEnd:
    """One node of a run, as seen from its host."""

    def __init__(self, run_dir: Path, node: int, meet: str | None) -> None:
        self.run_dir, self.node, self.meet = run_dir, node, meet
        self._unread = b""
        self._asked: list[dict[str, Any]] = []  # and not yet done
        self._record = run_dir / FOLDER / f"agent-{node}.json"

    def run(self, signals: SignalPipe) -> int:
        """Answer requests; once the agent is started, stay with it."""
        _tell(hello=hostname(), version=__version__, python=platform.python_version())
        while True:
            readable, _, _ = select.select([0, signals.fd], [], [], IDLE_SECONDS)
            if signals.fd in readable and any(number in STOPPING for number in signals.caught()):
                return 128 + signal.SIGTERM
            if not readable:
                return 0  # the other end is gone, and nobody has told
            if 0 not in readable:
                continue
            data = os.read(0, 65536)
            if not data:
                return 0
            self._hear(data)
            while self._asked:
                request = self._asked.pop(0)
                match request.get("do"):
                    case "check":
                        _tell(checked=self._check(request))
                    case "ask":
                        process = self._agent()
                        _tell(agent=None if process is None else process.pid)
                    case "stop":
                        _tell(stopped=self._stop(float(request["seconds"])))
                    case "start":
                        agent = self._start(request)
                        if request["detached"]:
                            return 0
                        return self._stay(agent, request, signals)

    def _hear(self, data: bytes) -> None:
        """Empty lines only say that somebody is there."""
        *lines, self._unread = (self._unread + data).split(b"\n")
        self._asked += [json.loads(line) for line in lines if line.strip()]

    def _check(self, request: dict[str, Any]) -> str:
        """What keeps an agent from starting here; empty where nothing does."""
        nonce, deadline = self.run_dir / FOLDER / "nonce", time.monotonic() + SEEN_SECONDS
        while True:
            try:
                seen = nonce.read_text()
            except OSError as error:
                seen, why = "", f"cannot read {nonce}: {error.strerror}"
            else:
                why = f"has another {self.run_dir} of its own"
            if seen == request["nonce"]:
                break
            if time.monotonic() > deadline:
                return f"{why}; the run's folder must be on a file system that all hosts share, under the same path"
            time.sleep(_POLL_SECONDS)
        try:
            (self.run_dir / FOLDER / f"seen-{self.node}").write_text(seen)
        except OSError as error:
            return f"cannot write to {self.run_dir}: {error.strerror}"
        if not os.access(request["folder"], os.X_OK):
            return f"has no folder {request['folder']}; say where to work by launcher.options.folder"
        if (agent := self._agent()) is not None:
            return f"still runs an agent of this run (pid {agent.pid}); end it by `unitrain cancel {self.run_dir}`"
        return self._cannot_meet()

    def _cannot_meet(self) -> str:
        if self.meet is None:
            return ""
        address, _, port = self.meet.rpartition(":")
        try:
            socket.getaddrinfo(address.strip("[]"), int(port), type=socket.SOCK_STREAM)
        except OSError as error:
            return (
                f"does not know {address}, where all nodes meet ({error.strerror}); give the first host's address by "
                "launcher.options.address"
            )
        if self.node == 0:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind(("", int(port)))
                    probe.listen()
                except OSError as error:
                    return f"cannot listen at port {port} ({error.strerror}); set launcher.options.port"
        return ""

    def _agent(self) -> Process | None:
        """The node's agent, while it lives."""
        try:
            record = read_record(self._record)
            process = None if record is None else Process(**record)
        except (UserError, TypeError, ValueError):
            return None  # torn: nobody wrote it to its end
        return process if process is not None and process.alive else None

    def _start(self, request: dict[str, Any]) -> subprocess.Popen[bytes]:
        detached = bool(request["detached"])
        meet = [] if self.meet is None else ["--meet", self.meet]
        command = [sys.executable, "-m", "unitrain.agent", str(self.run_dir), "--node", str(self.node), *meet]
        with contextlib.ExitStack() as stack:
            output: Any = None
            if detached or self.node > 0:  # the first node's output goes to who launched
                output = stack.enter_context((self.run_dir / "logs" / f"agent-{self.node}.log").open("ab"))
            agent = subprocess.Popen(
                [*command, *(["--detached"] if detached else [])],
                env={**os.environ, **request["environment"]},
                cwd=request["folder"],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # its signals come from us, not from a session's end
            )
        process = Process.of(agent.pid)
        write_record(self._record, **asdict(process))
        _tell(started=agent.pid)
        return agent

    def _stay(self, agent: subprocess.Popen[bytes], request: dict[str, Any], signals: SignalPipe) -> int:
        """Pass signals on until the agent ends; its exit code.

        The first node's agent is stopped when the other end is gone or silent for too long, and all others stop with
        it: they need not be told, and a lost connection to one of them harms nobody.
        """
        silence, patience = float(request["silence_seconds"]), float(request["grace_seconds"]) + KILL_MARGIN_SECONDS
        heard, kill_at, listening = time.monotonic(), float("inf"), True

        def stop(number: int) -> None:
            nonlocal kill_at
            agent.send_signal(number)
            kill_at = min(kill_at, time.monotonic() + patience)

        while agent.poll() is None:
            wait = 0 if self._asked else _TICK_SECONDS
            readable, _, _ = select.select([0, signals.fd] if listening else [signals.fd], [], [], wait)
            for number in signals.caught() if signals.fd in readable else []:
                if number in STOPPING:
                    stop(number)
            if 0 in readable:
                data = os.read(0, 65536)
                heard = time.monotonic()
                self._hear(data)
                listening = bool(data)
            while self._asked:
                asked = self._asked.pop(0)
                if asked.get("do") == "signal":
                    stop(int(asked["number"]))
            if self.node == 0 and kill_at == float("inf") and not (listening and time.monotonic() < heard + silence):
                stop(signal.SIGTERM)
            if time.monotonic() > kill_at:
                agent.kill()
        code = agent.wait()
        return code if code >= 0 else 128 - code

    def _stop(self, seconds: float) -> int | None:
        """End the node's agent and wait until it is gone; its pid, or None where there was none."""
        agent = self._agent()
        if agent is None:
            return None
        deadline = time.monotonic() + seconds
        with contextlib.suppress(ProcessLookupError):
            os.kill(agent.pid, signal.SIGTERM)
            while agent.alive:
                if time.monotonic() > deadline:
                    os.kill(agent.pid, signal.SIGKILL)
                    deadline = float("inf")
                time.sleep(_POLL_SECONDS)
        return agent.pid


def _tell(**message: Any) -> None:
    """To the other end. Whatever else is written there is not for it."""
    os.write(1, f"{MARK}{json.dumps(message)}\n".encode())


if __name__ == "__main__":
    sys.exit(main())
