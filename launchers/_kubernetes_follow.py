"""Following a job: what a cluster shows of it, what is said of that, and how it is known to have ended."""

from __future__ import annotations

import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from unitrain.agent.records import EXIT, read_record, write_exit
from unitrain.errors import ExitCode, UserError
from unitrain.launchers._kubernetes_cluster import Cluster, Refusal
from unitrain.launchers._kubernetes_kinds import KINDS
from unitrain.launchers._kubernetes_pod import FINAL_CODES, sees_folder
from unitrain.launchers._kubernetes_state import STOPPED, State
from unitrain.launchers._kubernetes_watch import (
    Ended,
    Trouble,
    cannot_start,
    ended,
    exit_code,
    last_words,
    newest,
    node_of,
    phases,
    waiting,
)

_POLL_SECONDS = 1.0
_LEAVE_SECONDS = 120.0  # beyond the grace, for the kubelet to clear a pod away; a busy one takes a minute
_SELDOM_SECONDS = 5.0
_TELL_SECONDS = 10.0
_LOG_SECONDS = 10.0  # for the last lines of a pod that has ended


class View:
    """What a cluster shows of a job, as of the last `look`."""

    def __init__(self, state: State) -> None:
        self.state, self.kind = state, KINDS[state.kind]
        wishes = state.wishes
        namespace = state.job_id.partition("/")[0]
        self.cluster = Cluster(kubeconfig=wishes.kubeconfig, context=wishes.context, namespace=namespace)
        self.jobs: list[dict[str, Any]] = []
        self.pods: list[dict[str, Any]] = []
        self.codes: dict[int, int] = {}  # of containers that have ended, by node; what is gone is remembered
        self.words: dict[int, str] = {}
        self.look()

    def look(self) -> None:
        """Ask again."""
        found = (self.cluster.get(self.kind.api, self.kind.plural, name) for name in self.state.names)
        self.jobs = [job for job in found if job is not None and "deletionTimestamp" not in job["metadata"]]
        self.pods, self._version = self.cluster.list("v1", "pods", selector=self.kind.selector(self.state.name))
        for pod in sorted(self.pods, key=lambda pod: str(pod["metadata"].get("creationTimestamp", ""))):
            self._remember(pod)

    def pause(self, seconds: float) -> None:
        """Wait, until a pod changes at most: one that is deleted tells only then how it ended."""
        selector = self.kind.selector(self.state.name)
        try:
            for pod in self.cluster.changes("v1", "pods", selector=selector, since=self._version, seconds=seconds):
                self._remember(pod)
                return
        except UserError:
            time.sleep(seconds)  # who may not watch looks now and then

    def _remember(self, pod: dict[str, Any]) -> None:
        if (code := exit_code(pod)) is not None:
            self.codes[node_of(pod)] = code
        if words := last_words(pod):
            self.words[node_of(pod)] = words

    def over(self) -> Ended | None:
        """How it has ended, if it has: by its objects, since one of them is gone, or in a way that no retry mends."""
        if len(self.jobs) < len(self.state.names):
            return None if self.pods else Ended(False, "")
        if (found := ended(self.jobs)) is not None:
            return found
        pods = newest(self.pods)
        if final := [code for pod in pods.values() if (code := exit_code(pod)) in FINAL_CODES]:
            return Ended(False, f"exit code {final[0]}")
        states = [str(pod["status"].get("phase")) for pod in pods.values()]
        # It went on without nodes that were lost, and no machine has been found for their pods since.
        without = states[:1] == ["Succeeded"] and "Pending" in states and set(states) <= {"Succeeded", "Pending"}
        return Ended(True, "") if without and 0 in pods else None

    @property
    def running(self) -> bool:
        """True when a pod runs."""
        return any(pod["status"].get("phase") == "Running" for pod in newest(self.pods).values())

    @property
    def clear(self) -> bool:
        """True when no pod waits for a start."""
        return all(pod["status"].get("phase") != "Pending" for pod in newest(self.pods).values())

    @property
    def steady(self) -> bool:
        """True when every node's pod runs."""
        pods = newest(self.pods).values()
        return len(pods) == self.kind.num_pods(self.state.nodes) and all(
            pod["status"].get("phase") == "Running" for pod in pods
        )

    @property
    def phases(self) -> str:
        """What the pods do, in a few words."""
        return phases(self.pods)

    def waiting(self) -> list[Trouble]:
        """Why something does not start."""
        if self.steady:
            return []
        try:
            warnings, _ = self.cluster.list("v1", "events", fields="type=Warning")
        except Refusal:
            warnings = []  # who may not read events sees pods' own states still
        return waiting(self.jobs, self.pods, warnings)

    @property
    def active(self) -> bool:
        """True while there are objects that have pods running, or may start others."""
        return bool(self.jobs) and (ended(self.jobs) is None or self.running)

    def delete(self, grace_seconds: float) -> None:
        """Delete everything, and wait until the pods are gone."""
        for name in self.state.names:
            self.cluster.delete(self.kind.api, self.kind.plural, name)
        grace = max(1, int(grace_seconds))  # 0 makes the server forget pods, and is for those alone that never ran
        for pod in self.pods:
            own = 0 if cannot_start(pod) else grace
            self.cluster.delete("v1", "pods", pod["metadata"]["name"], grace_seconds=own)
        for plural in ("services", "configmaps"):
            self.cluster.delete("v1", plural, self.state.name)
        deadline = time.monotonic() + grace + _LEAVE_SECONDS
        while True:
            self.look()
            if not self.pods:
                return
            if time.monotonic() > deadline:
                left = ", ".join(pod["metadata"]["name"] for pod in self.pods)
                raise UserError(f"pods {left} are still there; if their machine is lost, delete them with --force")
            self.pause(_POLL_SECONDS)


class Watch:
    """Follows a job to its end, and says what there is to say once."""

    def __init__(self, run_dir: Path, state: State, *, give_up: int) -> None:
        self.run_dir, self.state, self.give_up = run_dir, state, give_up
        self.view = View(state)
        self._said = ""
        self._stuck_since: float | None = None
        self._printed: dict[str, int] = {}  # lines of each pod of node 0
        self._thread: threading.Thread | None = None

    def follow(self) -> int:
        """The exit code of the run."""
        while (over := self.view.over()) is None:
            self._show_log()
            troubles = self.view.waiting()
            self._say("; ".join([self.view.phases, *(trouble.text for trouble in troubles)]))
            if self._hopeless(any(not trouble.mends for trouble in troubles)):
                over = Ended(False, troubles[0].text)
                self._say(f"given up after {self.give_up} s (launcher.options.give_up_seconds): {over.detail}")
                break
            self.view.pause(_SELDOM_SECONDS if self.view.steady else _POLL_SECONDS)
            self._look()
        self._show_log()
        if self._thread is not None:
            self._thread.join(_LOG_SECONDS)
        if self.view.active and not (over.done and self.view.clear):
            self.view.delete(self.state.wishes.grace_seconds)  # what waits for a node that is no more, or tries in vain
        ended_so = conclude(self.run_dir, self._as_told(), over, self.view)
        if ended_so.error:
            print(ended_so.error, file=sys.stderr, flush=True)
        return ExitCode.FAILED if ended_so.exit_code is None else ended_so.exit_code

    def _look(self) -> None:
        """Ask until there is an answer: the job goes on, whether its server can be reached from here or not."""
        while True:
            try:
                self.view.look()
                return
            except Refusal as refusal:
                if not refusal.passes:
                    raise
                self._say(str(refusal))
                time.sleep(_SELDOM_SECONDS)

    def _as_told(self) -> State:
        """The state, with the end of the job where whoever cancels it is about to write that."""
        deadline = time.monotonic() + _TELL_SECONDS
        while (now := State.read(self.run_dir, self.state.job_id)).exit_code is None:
            if now.cancelled is None or time.monotonic() > deadline:
                break
            time.sleep(_POLL_SECONDS / 10)
        return now

    def _hopeless(self, stuck: bool) -> bool:
        if not stuck:
            self._stuck_since = None
            return False
        self._stuck_since = self._stuck_since or time.monotonic()
        return bool(self.give_up) and time.monotonic() - self._stuck_since >= self.give_up

    def _say(self, text: str) -> None:
        if text != self._said:
            self._said = text
            print(text, file=sys.stderr, flush=True)

    def _show_log(self) -> None:
        """Print what node 0 prints, in a thread that ends with the pod."""
        pod = newest(self.view.pods).get(0)
        if pod is None or (self._thread is not None and self._thread.is_alive()):
            return
        started = pod["status"].get("phase") in ("Running", "Succeeded", "Failed")
        name = pod["metadata"]["name"]
        if started and self._printed.get(name) != -1:
            self._thread = threading.Thread(target=self._print_log, args=(pod,), daemon=True)
            self._thread.start()

    def _print_log(self, pod: dict[str, Any]) -> None:
        name, box = pod["metadata"]["name"], pod["spec"]["containers"][0]["name"]
        over = pod["status"].get("phase") != "Running"
        try:
            for number, line in enumerate(self.view.cluster.log(name, box, follow=True)):
                if number >= self._printed.get(name, 0):
                    print(line, flush=True)
                    self._printed[name] = number + 1
        except UserError:
            return  # the pod went away, or the connection did: asked again while it is there
        if over:
            self._printed[name] = -1


class End:
    """Whether a job has ended, for somebody who asks all the time and need not know at once."""

    def __init__(self, run_dir: Path, state: State) -> None:
        self.run_dir, self.state = run_dir, state
        self._asked = time.monotonic()
        self._over = False

    @property
    def has_come(self) -> bool:
        """The cluster is asked more often once the agents have left an exit code: the pods may be started again."""
        since = time.monotonic() - self._asked
        if not self._over and since > (_POLL_SECONDS if (self.run_dir / EXIT).exists() else _SELDOM_SECONDS):
            known = State.read(self.run_dir)
            self._over = known.exit_code is not None or known.job_id != self.state.job_id or _is_over(known)
            self._asked = time.monotonic()
        return self._over


def _is_over(state: State) -> bool:
    return View(state).over() is not None


def conclude(run_dir: Path, state: State, over: Ended, view: View) -> State:
    """Keep how the job ended: what the agents have left in the folder, or else what the pods' containers ended with."""
    if state.exit_code is not None:
        return state
    left = read_record(run_dir / EXIT) if sees_folder(run_dir, state.wishes) else None
    if left is not None and type(left.get("exit_code")) is int:
        code, error = left["exit_code"], str(left.get("error", ""))
    elif over.done:
        code, error = int(ExitCode.DONE), ""
    else:
        code = _code(view, over, state)
        error = view.words.get(0) or next(iter(view.words.values()), "") or over.detail
        write_exit(run_dir, code, error=error)
    state = replace(state, exit_code=code, error=error if code != STOPPED else "")
    state.write(run_dir)
    return state


def _code(view: View, over: Ended, state: State) -> int:
    """Of a job that is not done, from its containers."""
    known = {int(code) for code in ExitCode} | {STOPPED}
    codes = [view.codes[node] for node in sorted(view.codes) if view.codes[node] in known]
    if final := [code for code in codes if code in FINAL_CODES]:
        return final[0]
    if codes and set(codes) == {int(ExitCode.PREEMPTED)}:
        return int(ExitCode.PREEMPTED)
    # Whoever deleted the objects has stopped the run.
    return STOPPED if state.cancelled is not None or not over.detail else int(ExitCode.FAILED)
