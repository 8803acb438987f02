"""What runs a job on Ray: it takes room for the nodes, keeps an agent running in each, and ends with the first one's.

`python -m unitrain.launchers._ray_driver RUN_DIR` does what ray.json in the run's folder says.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unitrain import __version__
from unitrain.agent import unpack
from unitrain.agent.job import AgentJob, read_job
from unitrain.agent.logs import GrowingFile, attempt_folders, attempt_number, find_log, new_attempt
from unitrain.agent.rank import die_with
from unitrain.agent.records import EVENTS, EXIT, append_event, read_record, write_exit
from unitrain.agent.restart import Fault, decide
from unitrain.agent.screen import say
from unitrain.agent.signals import STOPPING, SignalPipe
from unitrain.errors import ExitCode, UnitrainError, UserError
from unitrain.launchers._ray_node import Node
from unitrain.launchers._ray_options import FOLDER, STOP, WAITING, Plan
from unitrain.world import environment, forget_variables

PATIENCE_SECONDS = 5.0  # until it is said for what a job waits
LOOK_SECONDS = 120.0  # for an actor to start and look around, on a busy machine
SETTLE_SECONDS = 5.0  # in which the agents of a run that is over end one after the other
KILL_MARGIN_SECONDS = 10.0  # that an agent gets beyond the grace of its ranks
GONE_SECONDS = 10.0  # for an agent to be gone after SIGKILL
RETRY_SECONDS = (1.0, 2.0, 4.0, 8.0, 15.0)
_TICK_SECONDS = 0.2


@dataclass(eq=False)
class Place:
    """A bundle of the placement group, and who is in it."""

    bundle: int
    actor: Any = None
    host: str = ""  # empty: no actor has said yet where it is
    address: str = ""
    node: str = ""  # Ray's name of the machine where it last was
    looking: Any = None  # Ray's reference to where it is
    running: Any = None  # Ray's reference to the exit code of the agent there
    due: float = 0.0  # when to try again, after a failure; 0: at once
    tries: int = 0  # that came to nothing since an agent ran here
    fate: str = ""  # how its agent was lost; empty: there was none, or it is back
    told: bool = False  # that

    @property
    def ready(self) -> bool:
        """True when an agent can be started."""
        return self.host != "" and self.running is None


class Stopped(Exception):
    """A signal came before any agent was started."""


@dataclass
class Voice:
    """What the first node's ranks and agent say, shown as it comes."""

    run_dir: Path
    shown: bool  # rank 0's lines too
    agent: GrowingFile = field(init=False)
    rank: GrowingFile | None = None

    def __post_init__(self) -> None:
        folders = attempt_folders(self.run_dir)
        self._since = attempt_number(folders[-1]) if folders else 0
        self.agent = GrowingFile(agent_log(self.run_dir, 0))
        with contextlib.suppress(FileNotFoundError):
            self.agent.position = self.agent.size()
        self._rest = ""

    def show(self) -> None:
        """What is new."""
        if self.shown:
            self._show_rank()
        if text := self.agent.read():
            _write(2, text)

    def _show_rank(self) -> None:
        text = self.rank.read() if self.rank is not None else ""
        path = find_log(self.run_dir, 0, since_attempt=self._since)
        if path is not None and (self.rank is None or self.rank.path != path):
            self.rank = GrowingFile(path)
            text += ("\n" if self._rest + text and not text.endswith("\n") else "") + self.rank.read()
        lines, _, self._rest = (self._rest + text).rpartition("\n")
        if lines:
            _write(1, f"{lines}\n")


class Driver:
    """A job from the room that it takes to its exit code."""

    def __init__(self, run_dir: Path, plan: Plan, job: AgentJob, signals: SignalPipe, *, shown: bool) -> None:
        self.run_dir, self.plan, self.job, self._signals = run_dir, plan, job, signals
        self._voice = Voice(run_dir, shown)
        self._nonce = secrets.token_hex(16)
        self._places: list[Place] = []  # in the order of the run's nodes
        self._stopped_by: int | None = None
        self._kill_at = float("inf")
        self._meet: str | None = None
        self._join_seconds: float | None = None  # of agents in place of the job's
        self._faults: list[Fault] = []
        self._ended: dict[Place, int] = {}  # exit codes of agents that have ended in the last moment
        self._began = False  # agents were started

    def run(self) -> int:
        """Until the first node's agent has ended for good; the run's exit code."""
        import ray
        from ray.util import placement_group, remove_placement_group

        folder = self.run_dir / FOLDER
        (folder / "nonce").write_text(self._nonce)
        bundles = [dict(self.plan.bundle) for _ in range(self.job.nodes)]
        self._group = placement_group(bundles, strategy=self.plan.placement, name=f"unitrain {self.job.run_id}")
        try:
            self._await_room()
            self._places = [Place(bundle) for bundle in range(self.job.nodes)]
            for place in self._places:
                self._occupy(place)
            self._await_places()
            return self._run()
        finally:
            for place in self._places:
                if place.actor is not None:
                    ray.kill(place.actor)
            remove_placement_group(self._group)
            self._voice.show()
            (folder / "nonce").unlink(missing_ok=True)

    # --- room ---

    def _await_room(self) -> None:
        began, told = time.monotonic(), False
        waiting = self.run_dir / FOLDER / WAITING
        try:
            while not self._group.wait(_TICK_SECONDS):
                self._look_for_signals()
                if self._stopped_by is not None:
                    raise Stopped(self._stopped_by)
                waited = time.monotonic() - began
                if waited > self.plan.wait_seconds:
                    raise UnitrainError(
                        f"the cluster has no room for {self._wanted()} within {self.plan.wait_seconds:g} s; "
                        f"{cluster_words()}; ask for less, or wait longer by launcher.options.wait_seconds"
                    )
                if waited > PATIENCE_SECONDS and not told:
                    told = True
                    words = f"for room in the cluster for {self._wanted()}"
                    waiting.write_text(words)
                    say(f"waiting {words}; {cluster_words()}")
        finally:
            waiting.unlink(missing_ok=True)

    def _wanted(self) -> str:
        return f"{self.job.nodes} x {{{amounts(self.plan.bundle)}}} ({self.plan.placement})"

    def _occupy(self, place: Place) -> None:
        """Have an actor look around in a bundle, once the bundle is there."""
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        asked = dict(self.plan.bundle)
        place.actor = (
            ray.remote(Node)
            .options(
                num_cpus=asked.pop("CPU"),
                num_gpus=asked.pop("GPU", 0),
                resources=asked,
                max_restarts=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    self._group, placement_group_bundle_index=place.bundle
                ),
            )
            .remote()
        )
        place.looking = place.actor.look.remote(str(self.run_dir), self.plan.folder, self._nonce)

    def _await_places(self) -> None:
        """At the start every node must be fit. Raises UserError with a line for each that is not."""
        problems: list[str] = []
        deadline = time.monotonic() + LOOK_SECONDS
        while late := [place.bundle for place in self._places if place.looking is not None]:
            problems += self._tick()
            if self._stopped_by is not None:
                raise Stopped(self._stopped_by)
            if time.monotonic() > deadline:
                which = ", ".join(map(str, late))
                raise UnitrainError(f"the actors in bundles {which} have not started within {LOOK_SECONDS:g} s")
        if problems:
            raise UserError("\n".join([*problems, "nothing was started"]))
        self._began = True

    # --- the run ---

    def _run(self) -> int:
        while True:
            saved = self._saved()
            code = self._round()
            if code is not None:
                return code
            first = self._places[0]
            error = f"the agent of the first node was lost ({first.host or 'with its node'})"
            if self._stopped_by is not None:
                return self._conclude(128 + self._stopped_by)
            append_event(self.run_dir, "fault", attempt=self._attempt(), error=error)
            self._faults.append(Fault(exit_code=-signal.SIGKILL, progress=self._saved() > saved))
            decision = decide(self._faults, self.job.restarts)
            if not decision.restart:
                return self._conclude(decision.exit_code, error)
            append_event(
                self.run_dir, "restart", attempt=self._attempt() + 1, error=error, seconds=decision.after_seconds
            )
            self._join_seconds = self.plan.rejoin_seconds
            self._pause(decision.after_seconds)
            if self._is_back(first):
                say(f"{error}; another one starts there, and the others come to it")
                continue
            say(f"{error}; all agents start anew from the newest checkpoint")
            self._meet = None
            self._end_agents()

    def _is_back(self, first: Place) -> bool:
        """True when a new agent can meet the others where the lost one did: they keep what they have in memory."""
        before, deadline = first.address, time.monotonic() + LOOK_SECONDS
        if self._meet is None:
            return False
        while not first.ready and time.monotonic() < deadline and self._stopped_by is None:
            if first.node not in living_nodes():  # Ray takes some seconds to find that out
                return False
            for problem in self._tick():
                say(problem)
        return first.ready and first.address == before

    def _round(self) -> int | None:
        """Agents that meet at one place, from their start; the exit code, or None where the first one was lost."""
        first = self._choose_first() if self._meet is None else self._places[0]
        if first is None:
            return None if self._stopped_by is not None else self._conclude(ExitCode.FAILED, self._nobody_left())
        try:
            self._meet = self._meet or self._meeting_place(first)
        except UnitrainError as lost:
            say(str(lost))
            self._vacate(first)
            return None
        while True:
            for place in self._places:
                if place.ready and time.monotonic() >= place.due and self._stopped_by is None:
                    self._start(place)
            for problem in self._tick():
                say(problem)
            if first.running is None:
                return self._over(first)

    def _over(self, first: Place) -> int | None:
        code = self._ended.pop(first, None)
        if code is None or code < 0:
            return None
        deadline = time.monotonic() + SETTLE_SECONDS  # the others end by themselves, at most a moment later
        while any(place.running is not None for place in self._places) and time.monotonic() < deadline:
            self._tick()
        self._end_agents()
        return self._conclude(code)

    def _choose_first(self) -> Place | None:
        """Put those that are there before those that are lost, and wait for one; None where none comes."""
        deadline = time.monotonic() + self.plan.rejoin_seconds
        while not any(place.ready for place in self._places):
            for problem in self._tick():
                say(problem)
            if self._stopped_by is not None or time.monotonic() > deadline:
                return None
        self._places.sort(key=lambda place: not place.ready)
        return self._places[0]

    def _nobody_left(self) -> str:
        return (
            f"no node was left, and the cluster gave no room again within {self.plan.rejoin_seconds:g} s; "
            f"{cluster_words()}; raise launcher.options.rejoin_seconds if nodes take longer to come back"
        )

    def _meeting_place(self, first: Place) -> str | None:
        if self.job.nodes == 1:
            return None
        from unitrain.actors.waiting_ray import wait

        names = [f"node 0 on {first.host}"]
        (port,) = wait([first.actor.free_port.remote()], names=names, seconds=LOOK_SECONDS, what="choosing a port")
        return f"[{first.address}]:{port}" if ":" in first.address else f"{first.address}:{port}"

    def _start(self, place: Place) -> None:
        node = self._places.index(place)
        words = [self.plan.python, str(self.run_dir), "--node", str(node)]
        if self._meet is not None:
            words += ["--meet", self._meet]
        if self._join_seconds is not None:
            words += ["--join-seconds", f"{self._join_seconds:g}"]
        log = str(agent_log(self.run_dir, node))
        cpus = self.plan.bundle["CPU"]
        place.running = place.actor.run.remote(words, self._settings(), cpus, self.plan.folder, log)
        if place.fate:
            if not place.told:
                self._note_lost(place)
            place.fate, place.told, place.tries = "", False, 0
            append_event(self.run_dir, "host_back", node=node, host=place.host)
            say(f"{place.host} is back as node {node}")

    def _settings(self) -> dict[str, str]:
        """Variables of the agents."""
        import ray

        ours, found = environment(), {}
        if not self.plan.private:
            found["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address  # for a rank that uses the cluster itself
        elif "OMP_NUM_THREADS" in ours:
            found["OMP_NUM_THREADS"] = ours["OMP_NUM_THREADS"]
        if self.plan.threads is not None:
            found["OMP_NUM_THREADS"] = str(self.plan.threads)
        # Ray has handed on those that the job was submitted with; but of these it may have its own opinion.
        return found | {name: ours[name] for name in self.plan.environment if name in ours}

    # --- what happens ---

    def _tick(self) -> list[str]:
        """Wait a moment for anything to happen; what is wrong with places that have looked around."""
        import ray
        from ray.exceptions import RayError

        self._ended.clear()
        for place in self._places:
            if place.actor is None and time.monotonic() >= place.due:
                self._occupy(place)
        awaited = {ref: place for place in self._places for ref in (place.looking, place.running) if ref is not None}
        if awaited:
            done, _ = ray.wait(list(awaited), num_returns=1, timeout=_TICK_SECONDS)
        else:
            time.sleep(_TICK_SECONDS)
            done = []
        problems: list[str] = []
        for ref in done:
            place = awaited[ref]
            try:
                answer = ray.get(ref, timeout=LOOK_SECONDS)
            except RayError as error:
                self._fell(place, error)
                continue
            if ref == place.looking:
                problems += self._heard(place, answer)
            else:
                self._agent_ended(place, answer)
        self._look_for_signals()
        self._voice.show()
        return problems

    def _heard(self, place: Place, facts: Mapping[str, Any]) -> list[str]:
        """An actor has looked around; what is wrong there."""
        place.looking = None
        problem = facts["problem"]
        if facts["version"] != __version__:
            problem = f"has unitrain {facts['version']}, and {__version__} launches; install the same everywhere"
        if problem is not None:
            self._vacate(place)
            return [f"{facts['host']} {problem}"]
        place.host, place.address, place.node = str(facts["host"]), str(facts["address"]), str(facts["node"])
        return []

    def _agent_ended(self, place: Place, code: int) -> None:
        place.running = None
        self._ended[place] = code
        if self._places.index(place) > 0 and self._stopped_by is None:
            # The run may be about to end, and this is how the agent was told.
            place.due = time.monotonic() + (SETTLE_SECONDS if code >= 0 else 0.0)
            place.fate = f"its agent ended with exit code {code}"

    def _fell(self, place: Place, error: Exception) -> None:
        """The actor is lost, or what it was asked to do has failed."""
        from ray.exceptions import RayTaskError

        if isinstance(error, RayTaskError):
            raise UnitrainError(f"{place.host or 'a node'} cannot run an agent: {error.cause}") from error
        if not self._began:
            raise UnitrainError(f"an actor has not started: {' '.join(str(error).split())[:400]}") from error
        if place.running is not None:
            place.fate = "its actor was lost"
            self._note_lost(place)
        self._vacate(place)

    def _vacate(self, place: Place) -> None:
        """Have another actor made soon: in the bundle, or wherever Ray puts the bundle anew."""
        import ray

        ray.kill(place.actor)
        pause = RETRY_SECONDS[min(place.tries, len(RETRY_SECONDS)) - 1] if place.tries else 0.0
        place.due, place.tries = time.monotonic() + pause, place.tries + 1
        place.actor = place.looking = place.running = None
        place.host = ""

    def _note_lost(self, place: Place) -> None:
        node, place.told = self._places.index(place), True
        append_event(self.run_dir, "host_lost", node=node, host=place.host, error=place.fate)
        if self._stopped_by is None:
            say(f"node {node} on {place.host}: {place.fate}; trying to start its agent again")

    def _look_for_signals(self) -> None:
        """From the system, or through the run's folder from whoever cancels."""
        numbers = [number for number in self._signals.caught() if number in STOPPING]
        asked = self.run_dir / FOLDER / STOP
        with contextlib.suppress(OSError, ValueError):
            numbers.append(int(asked.read_text()))
            asked.unlink()
        for number in numbers:
            self._stopped_by = self._stopped_by or number
            self._kill_at = min(self._kill_at, time.monotonic() + self.job.grace_seconds + KILL_MARGIN_SECONDS)
            self._signal_all(number)
        if time.monotonic() > self._kill_at:
            self._kill_at = float("inf")
            self._signal_all(signal.SIGKILL)

    def _signal_all(self, number: int) -> None:
        for place in self._places:
            if place.running is not None:
                place.actor.signal.remote(int(number))

    # --- the end ---

    def _end_agents(self) -> None:
        """SIGKILL to those that still run; what they know is in the checkpoints."""
        self._signal_all(signal.SIGKILL)
        deadline = time.monotonic() + GONE_SECONDS
        while any(place.running is not None for place in self._places) and time.monotonic() < deadline:
            self._tick()
        for place in self._places:
            place.due, place.fate, place.told = 0.0, "", False  # they are not missed

    def _pause(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self._stopped_by is None:
            self._tick()

    def _attempt(self) -> int:
        return attempt_number(attempt_folders(self.run_dir)[-1])

    def _saved(self) -> int:
        """How many checkpoints the run has made durable."""
        try:
            with (self.run_dir / EVENTS).open(errors="replace") as lines:
                return sum('"event": "checkpoint"' in line and '"ok": false' not in line for line in lines)
        except FileNotFoundError:
            return 0

    def _conclude(self, code: int, error: str = "") -> int:
        """The run's exit code, which is on record afterwards: the agent's own account comes first."""
        self._voice.show()
        left = (read_record(self.run_dir / EXIT) or {}).get("exit_code")
        if error:
            say(error)
        elif type(left) is int:
            return left
        append_event(self.run_dir, "stop", exit_code=int(code))
        write_exit(self.run_dir, int(code), **({"error": error} if error else {}))
        return int(code)


def agent_log(run_dir: Path, node: int) -> Path:
    """What the agent of a node says."""
    return run_dir / "logs" / f"agent-{node}.log"


def living_nodes() -> dict[str, Mapping[str, Any]]:
    """What Ray knows of each, by its name."""
    import ray

    cluster: Any = ray  # this is untyped there
    return {node["NodeID"]: node for node in cluster.nodes() if node["Alive"]}


def cluster_words() -> str:
    """What the cluster has, for people."""
    import ray

    cluster: Any = ray  # this is untyped there
    nodes = list(living_nodes().values())
    there = [f"{node['NodeManagerHostname']} ({amounts(node['Resources']) or 'nothing'})" for node in nodes[:8]]
    rest = f" and {len(nodes) - 8} more" if len(nodes) > 8 else ""
    return f"it has {', '.join(there)}{rest}; free in all: {amounts(cluster.available_resources()) or 'nothing'}"


def amounts(resources: Mapping[str, float]) -> str:
    """`CPU: 4, GPU: 2`; without what Ray keeps for itself."""
    kept = ("memory", "object_store_memory")
    return ", ".join(
        f"{name}: {amount:g}"
        for name, amount in sorted(resources.items())
        if name not in kept and not name.startswith("node:") and "_group_" not in name
    )


def _write(stream: int, text: str) -> None:
    try:
        with open(stream, "w", encoding="utf-8", errors="backslashreplace", closefd=False) as file:
            file.write(text)
    except BrokenPipeError:  # nobody listens any more; the run goes on
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream)
        os.close(nowhere)


def stop(run_dir: Path, seconds: float) -> int:
    """What a node does that is to be shut down: have the run's ranks save, and wait for that. Always 0."""
    deadline = time.monotonic() + seconds
    with contextlib.suppress(OSError):
        if not (run_dir / EXIT).exists():
            (run_dir / FOLDER / STOP).write_text(str(int(signal.SIGTERM)))
        while not (run_dir / EXIT).exists() and time.monotonic() < deadline:
            time.sleep(_TICK_SECONDS)
    return 0


@contextlib.contextmanager
def _cluster(plan: Plan, job: AgentJob) -> Iterator[None]:
    """Connected to the cluster that this job belongs to, or to one of its own."""
    from unitrain.actors.cluster_ray import private_or_running

    if plan.private:
        forget_variables("RAY_ADDRESS", "RAY_NAMESPACE")
    elif "RAY_ADDRESS" not in environment():
        raise UserError("RAY_ADDRESS is not set, so this is no job of a Ray cluster; launch by --launcher ray")
    before = {number: signal.getsignal(number) for number in STOPPING}
    cpus = max(1, int(plan.bundle["CPU"] * job.nodes + 0.999))
    gpus = int(plan.bundle.get("GPU", 0) * job.nodes + 0.999)
    with private_or_running(None, cpus=cpus, gpus=gpus, name="unitrain"):
        for number, handler in before.items():
            signal.signal(number, handler)  # Ray has put its own in the place of some
        yield


def main() -> int:
    """Run the job of a run's folder on Ray; the run's exit code."""
    parser = argparse.ArgumentParser(prog="python -m unitrain.launchers._ray_driver", description=__doc__)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--detached", action="store_true", help="go on when the process that started this one ends")
    parser.add_argument("--files", type=Path, metavar="FROM", help="where to take the run's files from")
    parser.add_argument("--job", metavar="NAME", help="of this submission, with --files")
    parser.add_argument("--stop", type=float, metavar="SECONDS", help="only have the run stop, and wait so long for it")
    known = parser.parse_args()
    run_dir: Path = known.run_dir
    if known.stop is not None:
        return stop(run_dir, known.stop)
    try:
        if known.files is not None and (code := unpack.place(known.files, run_dir, known.job)) is not None:
            say(f"{known.job} has ended with exit code {code} already")
            return code
        plan, job = Plan.read(run_dir), read_job(run_dir)
        if plan.private or known.files is not None:  # else whoever submits does it, and may have cancelled since
            (run_dir / FOLDER / STOP).unlink(missing_ok=True)
    except UnitrainError as error:
        say(str(error))
        return error.exit_code
    except OSError as error:
        say(f"{run_dir} cannot be used: {error}; look at its volume")
        return ExitCode.FAILED
    if plan.private:
        # Away from the terminal, whose Ctrl-C would end Ray before a save; who launched passes it on.
        with contextlib.suppress(PermissionError):
            os.setsid()
        if not known.detached:
            die_with(os.getppid(), signal.SIGTERM)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)  # Ray blocks SIGINT in all that it starts
        with SignalPipe(STOPPING) as signals:
            (run_dir / FOLDER).mkdir(exist_ok=True)
            new_attempt(run_dir)  # unless whoever submitted has made its folder
            with _cluster(plan, job):
                return Driver(run_dir, plan, job, signals, shown=not known.detached).run()
    except Stopped as stopped:
        code = 128 + int(stopped.args[0])
        write_exit(run_dir, code)
        return code
    except UnitrainError as error:
        say(str(error))
        write_exit(run_dir, error.exit_code, error=str(error))
        return error.exit_code
    except SystemExit:  # Ray's own answer to SIGTERM, while it starts
        write_exit(run_dir, 128 + signal.SIGTERM)
        return 128 + signal.SIGTERM
    except Exception as error:
        traceback.print_exc()  # ours; whoever waits must still see a failed run, and not Python's exit code 1
        write_exit(run_dir, ExitCode.FAILED, error=f"{type(error).__name__}: {error}")
        return ExitCode.FAILED


if __name__ == "__main__":
    sys.exit(main())
