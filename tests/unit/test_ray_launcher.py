"""What the launcher `ray` refuses before anything starts, and how it speaks with a cluster's Jobs API."""

from __future__ import annotations

import shlex
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from unitrain.errors import Refused, UnitrainError, UserError
from unitrain.launcher import Job
from unitrain.launchers._ray_driver import amounts
from unitrain.launchers._ray_jobs import Jobs, NotReached
from unitrain.launchers._ray_options import DRIVER, OPTIONS, Plan, submission_id
from unitrain.launchers.ray import Ray, job_status_of, why_failed
from unitrain.recipe import LauncherRecipe, Recipe

from .test_slurm import HOSTILE

pytestmark = pytest.mark.fast

HEAD = "http://head:8265"


def problems(nodes: int = 2, nproc: int = 4, **options: Any) -> list[str]:
    launcher = LauncherRecipe(name="ray", nodes=nodes, nproc=nproc, options=options)
    return [problem.what for problem in Ray.problems(Recipe(trainer="mine:Mine", launcher=launcher))]


def job(run_dir: Path = Path("/runs/gpt-1"), nproc: int = 4, run_id: str = "gpt-1", **options: Any) -> Job:
    return Job(run_id=run_id, run_dir=run_dir, nodes=2, nproc=nproc, options=options)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"adress": HEAD}, "no option 'adress'"),
        ({"address": "head:8265"}, "address is 'head:8265'"),
        ({"address": "ray://head:10001"}, "address is 'ray://head:10001'"),
        ({"address": "http://me:word@head:8265"}, "address is"),
        ({"address": "http://head:99999"}, "address is"),
        ({"address": "http://head:8265/api/../x"}, "address is"),
        ({"placement": "SPRED"}, "placement is 'SPRED'"),
        ({"placement": "STRICT_SPREAD"}, "a private Ray has one machine"),
        ({"cpus_per_rank": 0}, "cpus_per_rank is 0"),
        ({"cpus_per_rank": True}, "cpus_per_rank is True"),
        ({"gpus_per_rank": 0.3}, "which makes 1.2 GPUs for 4 ranks"),
        ({"resources": {"CPU": 4}}, "resources has CPU"),
        ({"resources": {"rack": -1}}, "resources is"),
        ({"resources": ["rack"]}, "resources is"),
        ({"wait_seconds": "long"}, "wait_seconds is 'long'"),
        ({"min_nodes": 3}, "min_nodes is 3"),
        ({"detached": "yes"}, "detached is 'yes'"),
        ({"environment": ["A=1"]}, "environment is"),
        ({"address": HEAD, "environment": ["HF_HOME", "HF_TOKEN"]}, "names HF_TOKEN"),
    ],
)
def test_a_mistake_is_named_before_anything_starts(options: dict[str, Any], what: str) -> None:
    (found,) = problems(**options)
    assert what in found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"address": HEAD, "placement": "STRICT_SPREAD", "min_nodes": 1, "rejoin_seconds": 600},
        {"address": "https://[fd00::1]:8265/", "ca_file": "/etc/ca.pem"},
        {"gpus_per_rank": 0.25},
        {"gpus_per_rank": 2, "cpus_per_rank": 0.5, "resources": {"node:10.0.0.1": 0.01, "rack-a": 1}},
        {"environment": ["HF_TOKEN"]},  # a private Ray is ours alone
    ],
)
def test_what_fits_is_no_problem(options: dict[str, Any]) -> None:
    assert problems(**options) == []


HARMLESS = [("resources", "hetjob"), ("resources", "packjob")]


def harmless(key: str, value: str) -> bool:
    """A variable's name or a pattern for some; and words that are dangerous in a batch script alone."""
    return value.isidentifier() or value == "*" if key == "environment" else (key, value) in HARMLESS


@pytest.mark.parametrize("key", sorted(OPTIONS))
def test_no_hostile_value_is_more_than_a_word(key: str) -> None:
    """A path may hold what is special to a shell: it comes out of one as it went in."""
    for value in HOSTILE:
        given: Any = [value] if key == "environment" else {value: 1} if key == "resources" else value
        if problems(**{"address": HEAD, key: given}) or harmless(key, value):
            continue
        assert key in ("python", "folder", "ca_file", "entry"), f"{key}={value!r} went through"
        assert value.isprintable()
        plan = Plan.of(job(**{"address": HEAD, "folder": "/work", "python": "python", key: value}))
        words = shlex.split(plan.entrypoint)
        assert words == ["cd", plan.folder, "&&", "exec", plan.python, "-m", DRIVER, "/runs/gpt-1"]


@pytest.mark.parametrize("value", HOSTILE)
def test_no_hostile_name_leaves_its_place(value: str) -> None:
    path = Path("/runs") / f"x{value}"
    if not str(path).isprintable():
        with pytest.raises(Refused):
            Plan.of(job(path, address=HEAD))
    elif "\x00" not in value:
        plan = Plan.of(job(path, address=HEAD, run_id=value))
        assert shlex.split(plan.entrypoint)[-1] == str(path)
        assert set(plan.submission_id) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-")
        assert len(plan.submission_id) < 80
    assert problems(**{value: "x"})


def test_every_option_is_in_the_documentation() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "ray.md").read_text()
    assert [option for option in OPTIONS if f"`{option}`" not in page] == []


def test_a_plan_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    plan = Plan.of(job(tmp_path, address=HEAD, gpus_per_rank=1, cpus_per_rank=2.5, resources={"rack": 0.5}))
    assert plan.bundle == {"CPU": 10.0, "GPU": 4.0, "rack": 0.5}
    assert plan.threads == 2
    (tmp_path / "ray.json").write_text(plan.text)
    assert Plan.read(tmp_path) == plan
    (tmp_path / "ray.json").write_text('{"address": 3}')
    with pytest.raises(UserError, match="damaged"):
        Plan.read(tmp_path)
    with pytest.raises(UserError, match="must be on a file system that all nodes"):
        Plan.read(tmp_path / "elsewhere")


def test_runs_of_one_id_in_two_folders_are_two_jobs() -> None:
    assert submission_id(Path("/a/gpt"), "gpt") != submission_id(Path("/b/gpt"), "gpt")
    assert submission_id(Path("/a/gpt"), "gpt").startswith("gpt-")


@pytest.mark.parametrize(
    ("code", "state"), [(0, "done"), (75, "preempted"), (143, "cancelled"), (70, "failed"), (93, "failed")]
)
def test_the_runs_own_exit_code_says_how_it_ended(code: int, state: str) -> None:
    """Ray knows three ends of a job, and a run has more."""
    assert job_status_of({"exit_code": code}, Path("/runs/x")).state == state


@pytest.mark.parametrize(
    ("seen", "said"),
    [
        ({"driver_exit_code": 127, "message": "x"}, "the cluster has no Python /opt/python; name one"),
        ({"driver_exit_code": -9, "message": "x\nstep 12"}, "its driver was ended by SIGKILL, and all ranks with it"),
        ({"driver_exit_code": 137}, "ended by SIGKILL"),
        ({"driver_exit_code": 2, "message": "last logs:\n/bin/sh: cd: can't cd to /x\n"}, "can't cd to /x"),
        ({"status": "FAILED", "message": None}, "has left no exit code (FAILED)"),
    ],
)
def test_a_driver_that_could_not_speak_is_spoken_for(seen: dict[str, Any], said: str, tmp_path: Path) -> None:
    (tmp_path / "ray.json").write_text(Plan.of(job(tmp_path, address=HEAD, python="/opt/python")).text)
    assert said in why_failed(seen, tmp_path)


def test_resources_are_said_without_what_ray_keeps_for_itself() -> None:
    there = {"CPU": 4.0, "memory": 1e9, "object_store_memory": 1e9, "node:10.0.0.1": 1.0, "CPU_group_0_ab12": 2.0}
    assert amounts(there) == "CPU: 4"


# --- the Jobs API ------------------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    """Answers as its `answer` says, and keeps what it was asked."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.server.asked.append((self.path, self.headers.get("Authorization")))
            code, headers, body = self.server.answer
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *words: object) -> None:
            return

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
        found.asked = []
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        yield found
        found.shutdown()
        thread.join()


def address(server: ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}"


def test_a_token_goes_to_the_address_that_was_given_and_to_no_other(
    server: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "word")
    server.answer = (302, {"Location": f"{address(server)}/stranger"}, b"")
    with pytest.raises(UserError, match=r"only leads to .*/stranger"):
        Jobs(address(server)).look("gpt-1")
    assert server.asked == [("/api/jobs/gpt-1", "Bearer word")]


def test_a_name_stays_one_part_of_a_path(server: ThreadingHTTPServer) -> None:
    server.answer = (404, {}, b"")
    assert Jobs(address(server)).look("../nodes?x=1") is None
    assert server.asked[0][0] == "/api/jobs/..%2Fnodes%3Fx%3D1"


@pytest.mark.parametrize(
    ("answer", "error", "what"),
    [
        ((200, {}, b"<html>"), NotReached, "does not answer"),
        ((200, {}, b"[1]"), NotReached, "no Jobs API of Ray"),
        ((500, {}, b"Traceback\n  File x\nRuntimeError: disk full\n"), UserError, "refuses: RuntimeError: disk full"),
        ((401, {}, b"Missing authentication token"), UserError, "wants another token"),
    ],
)
def test_whatever_answers_there_is_one_sentence(
    server: ThreadingHTTPServer, answer: Any, error: type[UnitrainError], what: str
) -> None:
    server.answer = answer
    with pytest.raises(error, match=what) as raised:
        Jobs(address(server)).look("gpt-1")
    assert "\n" not in str(raised.value)


def test_a_token_that_cannot_be_read_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(UserError, match="none cannot be read"):
        Jobs("http://127.0.0.1:9").look("gpt-1")
