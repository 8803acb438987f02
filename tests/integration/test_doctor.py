"""`unitrain doctor` as its users meet it: a real job of two ranks, good news, bad news, and what stays behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..contract.systems import system_of
from .runs import Ended, unitrain

CHECKS = (
    *("shell", "address", "open files", "locked memory", "shared memory", "disk", "variables", "cores", "folder"),
    *("versions", "torch", "all-reduce"),
)
BETWEEN = ("names", "folder", "ports", "clocks", "versions")


def found(done: Ended) -> dict[str, dict[str, Any]]:
    """The rows by the name of their check."""
    return {row["check"]: row for row in json.loads(done.out)["checks"]}


def test_this_machine_is_looked_at_and_nothing_stays(tmp_path: Path) -> None:
    done = unitrain("doctor", "--json", "--timeout", "120", cwd=tmp_path)
    checks = found(done)
    assert set(checks) == set(CHECKS)
    failures = [row for row in checks.values() if row["verdict"] == "fail"]
    assert (done.code, json.loads(done.out)["ok"]) == ((1, False) if failures else (0, True))
    assert checks["all-reduce"]["verdict"] in ("pass", "warn")
    assert " MiB over 2 ranks by gloo: " in checks["all-reduce"]["found"]
    assert checks["folder"]["verdict"] == "pass"
    assert all(row["fix"] for row in checks.values() if row["verdict"] != "pass")
    if not failures:
        assert list((tmp_path / "runs").iterdir()) == [], "the job's folder goes when all is well"


def test_a_fault_is_told_with_what_mends_it_and_ends_with_1(tmp_path: Path) -> None:
    done = unitrain("doctor", cwd=tmp_path, GLOO_SOCKET_IFNAME="nope0", NCCL_P2P_DISABLE="1", RANK="3", WORLD_SIZE="4")
    assert done.code == 1
    lines = done.out.splitlines()
    (interface,) = [line for line in lines if "GLOO_SOCKET_IFNAME=nope0" in line]
    assert interface.startswith("fail  variables ")
    assert "unset GLOO_SOCKET_IFNAME, or name an interface" in lines[lines.index(interface) + 1]
    (reduce,) = [line for line in lines if "all-reduce" in line]
    assert reduce.startswith("fail")
    assert [line for line in lines if line.startswith("warn  variables ") and "NCCL_P2P_DISABLE=1" in line]
    (shell,) = [line for line in lines if line.startswith("warn  shell ")]
    assert " RANK, " in shell and "WORLD_SIZE" in shell and " left" in shell
    (run,) = (tmp_path / "runs").iterdir()
    assert lines[-1] == f"the job's folder stays: {run}"


def test_a_job_that_does_not_answer_in_time_is_a_finding_and_is_ended(tmp_path: Path) -> None:
    done = unitrain("doctor", "--json", "--timeout", "1", "--run-dir", "here", cwd=tmp_path)
    assert done.code == 1
    job = found(done)["job"]
    assert (job["verdict"], job["found"].startswith("still running after 1 s")) == ("fail", True)
    state = json.loads(unitrain("status", "here", "--json", cwd=tmp_path).out)["state"]
    assert state in ("cancelled", "done"), "it may just have come to its end"


def test_what_cannot_be_asked_is_refused(tmp_path: Path) -> None:
    refused = unitrain("doctor", "--launcher", "torchrun", cwd=tmp_path)
    assert refused.code == 78
    assert "use --launcher local" in refused.last_line
    nowhere = unitrain("doctor", "--run-dir", "/proc/nowhere", cwd=tmp_path)
    assert nowhere.code == 78
    assert "the run's folder cannot be made" in nowhere.last_line


def test_two_hosts_are_looked_at_and_a_name_that_leads_to_its_own_loopback_is_found(tmp_path: Path) -> None:
    with system_of("ssh") as hosts:
        asked = [f"launcher.options.{key}={json.dumps(value)}" for key, value in hosts.options.items()]
        command = ["doctor", "--json", "--launcher", "ssh", "-N", "2", *asked]
        checks = found(unitrain(*command, cwd=tmp_path))
        assert {row["verdict"] for name, row in checks.items() if name in BETWEEN} == {"pass"}
        assert " over 2 ranks by gloo" in checks["all-reduce"]["found"]
        assert checks["address"]["nodes"] == ["h1", "h2"]

        # as Debian's installer has it
        (tmp_path / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 h2\n{hosts.lab.address('h1')} h1\n")
        hosts.lab.run("h2", "mount", "--bind", str(tmp_path / "hosts"), "/etc/hosts")
        rows = json.loads(unitrain(*command, cwd=tmp_path).out)["checks"]
        (bad,) = [row for row in rows if row["check"] == "address" and row["verdict"] != "pass"]
        assert bad["nodes"] == ["h2"]
        assert "the name h2 leads to 127.0.1.1" in bad["found"]
        (speed,) = [row for row in rows if row["check"] == "all-reduce"]
        assert speed["verdict"] == "pass", "agents tell gloo its interface"
