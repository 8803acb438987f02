"""Hosts and options of `ssh` and `mpi`: what is understood, what is refused, and that no value can be anything else."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from unitrain.errors import Refused, UserError
from unitrain.launcher import Job
from unitrain.launchers import _ssh_team
from unitrain.launchers._hosts import Host, chosen_variables, hosts_of
from unitrain.launchers._mpi_run import find_mpirun
from unitrain.launchers.mpi import MPI
from unitrain.launchers.ssh import SSH
from unitrain.recipe import LauncherRecipe, Recipe

pytestmark = pytest.mark.fast

RUN = Path("/runs/gpt-1")
TWO = {"hosts": ["h1", "h2"]}
HOSTILE = [
    "",
    "-oProxyCommand=touch /tmp/owned",
    "h1 -oProxyCommand=id",
    "h1\n-oProxyCommand=id",
    "h1;id",
    "$(id)",
    "`id`",
    "h1\x00",
    "a\u2028b",
    "h1 # slots=9",
    "user@-h1",
    "-u@h1",
    "h1:22:22",
    "h1:-1",
    "h1:0",
    "h1:65536",
    "[h1]",
    "a@b@c",
    "h1|id",
    "../h1",
    17,
    None,
    ["h1"],
    {"name": "h1"},
]
WORDS_OF = {"ssh": ("ssh_config", "identity", "python", "folder", "address"), "mpi": ("mpirun", "python", "identity")}


def problems(name: str, options: Mapping[str, Any], *, nodes: int = 2, nproc: int = 1) -> list[str]:
    launcher = LauncherRecipe(name=name, nodes=nodes, nproc=nproc, options=dict(options))
    kind = {"ssh": SSH, "mpi": MPI}[name]
    return [f"{found.what}; {found.instead}" for found in kind.problems(Recipe(trainer="m:M", launcher=launcher))]


def job(run_dir: Path = RUN, *, nodes: int = 2, **options: Any) -> Job:
    return Job(run_id="gpt-1", run_dir=run_dir, nodes=nodes, nproc=1, options={**TWO, **options})


def commands(run: Job) -> list[list[str]]:
    """What reaches each host."""
    return [shlex.split(node["command"]) for node in json.loads(SSH().render(run).files[_ssh_team.FILE])["nodes"]]


# --- hosts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("h1", Host(name="h1")),
        ("10.0.0.1", Host(name="10.0.0.1")),
        ("gpu_1.rack-2.example.org", Host(name="gpu_1.rack-2.example.org")),
        ("me@h1", Host(name="h1", user="me")),
        ("h1:2222", Host(name="h1", port=2222)),
        ("me.too@h1:22", Host(name="h1", user="me.too", port=22)),
        ("[fd00::1]", Host(name="fd00::1")),
        ("me@[fd00::1]:22", Host(name="fd00::1", user="me", port=22)),
    ],
)
def test_a_host_is_written_in_three_forms(text: str, host: Host) -> None:
    assert Host.parse(text) == host


@pytest.mark.parametrize("text", HOSTILE, ids=repr)
@pytest.mark.parametrize("name", ["ssh", "mpi"])
def test_nothing_else_is_a_host(name: str, text: Any) -> None:
    assert problems(name, {"hosts": ["h1", text]})
    with pytest.raises(Refused):
        {"ssh": SSH, "mpi": MPI}[name]().render(job(hosts=["h1", text]))


def test_hosts_may_stand_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text("# rack 1\nh1 slots=4\nme@h2:2222 slots=4 max_slots=8  # slow\n\nh3\n")
    assert [(str(host), host.slots) for host in hosts_of({"hostfile": str(file)})] == [
        ("h1", 4),
        ("me@h2", 4),
        ("h3", None),
    ]
    assert problems("ssh", {"hostfile": str(file)}, nodes=2, nproc=4) == []
    assert "h1 has slots=4, and launcher.nproc is 5" in problems("ssh", {"hostfile": str(file)}, nproc=5)[0]
    assert "lists 3 hosts, and launcher.nodes is 4" in problems("ssh", {"hostfile": str(file)}, nodes=4)[0]
    file.write_text("h1\nh2 slots=x\n")
    assert "line 2: 'slots=x' is not understood" in problems("ssh", {"hostfile": str(file)})[0]
    file.write_bytes(b"\xff\xfe")
    assert "cannot be read" in problems("ssh", {"hostfile": str(file)})[0]


@pytest.mark.parametrize(
    ("name", "options", "nodes", "what"),
    [
        ("ssh", {}, 2, "names no hosts"),
        ("ssh", {"hosts": ["h1"], "hostfile": "x"}, 2, "give one of them"),
        ("ssh", {"hosts": ["h1", "h2", "h3"]}, 2, "names 3 hosts, and launcher.nodes is 2"),
        ("ssh", {"hosts": ["h1", "me@h1"]}, 2, "named more than once"),
        ("ssh", {"hostfile": "/no/such/file"}, 2, "/no/such/file cannot be read"),
        ("ssh", {"hosts": ["localhost", "h2"]}, 2, "launcher.options.address"),
        ("ssh", {**TWO, "address": "127.0.0.1"}, 2, "launcher.options.address"),
        ("ssh", {**TWO, "port": 0}, 2, "a whole number from 1 to 65535"),
        ("ssh", {**TWO, "port": True}, 2, "port is True"),
        ("ssh", {**TWO, "silence_seconds": 1}, 2, "from 3 to 86400"),
        ("ssh", {**TWO, "min_nodes": 3}, 2, "from 1 to 2"),
        ("ssh", {**TWO, "detached": "yes"}, 2, "give true or false"),
        ("ssh", {**TWO, "environment": "HF_TOKEN"}, 2, "a list of names"),
        ("ssh", {**TWO, "environment": ["HF_TOKEN=hf_123"]}, 2, "a list of names"),
        ("ssh", {**TWO, "grace": 3}, 2, "has no option 'grace'; it has hosts"),
        ("mpi", {}, 2, "names no hosts"),
        ("mpi", {"hosts": ["me@h1", "h2"]}, 2, "names a user or a port"),
        ("mpi", {**TWO, "min_nodes": 1}, 2, "use --launcher ssh"),
        ("mpi", {**TWO, "environment": ["NCCL_*"]}, 2, "name each variable"),
        ("mpi", {**TWO, "mca": {"btl tcp": "x"}}, 2, "give settings as {name: value}"),
        ("mpi", {**TWO, "mca": {"btl": "--x"}}, 2, "give settings as {name: value}"),
        ("mpi", {**TWO, "ssh_config": "/a b"}, 2, "no path with spaces"),
    ],
)
def test_a_refusal_says_what_to_do(name: str, options: dict[str, Any], nodes: int, what: str) -> None:
    (said,) = problems(name, options, nodes=nodes)
    assert what in said


def test_one_node_of_mpi_is_this_machine() -> None:
    assert problems("mpi", {}, nodes=1) == []


# --- values that want to be something else -----------------------------------------------------------------------


@pytest.mark.parametrize("value", ["", "-x", "--", "a\nb", "a\x1bb", "a\x00b", 3, ["a"], {"a": 1}], ids=repr)
@pytest.mark.parametrize(("name", "option"), [(name, word) for name, words in WORDS_OF.items() for word in words])
def test_a_word_is_one_word(name: str, option: str, value: Any) -> None:
    assert problems(name, {**TWO, option: value})


@pytest.mark.parametrize("name", ["x; touch owned", "$(touch owned)", "a b", "it's", '"', "`touch owned`", "&", "*"])
def test_a_name_of_a_folder_runs_nothing_on_a_host(name: str, tmp_path: Path) -> None:
    *reach, far_end = commands(job(Path("/runs") / name, python="printf", folder=f"/work/{name}"))[1]
    assert reach[-2:] == ["--", "h2"]
    # As the shell of a host reads it; printf stands for Python.
    shown = far_end.replace("exec printf", "exec printf '%s\\n'")
    done = subprocess.run(["sh", "-c", shown], cwd=tmp_path, capture_output=True, text=True, check=True)
    place = far_end.split()[-1]
    words = ["-m", "unitrain.launchers._ssh_host", f"/runs/{name}", "--node", "1", "--meet", place]
    assert done.stdout.splitlines() == words
    assert list(tmp_path.iterdir()) == []


def test_a_folder_whose_name_has_control_characters_is_refused() -> None:
    for kind in (SSH, MPI):
        with pytest.raises(Refused, match="control characters"):
            kind().render(job(Path("/runs/a\nb")))


def test_ssh_asks_nothing_and_forwards_nothing() -> None:
    for command in commands(job(identity="/keys/one", hosts=["h1", "me@h2:2222"])):
        words = shlex.join(command)
        for needed in ("-T -x -a", "BatchMode=yes", "ClearAllForwardings=yes", "ControlPath=none", "-i /keys/one"):
            assert needed in words
    assert "-p 2222 -l me -- h2" in words


def test_two_runs_meet_at_other_ports() -> None:
    others = [commands(Job(run_id=f"gpt-{number}", run_dir=RUN, nodes=2, nproc=1, options=TWO))[0] for number in (1, 2)]
    places = [shlex.split(command[-1])[-1] for command in others]
    assert places[0] != places[1]
    assert all(20000 <= int(place.rpartition(":")[2]) < 30000 for place in places)


def test_variables_are_chosen_by_name_and_by_beginning() -> None:
    environ = {"HF_TOKEN": "x", "NCCL_DEBUG": "INFO", "NCCL_IB_HCA": "mlx5", "HOME": "/h"}
    chosen = chosen_variables(["HF_TOKEN", "NCCL_*", "GLOO_*"], environ)
    assert chosen == {"HF_TOKEN": "x", "NCCL_DEBUG": "INFO", "NCCL_IB_HCA": "mlx5"}
    with pytest.raises(ValueError, match="names WANDB_KEY, which is not set here"):
        chosen_variables(["WANDB_KEY"], environ)


def test_a_plan_that_was_damaged_is_said_to_be(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no launcher 'ssh' has started it"):
        _ssh_team.Plan.read(tmp_path)
    (tmp_path / _ssh_team.FILE).write_text('{"nodes": 3}')
    with pytest.raises(UserError, match="is damaged"):
        _ssh_team.Plan.read(tmp_path)


def test_a_missing_mpirun_is_said_with_how_to_get_it() -> None:
    with pytest.raises(UserError, match=r"no no-such-mpirun on this machine; pip install 'unitrain\[mpi\]'"):
        find_mpirun("no-such-mpirun")
