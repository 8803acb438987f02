"""Pods of a Kubernetes cluster: one agent in each, by the best kind of object that the cluster has."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from unitrain.agent.job import FILE, AgentJob, job_text
from unitrain.agent.logs import attempt_folders, attempt_number, find_log, log_lines, no_log
from unitrain.agent.records import EXIT
from unitrain.errors import Refused, UserError
from unitrain.launcher import Job, JobStatus, Launcher, Rendered
from unitrain.launchers._kubernetes_cluster import Cluster
from unitrain.launchers._kubernetes_follow import End, View, Watch, conclude
from unitrain.launchers._kubernetes_kinds import KINDS, Kind
from unitrain.launchers._kubernetes_options import Wishes, problems
from unitrain.launchers._kubernetes_pod import LATEST, Shape, folder_in_pod, object_name, sees_folder
from unitrain.launchers._kubernetes_rules import broken
from unitrain.launchers._kubernetes_state import KEPT, LAUNCHER, State, status_of, submissions
from unitrain.launchers._kubernetes_submit import check_references, chosen, make, runs_pods, try_out
from unitrain.launchers._kubernetes_watch import Ended, newest
from unitrain.launchers._kubernetes_yaml import from_text, to_text
from unitrain.recipe import Recipe
from unitrain.strategy import Problem

MANIFEST = "kubernetes.yaml"
RECIPE = "recipe.yaml"
DEFAULT = "job"  # what is rendered where nobody has asked a cluster


class Kubernetes(Launcher):
    """The objects of a run, in one namespace; they go on without whoever has submitted them."""

    name = LAUNCHER

    @classmethod
    def problems(cls, recipe: Recipe) -> list[Problem]:
        """Options that it does not know, that have the wrong form, or that exclude each other."""
        return list(problems(recipe))

    def render(self, job: Job) -> Rendered:
        """The job for the agents, the manifests, and what each pod runs."""
        wishes = Wishes.of(job.options)
        return self.for_server(job, KINDS[wishes.kind or DEFAULT], LATEST)

    def submit(self, job: Job, rendered: Rendered) -> str:
        """Make the objects; their namespace and name are the job's id. Nothing is left of a submission that fails."""
        wishes = Wishes.of(job.options)
        cluster = Cluster(kubeconfig=wishes.kubeconfig, context=wishes.context, namespace=wishes.namespace)
        minor, version = cluster.version()
        kind = chosen(cluster, wishes, minor, version)
        fitting = self.for_server(job, kind, minor)
        if fitting.files != rendered.files:
            print(f"as {kind.name}, for Kubernetes {version}: {job.run_dir / MANIFEST}", file=sys.stderr)
        objects = from_text(fitting.files[MANIFEST])
        if sentences := broken(objects, grace_seconds=wishes.grace_seconds, nproc=job.nproc):
            raise Refused("; ".join(sentences))
        check_references(cluster, wishes, kind)
        for body in objects:
            try_out(cluster, body, kind, version)
        for name, content in fitting.files.items():
            (job.run_dir / name).write_text(content)
        (job.run_dir / EXIT).unlink(missing_ok=True)
        made = make(cluster, objects, kind)
        folders = attempt_folders(job.run_dir)
        state = State(
            job_id=f"{cluster.namespace}/{object_name(job.run_dir, submissions(job.run_dir))}",
            submitted=time.time(),
            attempt=attempt_number(folders[-1]) + 1 if folders else 0,
            number=submissions(job.run_dir),
            nodes=job.nodes,
            kind=kind.name,
            names=tuple(body["metadata"]["name"] for body in made if runs_pods(body)),
            options={key: job.options[key] for key in KEPT if key in job.options},
            pod_dir=folder_in_pod(job.run_dir, wishes),
        )
        state.write(job.run_dir)
        return state.job_id

    def wait(self, job: Job, job_id: str) -> int:
        """Show what the pods do and what node 0 prints, until the job has ended."""
        watch = Watch(job.run_dir, State.read(job.run_dir, job_id), give_up=Wishes.of(job.options).give_up_seconds)
        return watch.follow()

    def status(self, run_dir: Path, job_id: str) -> JobStatus:
        """From how it ended, or else from the cluster."""
        state = State.read(run_dir, job_id)
        if state.exit_code is None:
            view = View(state)
            over = view.over()
            if over is None:
                troubles = [trouble.text for trouble in view.waiting()]
                return JobStatus("running" if view.running else "pending", detail="; ".join([view.phases, *troubles]))
            state = conclude(run_dir, state, over, view)
        return status_of(state)

    def logs(self, run_dir: Path, *, rank: int = 0, follow: bool = False) -> Iterator[str]:
        """From the run's folder where this machine sees it; else through a pod."""
        state = State.read(run_dir)
        if not sees_folder(run_dir, state.wishes):
            return _log_through_pod(View(state), run_dir, state, rank, follow)
        running = state.exit_code is None and View(state).over() is None
        since, end = state.attempt if running else 0, End(run_dir, state)
        if not (running and follow) and find_log(run_dir, rank) is None:
            raise no_log(run_dir, rank)
        return log_lines(
            lambda: find_log(run_dir, rank, since_attempt=since),
            lambda: end.has_come,
            follow=follow and running,
        )

    def cancel(self, run_dir: Path, job_id: str, *, grace_seconds: float = 30.0) -> None:
        """Delete the objects: every pod gets SIGTERM, and SIGKILL after the grace. Returns when the pods are gone."""
        state = State.read(run_dir, job_id)
        if state.exit_code is not None:
            return
        view = View(state)
        if (over := view.over()) is None:
            state = replace(state, cancelled=time.time())
            state.write(run_dir)
            view.delete(grace_seconds)
            over = Ended(False, "")
        conclude(run_dir, state, over, view)

    def for_server(self, job: Job, kind: Kind, minor: int) -> Rendered:
        """As a server of version 1.`minor` is sent it."""
        wishes = Wishes.of(job.options)
        files = {FILE: job_text(job, self.name)}
        shape = Shape(
            run_id=job.run_id,
            name=object_name(job.run_dir, submissions(job.run_dir)),
            nodes=job.nodes,
            nproc=job.nproc,
            run_dir=folder_in_pod(job.run_dir, wishes),
            wishes=wishes,
            files={**files, RECIPE: job.recipe},
            minor=minor,
            rejoin_seconds=float(job.options.get("rejoin_seconds", AgentJob.rejoin_seconds)),
        )
        files |= kind.files(shape)
        shape = replace(shape, files={**files, RECIPE: job.recipe})
        return Rendered(
            files={**files, MANIFEST: to_text(kind.objects(shape))},
            argv=tuple(kind.command(shape)),
        )


def _log_through_pod(view: View, run_dir: Path, state: State, rank: int, follow: bool) -> Iterator[str]:
    """Node 0 prints rank 0's lines; another rank's are read where its files are, which takes a running pod."""
    pod = newest(view.pods).get(0)
    if pod is None:
        raise UserError(f"{state.name} has no pod of node 0 any more; its logs are in {state.pod_dir} on its volume")
    name, box = pod["metadata"]["name"], pod["spec"]["containers"][0]
    if rank == 0:
        return view.cluster.log(name, box["name"], follow=follow)
    if pod["status"].get("phase") != "Running":
        raise UserError(
            f"rank {rank}'s log is in {state.pod_dir} on the volume, and pod {name} does not run; give "
            "launcher.options.volume.here where this machine sees the volume, or look into it with another pod"
        )
    python = state.options.get("python", "python")
    words = [python, "-m", "unitrain.agent.tail", state.pod_dir, str(rank), *(["--follow"] if follow else [])]
    return view.cluster.run(name, box["name"], words)
