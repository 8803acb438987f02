"""Agents on several hosts, one ssh connection each: all looked at first, then started, and ended together.

`python -m unitrain.launchers._ssh_team RUN_DIR` does what ssh.json in the run's folder says.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import shlex
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from unitrain import __version__
from unitrain.agent.rank import die_with
from unitrain.agent.records import EXIT, append_event, read_record, write_exit
from unitrain.agent.screen import say
from unitrain.agent.signals import STOPPING, SignalPipe
from unitrain.errors import ExitCode, UnitrainError, UserError
from unitrain.launchers._hosts import chosen_variables
from unitrain.launchers._ssh_host import FOLDER, KILL_MARGIN_SECONDS, MARK, SEEN_SECONDS
from unitrain.world import environment

FILE = "ssh.json"  # in the run's folder: which command reaches which host, and what is agreed with it
ANSWER_SECONDS = 60.0  # beyond connecting: for Python to start there, from a slow disk
SETTLE_SECONDS = 5.0  # in which the agents of a run that is over end one after the other
_RETRY_SECONDS = (1.0, 2.0, 4.0, 8.0, 15.0)
_BEATS = 3  # in the time after which silence counts as the connection's end
_TAIL_BYTES = 4096
_TICK_SECONDS = 0.2
_SSH_FAILED = 255  # ssh's own exit code; all others are of what it ran


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What ssh.json holds."""

    hosts: Mapping[int, str]  # node -> host, for people
    commands: Mapping[int, tuple[str, ...]]  # node -> the command that reaches it
    folder: str
    environment: tuple[str, ...]
    detached: bool
    connect_seconds: float
    silence_seconds: float
    grace_seconds: float

    @classmethod
    def read(cls, run_dir: Path) -> Plan:
        """Raises UserError where a run's folder has none that can be used."""
        path = run_dir / FILE
        values = read_record(path)
        if values is None:
            raise UserError(f"{run_dir} has no {FILE}, so no launcher 'ssh' has started it")
        try:
            nodes: list[dict[str, Any]] = values["nodes"]
            return cls(
                hosts={node["node"]: str(node["host"]) for node in nodes},
                commands={node["node"]: tuple(shlex.split(node["command"])) for node in nodes},
                folder=str(values["folder"]),
                environment=tuple(values["environment"]),
                detached=bool(values["detached"]),
                connect_seconds=float(values["connect_seconds"]),
                silence_seconds=float(values["silence_seconds"]),
                grace_seconds=float(values["grace_seconds"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); launch the run anew") from error


class Connection:
    """One ssh to one host, and what its far end says."""

    def __init__(self, node: int, host: str, command: Sequence[str]) -> None:
        self.node, self.host, self.command = node, host, command
        self.answers: list[dict[str, Any]] = []
        self.asked_to_start = self.started = False
        self.code: int | None = None  # how ssh ended, once all that it said was read; None: it has not
        self.output: list[tuple[int, bytes]] = []  # of the agent: 1 or 2 for stdout or stderr, and what it printed
        self.error = b""  # the end of what ssh and the far end said on stderr
        self._unread = b""
        self._lock = threading.Lock()  # one thread says that we are alive, another what we want
        # A session of its own: the terminal's Ctrl-C is for us, and nothing can ask for a password.
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        assert self._process.stderr is not None
        self._stdin, self._out, self._err = self._process.stdin, self._process.stdout, self._process.stderr
        self.fds = [self._out.fileno(), self._err.fileno()]  # readable when there is news
        for fd in (self._stdin.fileno(), *self.fds):
            os.set_blocking(fd, False)

    @property
    def ended(self) -> bool:
        """True once ssh is gone and all that it said was read."""
        return self.code is not None

    @property
    def lost(self) -> bool:
        """True when ssh itself failed, and so nothing is known of the other end."""
        return self.code == _SSH_FAILED

    def tell(self, **request: Any) -> None:
        """Ask the far end for something. One that is gone is found out by reading."""
        self._write(json.dumps(request).encode() + b"\n")

    def beat(self) -> None:
        """Say that we are alive."""
        self._write(b"\n")

    def _write(self, data: bytes) -> None:
        with self._lock, contextlib.suppress(BrokenPipeError, BlockingIOError):
            if not self._stdin.closed:
                os.write(self._stdin.fileno(), data)

    def read(self) -> None:
        """Take in what has come."""
        for fd in list(self.fds):
            with contextlib.suppress(BlockingIOError):
                while data := os.read(fd, 65536):
                    self._take(fd == self._err.fileno(), data)
                self.fds.remove(fd)
        if not self.fds and self.code is None and self._process.poll() is not None:
            self._close(self._process.returncode)

    def _take(self, is_error: bool, data: bytes) -> None:
        if is_error:
            self.error = (self.error + data)[-_TAIL_BYTES:]
        if self.started:
            self.output.append((2 if is_error else 1, data))
        elif not is_error:
            self._hear(data)

    def _hear(self, data: bytes) -> None:
        """Take the far end's answers out of what its shell says; what follows the last is the agent's."""
        self._unread += data
        while not self.started and b"\n" in self._unread:
            line, _, self._unread = self._unread.partition(b"\n")
            _, mark, text = line.decode(errors="replace").rpartition(MARK)
            if mark:
                answer = json.loads(text)
                self.started = "started" in answer
                self.answers.append(answer)
        if self.started and self._unread:
            self.output.append((1, self._unread))

    def answer(self, name: str) -> Any:
        """The far end's answer of that name; None before it comes."""
        return next((answer[name] for answer in reversed(self.answers) if name in answer), None)

    def has(self, name: str) -> bool:
        """True when the far end has answered so."""
        return any(name in answer for answer in self.answers)

    def hang_up(self) -> None:
        """Let the far end know that nothing more will come: it ends its agent."""
        with self._lock, contextlib.suppress(BrokenPipeError):
            self._stdin.close()

    def end(self) -> None:
        """End ssh, and so the connection."""
        if not self.ended:
            self._process.kill()
            self._close(self._process.wait())

    def _close(self, code: int) -> None:
        self.hang_up()
        self._out.close()
        self._err.close()
        self.fds, self.code = [], code

    def why(self) -> str:
        """What went wrong with a connection that has ended before an agent ran: one sentence that names the host."""
        lines = [line for line in self.error.decode(errors="replace").splitlines() if line.strip()]
        said = lines[-1].strip() if lines else "it says nothing"
        text = "\n".join(lines)
        if self.code == _SSH_FAILED:
            for sign, what in _SSH_WORDS.items():
                if sign in text:
                    return f"{self.host} {what} (ssh: {said})"
            return f"{self.host} cannot be reached by ssh: {said}"
        if self.code in (126, 127):
            return f"{self.host} has no such Python ({said}); name one that it has by launcher.options.python"
        if "No module named" in text or "Error while finding module" in text:
            return f"{self.host} has no unitrain for its Python ({said}); install it, or set launcher.options.python"
        return f"{self.host} cannot start an agent: exit code {self.code}: {said}"


# a part of what ssh says -> what it means, for its exit code 255
_SSH_WORDS = {
    "Host key verification failed": "is not known to ssh here, or has another key than before; log in once by hand",
    "REMOTE HOST IDENTIFICATION HAS CHANGED": "has another key than before; log in once by hand",
    "Permission denied": "refuses the key; ssh must come in without a password",
    "Too many authentication failures": "refuses the keys; name one by launcher.options.identity",
    "Could not resolve hostname": "has no address that ssh knows",
}


def ask_all(
    plan: Plan, request: Mapping[str, Any], answer: str, *, seconds: float, nodes: Iterable[int] | None = None
) -> tuple[dict[int, Any], dict[int, str]]:
    """Ask the far end on every host for one thing: the answers by node, and why there is none from the others."""
    connections = [
        Connection(node, plan.hosts[node], plan.commands[node]) for node in (plan.hosts if nodes is None else nodes)
    ]
    try:
        for connection in connections:
            connection.tell(**request)  # it reads this after its hello
        failures = _gather(connections, answer, plan.connect_seconds + ANSWER_SECONDS + seconds)
        return {each.node: each.answer(answer) for each in connections if each.has(answer)}, failures
    finally:
        for connection in connections:
            connection.end()


def _gather(
    connections: Sequence[Connection], answer: str, seconds: float, interrupted: Callable[[], object] = lambda: None
) -> dict[int, str]:
    """Wait until every host has answered or failed; why, by node."""
    deadline = time.monotonic() + seconds
    failures: dict[int, str] = {}
    while waiting := [each for each in connections if not each.has(answer) and each.node not in failures]:
        interrupted()
        left = deadline - time.monotonic()
        select.select([fd for each in waiting for fd in each.fds], [], [], min(max(left, 0.0), _TICK_SECONDS))
        for connection in waiting:
            connection.read()
            if connection.ended and not connection.has(answer):
                failures[connection.node] = connection.why()
            elif left <= 0 and not connection.has(answer):
                failures[connection.node] = f"{connection.host} does not answer within {seconds:g} s"
    return failures


class Stopped(Exception):
    """A signal came before anything was started."""


class Team:
    """The agents of a run."""

    def __init__(self, run_dir: Path, plan: Plan, signals: SignalPipe) -> None:
        self.run_dir, self.plan, self._signals = run_dir, plan, signals
        self._variables = _variables(plan)
        self._nonce = secrets.token_hex(16)
        self._connections: dict[int, Connection] = {}
        self._stopping = False
        self._due: dict[int, float] = {}  # node -> when to try again to reach its host
        self._tries: dict[int, int] = {}  # that came to nothing since its agent ran
        self._missing: set[int] = set()  # nodes that had an agent and lost it
        self._over = threading.Event()

    def run(self) -> int:
        """Start all agents, or none, and stay with them; the run's exit code, or 0 once detached ones have started."""
        folder = self.run_dir / FOLDER
        folder.mkdir(exist_ok=True)
        (folder / "nonce").write_text(self._nonce)
        try:
            for node in self.plan.hosts:
                self._connect(node)
            threading.Thread(target=self._beat, daemon=True).start()
            self._start_all()
            return ExitCode.DONE if self.plan.detached else self._watch()
        finally:
            self._end_all()
            for path in (folder / "nonce", *(folder / f"seen-{node}" for node in self.plan.hosts)):
                path.unlink(missing_ok=True)

    # --- the start ---

    def _connect(self, node: int) -> None:
        connection = Connection(node, self.plan.hosts[node], self.plan.commands[node])
        self._connections[node] = connection
        connection.tell(do="check", nonce=self._nonce, folder=self.plan.folder)

    def _start_all(self) -> None:
        """Raises UnitrainError, with one line for each host that cannot; then no agent has started."""
        connections = list(self._connections.values())
        seconds = self.plan.connect_seconds + ANSWER_SECONDS
        failures = _gather(connections, "checked", seconds, self._look_for_signal)
        for connection in connections:
            if connection.node not in failures and (why := self._refusal(connection)):
                failures[connection.node] = why
        if failures:
            _raise(failures, "nothing was started")
        for connection in connections:
            self._start(connection)
        failures = _gather(connections, "started", ANSWER_SECONDS, self._look_for_signal)
        if failures:
            if self.plan.detached:
                ask_all(self.plan, {"do": "stop", "seconds": 0}, "stopped", seconds=0)
            _raise(failures, "the agents of the other hosts were ended")

    def _refusal(self, connection: Connection) -> str:
        """Why a host that has been looked at cannot take part; empty where it can."""
        version, problem = connection.answer("version"), connection.answer("checked")
        if version != __version__:
            problem = f"has unitrain {version}, and {__version__} launches; install the same everywhere"
        elif not problem and not _appears(self.run_dir / FOLDER / f"seen-{connection.node}", self._nonce):
            problem = f"writes to another {self.run_dir} than this machine; the run's folder must be shared"
        return f"{connection.host} {problem}" if problem else ""

    def _start(self, connection: Connection) -> None:
        connection.asked_to_start = True
        connection.tell(
            do="start",
            folder=self.plan.folder,
            environment=self._variables,
            detached=self.plan.detached,
            silence_seconds=self.plan.silence_seconds,
            grace_seconds=self.plan.grace_seconds,
        )

    def _look_for_signal(self) -> None:
        for number in self._signals.caught():
            if number in STOPPING:
                raise Stopped(number)

    # --- the run ---

    def _watch(self) -> int:
        """Until the first node's agent has ended, and the others with it."""
        first = self._connections[0]
        while not first.ended:
            self._tick()
            if not self._stopping:
                self._bring_back()
        if first.lost:
            say(f"the connection to {first.host} is lost; its agent ends and saves, if it can")
            self._hang_up()
            self._wait(lambda: self._all_ended() and self._exit_code() is not None, self._patience)
        else:
            self._wait(self._all_ended, SETTLE_SECONDS)  # the others end by themselves, at most a moment later
        return self._conclude(first)

    def _tick(self) -> None:
        """Wait a moment for anything to happen; pass on what is said, and signals."""
        fds = [fd for connection in self._connections.values() for fd in connection.fds]
        select.select([self._signals.fd, *fds], [], [], _TICK_SECONDS)
        for number in self._signals.caught():
            if number in STOPPING:
                self._stopping = True
                self._tell_all(number)
        for connection in self._connections.values():
            connection.read()
            for stream, data in connection.output if connection.node == 0 else ():
                _pass_on(stream, data)
            connection.output.clear()

    def _tell_all(self, number: int) -> None:
        """Signal all agents."""
        for connection in self._connections.values():
            connection.tell(do="signal", number=int(number))

    def _bring_back(self) -> None:
        """Start the agents of nodes again that were lost while the run goes on: the first node waits for them."""
        now = time.monotonic()
        for node, connection in list(self._connections.items()):
            if node == 0:
                continue
            if connection.ended:
                if node not in self._due:
                    self._due[node] = now + self._pause(connection)
                elif now >= self._due[node]:
                    del self._due[node]
                    self._note_lost(connection)
                    self._connect(node)
            elif connection.has("checked") and not connection.asked_to_start:
                if why := self._refusal(connection):
                    connection.error = why.encode()
                    connection.end()
                else:
                    self._start(connection)
            elif connection.started and node in self._missing:
                self._missing.remove(node)
                self._tries[node] = 0
                append_event(self.run_dir, "host_back", node=node, host=connection.host)
                say(f"{connection.host} is back")

    def _pause(self, connection: Connection) -> float:
        """Before the next try. An agent that ran gets the time in which the run would have ended by itself."""
        if connection.started:
            return SETTLE_SECONDS
        tries = self._tries[connection.node] = self._tries.get(connection.node, 0) + 1
        return _RETRY_SECONDS[min(tries, len(_RETRY_SECONDS)) - 1]

    def _note_lost(self, connection: Connection) -> None:
        if connection.node in self._missing:
            return
        self._missing.add(connection.node)
        how = "the connection to it is lost" if connection.lost else f"its agent ended with exit code {connection.code}"
        append_event(self.run_dir, "host_lost", node=connection.node, host=connection.host, error=how)
        say(f"{connection.host}: {how}; trying to start its agent again")

    # --- the end ---

    @property
    def _patience(self) -> float:
        """The longest that an agent may take to end after its connection has."""
        return self.plan.silence_seconds + self.plan.grace_seconds + KILL_MARGIN_SECONDS

    def _all_ended(self) -> bool:
        return all(connection.ended for connection in self._connections.values())

    def _hang_up(self) -> None:
        for connection in self._connections.values():
            connection.hang_up()

    def _wait(self, until: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not until() and time.monotonic() < deadline:
            self._tick()

    def _end_all(self) -> None:
        """Leave no connection, and no agent at the end of one."""
        self._over.set()
        started = [connection for connection in self._connections.values() if connection.asked_to_start]
        self._tell_all(signal.SIGTERM)
        self._hang_up()
        self._wait(lambda: all(connection.ended for connection in started), self._patience)
        for connection in self._connections.values():
            connection.end()

    def _exit_code(self) -> int | None:
        """What the run has left as its end."""
        ended = read_record(self.run_dir / EXIT)
        code = None if ended is None else ended.get("exit_code")
        return code if type(code) is int else None

    def _conclude(self, first: Connection) -> int:
        """The run's exit code, which is on record afterwards."""
        code = self._exit_code()
        if code is not None:
            return code
        if first.lost:
            code, error = (
                int(ExitCode.FAILED),
                f"the connection to {first.host} was lost, and its agent has told no end",
            )
            say(error)
        elif first.code in set(ExitCode) or self._stopping:
            code, error = int(first.code or 0), first.error.decode(errors="replace").strip().rpartition("\n")[2]
        else:
            code, error = int(ExitCode.FAILED), f"the agent on {first.host} ended with exit code {first.code}"
            say(error)
        write_exit(self.run_dir, code, **({"error": error} if error else {}))
        return code

    def _beat(self) -> None:
        """In a thread of its own: a terminal that takes no more text stops the other one."""
        while not self._over.wait(self.plan.silence_seconds / _BEATS):
            for connection in list(self._connections.values()):
                connection.beat()


def _appears(path: Path, content: str) -> bool:
    """True when a file has that content, soon: a new one may take time to be seen on another host."""
    deadline = time.monotonic() + SEEN_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError):
            if path.read_text() == content:
                return True
        time.sleep(0.05)
    return False


def _raise(failures: Mapping[int, str], rest: str) -> NoReturn:
    """One line for each host. What will not mend by itself is the request's fault."""
    words = "\n".join(failures[node] for node in sorted(failures)) + f"; {rest}"
    passing = all(" cannot be reached by ssh" in why or "does not answer" in why for why in failures.values())
    raise UnitrainError(words) if passing else UserError(words)


def _variables(plan: Plan) -> dict[str, str]:
    try:
        return chosen_variables(plan.environment, environment())
    except ValueError as error:
        raise UserError(f"{error}; set it, or take it out of the list") from error


def _pass_on(stream: int, data: bytes) -> None:
    try:
        os.write(stream, data)
    except BrokenPipeError:  # nobody listens any more; the run goes on
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream)
        os.close(nowhere)


def main() -> int:
    """Run the agents of a run's folder; the run's exit code."""
    run_dir = Path(sys.argv[1])
    plan = Plan.read(run_dir)
    try:
        die_with(os.getppid(), signal.SIGTERM)
        with SignalPipe((*STOPPING, signal.SIGCHLD)) as signals:
            try:
                return Team(run_dir, plan, signals).run()
            except Stopped as stopped:
                number = stopped.args[0]
                write_exit(run_dir, 128 + number)
                return 128 + int(number)
    except UnitrainError as error:
        if not plan.detached:  # then `submit` waits, and raises it
            say(str(error))
        write_exit(run_dir, error.exit_code, error=str(error))
        return error.exit_code
    except Exception as error:
        traceback.print_exc()  # ours; whoever waits must still see a failed run, and not Python's exit code 1
        write_exit(run_dir, ExitCode.FAILED, error=f"{type(error).__name__}: {error}")
        return ExitCode.FAILED


if __name__ == "__main__":
    sys.exit(main())
