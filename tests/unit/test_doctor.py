"""The doctor's judgement, by facts; and what several ranks find out together, by threads that stand for nodes."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from unitrain.doctor import between
from unitrain.doctor.finding import Finding, Verdict, compared, failed, passed, rows, warned, worst
from unitrain.doctor.machine import GIB, MIB, UNLIMITED, Machine, judge, leftovers, look
from unitrain.doctor.visit import recipe_for
from unitrain.errors import UserError
from unitrain.meeting import Meeting, free_port
from unitrain.recipe import LauncherRecipe
from unitrain.world import World

pytestmark = pytest.mark.fast

GOOD = Machine(
    host="node1",
    addresses=("10.0.0.1",),
    interfaces=("lo", "eth0", "ib0"),
    open_files=65536,
    most_open_files=65536,
    locked_bytes=UNLIMITED,
    infiniband=True,
    shared_bytes=8 * GIB,
    disk_bytes=500 * GIB,
    disk="/shared/runs/x",
    variables={"NCCL_DEBUG": "WARN", "NCCL_SOCKET_IFNAME": "eth"},
    cores=8,
    torch=True,
)

# what is not good, on how many nodes, and: check, verdict, words of what was found, words of the fix
CASES: list[tuple[dict[str, Any], int, str, Verdict, str, str]] = [
    ({"addresses": ("127.0.1.1",)}, 2, "address", Verdict.FAIL, "node1 leads to 127.0.1.1", "/etc/hosts on node1"),
    ({"addresses": ("127.0.1.1", "::1")}, 1, "address", Verdict.WARN, "127.0.1.1, ::1", "harmless on one machine"),
    (
        {"addresses": ("127.0.1.1",), "variables": {"GLOO_SOCKET_IFNAME": "eth0"}},
        *(2, "address", Verdict.WARN, "gloo is told its interface", "/etc/hosts or DNS"),
    ),
    ({"addresses": ()}, 2, "address", Verdict.FAIL, "leads nowhere", "/etc/hosts or DNS"),
    ({"open_files": 512, "most_open_files": 20000}, 1, "open files", Verdict.FAIL, "512 (at most 20000)", "-n 20000"),
    ({"open_files": 1024, "most_open_files": UNLIMITED}, 1, "open files", Verdict.WARN, "1024", "ulimit -n 65536"),
    ({"locked_bytes": 64 << 10}, 2, "locked memory", Verdict.FAIL, "0 MiB, and InfiniBand", "ulimit -l unlimited"),
    ({"shared_bytes": 64 * MIB}, 1, "shared memory", Verdict.FAIL, "64 MiB free", "--shm-size"),
    ({"shared_bytes": 600 * MIB}, 1, "shared memory", Verdict.WARN, "600 MiB free", "--shm-size"),
    ({"shared_bytes": None}, 1, "shared memory", Verdict.FAIL, "no /dev/shm", "--shm-size"),
    ({"disk_bytes": 100 * MIB}, 1, "disk", Verdict.FAIL, "100 MiB free at /shared/runs/x", "checkpoint.path"),
    ({"disk_bytes": 5 * GIB}, 1, "disk", Verdict.WARN, "5.0 GiB free", "checkpoint.path"),
    ({"disk_bytes": None}, 1, "disk", Verdict.FAIL, "cannot be asked", "--run-dir"),
    ({"variables": {"NCCL_P2P_DISABLE": "1"}}, 1, "variables", Verdict.WARN, "NCCL_P2P_DISABLE=1", "unset NCCL_P2P_D"),
    ({"variables": {"GLOO_SOCKET_IFNAME": "en0"}}, 1, "variables", Verdict.FAIL, "only lo, eth0, ib0", "unset GLOO_"),
    ({"variables": {"NCCL_SOCKET_IFNAME": "=eth"}}, 1, "variables", Verdict.FAIL, "=eth, and there are", "unset NCCL_"),
    ({"cores": 1}, 1, "cores", Verdict.WARN, "1", "cpus_per_task"),
    ({"torch": False}, 1, "torch", Verdict.WARN, "not installed", "pip install torch"),
]  # fmt: skip


def test_a_good_machine_passes_everything() -> None:
    assert {finding.verdict for nodes in (1, 2) for finding in judge(GOOD, nodes)} == {Verdict.PASS}


@pytest.mark.parametrize(("facts", "nodes", "check", "verdict", "found", "fix"), CASES)
def test_what_is_wrong_with_a_machine_is_one_finding_with_a_line_that_mends_it(
    facts: dict[str, Any], nodes: int, check: str, verdict: Verdict, found: str, fix: str
) -> None:
    (bad,) = [one for one in judge(replace(GOOD, **facts), nodes) if one.verdict is not Verdict.PASS]
    assert (bad.check, bad.verdict) == (check, verdict)
    assert found in bad.found
    assert fix in bad.fix
    assert "\n" not in bad.fix


@pytest.mark.parametrize(
    "variables",
    [{"NCCL_SOCKET_IFNAME": value} for value in ("eth", "eth0,ib", "=ib0", "^docker,lo")]
    + [{"NCCL_DEBUG": "INFO"}, {}],
)
def test_variables_that_only_say_where_to_look_are_left_alone(variables: dict[str, str]) -> None:
    verdicts = [one.verdict for one in judge(replace(GOOD, variables=variables), 2)]
    assert set(verdicts) == {Verdict.PASS}


def test_this_machine_can_be_looked_at(tmp_path: Path) -> None:
    seen = look(tmp_path)
    assert seen.host == socket.gethostname()
    assert seen.disk_bytes and seen.cores and "lo" in seen.interfaces
    assert look(tmp_path / "gone").disk_bytes is None


def test_a_shell_that_was_a_rank_is_told_so() -> None:
    (one,) = leftovers({"RANK": "0", "MASTER_PORT": "1", "HOME": "/"})
    assert (one.verdict, one.fix) == (Verdict.WARN, "unset RANK MASTER_PORT")
    assert leftovers({"HOME": "/"})[0].verdict is Verdict.PASS


def test_findings_of_many_nodes_become_few_rows() -> None:
    nodes = [
        [replace(one, node=f"node{number}") for one in (passed("a", "ok"), warned("b", "low", "more"))]
        for number in range(3)
    ]
    nodes[1][1] = replace(failed("b", "none", "some"), node="node1")
    found = rows([one for node in nodes for one in node])
    assert [(row.check, row.verdict, row.nodes) for row in found] == [
        ("a", "pass", ("node0", "node1", "node2")),
        ("b", "warn", ("node0", "node2")),
        ("b", "fail", ("node1",)),
    ]
    assert worst(found) is Verdict.FAIL
    assert worst([]) is Verdict.PASS


def test_the_node_that_differs_from_most_is_named() -> None:
    found = compared("versions", [("a", "1"), ("b", "1"), ("c", "2")], "same")
    assert [(one.node, one.verdict, one.found) for one in found] == [("c", "fail", "2, others 1")]
    torch = {"python": "3.11.7", "torch": "2.13", "system": "x"}
    assert [one.verdict for one in between.versions_agree([("a", torch), ("b", {**torch, "system": "y"})])] == ["pass"]
    (one,) = between.versions_agree([("a", torch), ("b", torch), ("c", {"python": "3.11.7", "system": "x"})])
    assert (one.node, one.found) == ("c", "no torch, others torch 2.13")


def test_names_that_lead_nowhere_or_here_are_told() -> None:
    (one,) = between.names_resolve(["node-that-is-not.invalid", "localhost", "me"], "me")
    assert one.verdict is Verdict.FAIL
    assert "node-that-is-not.invalid (unknown), localhost (127.0.0.1" in one.found
    assert between.names_resolve(["me", "me"], "me") == []


def test_the_doctors_job_fits_any_launcher_with_an_agent() -> None:
    asked = LauncherRecipe(name="slurm", nodes=64, nproc=8, options={"partition": "gpu"})
    made = recipe_for(asked)
    assert made.launcher.options == {"partition": "gpu", "entry": "unitrain.doctor.node:main"}
    assert made.train.global_batch >= 64 * 8
    assert recipe_for(LauncherRecipe()).launcher.nproc == 2
    assert recipe_for(LauncherRecipe()).launcher.options["detached"] is True
    with pytest.raises(UserError, match="use --launcher local"):
        recipe_for(LauncherRecipe(name="torchrun"))


# --- several ranks -----------------------------------------------------------------------------------------------

HOSTS = ["node0", "node1", "node2"]
NODES = dict(enumerate(HOSTS))


def together(act: Callable[[Meeting], list[Finding]], size: int = 3) -> list[list[Finding]]:
    """What each of several ranks says; each is a thread."""
    coordinator = f"127.0.0.1:{free_port('127.0.0.1')}"
    said: dict[int, list[Finding]] = {}

    def be(rank: int) -> None:
        meeting = Meeting(World(rank=rank, size=size, nodes=size, node=rank, coordinator=coordinator), timeout=10)
        try:
            said[rank] = act(meeting)
            meeting.barrier()
        finally:
            meeting.close()

    threads = [threading.Thread(target=be, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return [said[rank] for rank in range(size)]


def test_a_shared_folder_is_seen_by_all(tmp_path: Path) -> None:
    found = together(lambda meeting: between.folder_is_shared(meeting, tmp_path, NODES))
    assert [[one.verdict for one in node] for node in found] == [["pass"]] * 3


def test_a_folder_of_its_own_is_noticed_by_everybody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(between, "SEE_SECONDS", 0.3)

    def act(meeting: Meeting) -> list[Finding]:
        folder = tmp_path / ("own" if meeting.world.rank == 2 else "shared")
        return between.folder_is_shared(meeting, folder, NODES)

    found = [node[0] for node in together(act)]
    assert [one.verdict for one in found] == ["fail"] * 3
    assert "sees nothing of node2" in found[0].found
    assert "sees nothing of node0, node1" in found[2].found


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "doctor").write_text("a file where the folder should be")
    found = [node[0] for node in together(lambda meeting: between.folder_is_shared(meeting, tmp_path, NODES))]
    assert {one.verdict for one in found} == {"fail"}
    assert "cannot be written and renamed in" in found[0].found


def test_ports_between_all_pairs_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    found = together(lambda meeting: between.ports_reach(meeting, NODES))
    assert [node[0].verdict for node in found] == ["pass"] * 3

    monkeypatch.setattr(between, "KNOCK_SECONDS", 0.2)
    monkeypatch.setattr(between, "_own_address", lambda world: "127.0.0.1" if world.rank else "203.0.113.1")
    first, second, _ = (node[0] for node in together(lambda meeting: between.ports_reach(meeting, NODES)))
    assert first.verdict == "pass", "it reaches the others, though they do not reach it"
    assert (second.verdict, "cannot connect to node0 at 203.0.113.1:" in second.found) == ("fail", True)


@pytest.mark.parametrize(("skew", "verdict"), [(0.0, "pass"), (-2.0, "warn"), (90.0, "fail")])
def test_a_clock_that_is_off_is_named(skew: float, verdict: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, real = threading.local(), time.time
    monkeypatch.setattr(time, "time", lambda: real() + getattr(mine, "skew", 0.0))

    def act(meeting: Meeting) -> list[Finding]:
        mine.skew = skew if meeting.world.rank == 1 else 0.0
        return between.clocks_agree(meeting, HOSTS)

    first, *others = together(act)
    assert others == [[], []], "the first rank speaks for all"
    (one,) = first
    assert one.verdict == verdict
    assert ("node1" in one.found) is (verdict != "pass")


def test_a_framework_that_is_not_there_and_one_that_fails_end_no_visit(monkeypatch: pytest.MonkeyPatch) -> None:
    def act(meeting: Meeting) -> list[Finding]:
        return between.ranks_sum(meeting)

    probes: list[Callable[..., Any]] = []
    monkeypatch.setattr("unitrain.registry.resolve", lambda path: probes[-1])

    def absent(world: World, coordinator: str) -> Any:
        raise ModuleNotFoundError("No module named 'torch'")

    def wrong(world: World, coordinator: str) -> Any:
        if world.rank == 1:
            raise RuntimeError("connect timeout\nand much more")
        return {
            "version": "2",
            "gpus": 0,
            "gpu": "",
            "device_files": 1,
            "why": "old driver",
            "bytes": 1,
            "seconds": 1.0,
        }

    probes.append(absent)
    assert together(act) == [[], [], []]
    probes.append(wrong)
    devices, speed = together(act)[0]
    assert (devices.check, devices.verdict) == ("torch", "fail")
    assert "sees none of 1 GPUs (old driver)" in devices.found
    assert (speed.verdict, speed.found) == ("fail", "rank 1: RuntimeError: connect timeout")
