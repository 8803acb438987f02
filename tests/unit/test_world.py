"""Who a process is among the ranks, by the variables of whatever started it."""

from __future__ import annotations

import json
import os
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unitrain.errors import UserError
from unitrain.world import World

pytestmark = pytest.mark.fast

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "TORCHELASTIC_RESTART_COUNT": "3",
    "MASTER_ADDR": "node7",
    "MASTER_PORT": "29500",
    "OMP_NUM_THREADS": "2",
}
MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "4000",
}
SRUN = {
    "SLURM_PROCID": "6",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "2",
    "SLURM_NODEID": "1",
    "SLURM_NNODES": "2",
    "SLURM_RESTART_COUNT": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_ID": "123456",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "4000",
}


def test_a_process_that_nobody_started_is_alone() -> None:
    world = World.from_environment({"HOME": "/root"})
    assert world == World()
    assert (world.rank, world.size, world.starter, world.coordinator, world.threads) == (0, 1, "alone", "", None)
    assert world.first


def test_torchrun_tells_everything() -> None:
    world = World.from_environment(TORCHRUN)
    assert (world.rank, world.size, world.local_rank, world.local_size) == (5, 8, 1, 4)
    assert (world.node, world.nodes, world.generation, world.starter, world.threads) == (1, 2, 3, "torchrun", 2)
    assert world.coordinator_address == ("node7", 29500)
    assert not world.first


def test_our_agent_is_torchrun_with_somebody_who_listens() -> None:
    world = World.from_environment({**TORCHRUN, "UNITRAIN_AGENT_FD": "9"})
    assert (world.starter, world.agent_fd) == ("agent", 9)


def test_mpirun_tells_no_nodes_and_they_follow() -> None:
    world = World.from_environment(MPIRUN)
    assert (world.rank, world.size, world.local_rank, world.local_size) == (3, 4, 1, 2)
    assert (world.node, world.nodes, world.starter) == (1, 2, "mpirun")


def test_srun_tells_no_local_size_and_it_follows() -> None:
    world = World.from_environment(SRUN)
    assert (world.rank, world.size, world.local_rank, world.local_size) == (6, 8, 2, 4)
    assert (world.node, world.nodes, world.generation, world.starter) == (1, 2, 1, "srun")


@pytest.mark.parametrize("step", ["", "4294967291"])
def test_the_script_of_an_allocation_is_no_rank(step: str) -> None:
    assert World.from_environment({**SRUN, "SLURM_STEP_ID": step}).starter == "alone"
    assert World.from_environment({key: value for key, value in SRUN.items() if key != "SLURM_STEP_ID"}).size == 1


def test_torchrun_inside_an_allocation_wins_over_srun_and_mpirun() -> None:
    assert World.from_environment({**SRUN, **MPIRUN, **TORCHRUN}).rank == 5
    assert World.from_environment({**SRUN, **MPIRUN}).starter == "mpirun"


def test_ranks_of_one_node_derive_the_same_port_and_two_jobs_another() -> None:
    one_node = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "77"}
    world = World.from_environment(one_node)
    assert world.coordinator == "127.0.0.1:20077"
    assert World.from_environment({**one_node, "SLURM_PROCID": "0"}).coordinator == world.coordinator
    assert World.from_environment({**one_node, "SLURM_JOB_ID": "78"}).coordinator != world.coordinator
    assert (
        World.from_environment({"RANK": "0", "WORLD_SIZE": "2"}).coordinator
        == f"127.0.0.1:{20000 + os.getppid() % 10000}"
    )
    assert World.from_environment({"RANK": "0", "WORLD_SIZE": "1"}).coordinator == ""


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 does not fit WORLD_SIZE=2: ranks count from 0"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK=-1 does not fit WORLD_SIZE=2: ranks count from 0"),
        ({"RANK": "0"}, "RANK is set but WORLD_SIZE is not: set both, or neither to run alone"),
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE is set but RANK is not: set both, or neither to run alone"),
        ({"RANK": "zero", "WORLD_SIZE": "2"}, "the environment has RANK='zero', which is not a whole number"),
        ({"RANK": "", "WORLD_SIZE": "2"}, "the environment has RANK='', which is not a whole number"),
        ({"OMP_NUM_THREADS": "many"}, "the environment has OMP_NUM_THREADS='many', which is not a whole number"),
        (
            {key: value for key, value in TORCHRUN.items() if key != "MASTER_PORT"},
            "2 nodes were started by torchrun, but MASTER_ADDR and MASTER_PORT are not both set",
        ),
    ],
)
def test_variables_that_contradict_each_other_are_named(environ: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        World.from_environment(environ)


def test_a_list_of_threads_counts_by_its_first() -> None:
    assert World.from_environment({"OMP_NUM_THREADS": "4,2"}).threads == 4


@settings(deadline=None)
@given(nodes=st.integers(1, 5), nproc=st.integers(1, 8), data=st.data())
def test_what_torchrun_says_and_what_is_derived_agree(nodes: int, nproc: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, nodes * nproc - 1))
    common = {"MASTER_ADDR": "a", "MASTER_PORT": "1", "RANK": str(rank), "WORLD_SIZE": str(nodes * nproc)}
    told = World.from_environment(
        {
            **common,
            "LOCAL_RANK": str(rank % nproc),
            "LOCAL_WORLD_SIZE": str(nproc),
            "GROUP_RANK": str(rank // nproc),
            "GROUP_WORLD_SIZE": str(nodes),
        }
    )
    assert World.from_environment({**common, "LOCAL_WORLD_SIZE": str(nproc)}) == told
    assert World.from_environment({**common, "GROUP_WORLD_SIZE": str(nodes)}) == told


def test_the_agent_hears_one_line_a_message_and_its_end_is_no_error() -> None:
    reader, writer = os.pipe()
    world = World(agent_fd=writer)
    world.tell_agent(kind="progress", step=3)
    world.tell_agent(kind="error", message="two\nlines")
    lines = os.read(reader, 4096).decode().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"kind": "progress", "step": 3},
        {"kind": "error", "message": "two\nlines"},
    ]
    os.close(reader)
    world.tell_agent(kind="progress")
    os.close(writer)
    World().tell_agent(kind="progress")


def test_the_environment_of_this_process_is_read_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert World.from_environment() == World.from_environment(TORCHRUN)
