"""What may be asked of Slurm, what its answers mean, and what the batch script does with every end of a run."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from unitrain.agent.job import AGENT_OPTIONS, TEAM_OPTIONS
from unitrain.cli.sweep import combinations
from unitrain.errors import RecipeError, Refused, UserError
from unitrain.launcher import Job
from unitrain.launchers._slurm_options import DIRECTIVES, OPTIONS, seconds
from unitrain.launchers._slurm_queue import Seen, read_sacct, read_squeue, status_of
from unitrain.launchers.slurm import SCRIPT, Slurm, _environ
from unitrain.recipe import CheckpointRecipe, LauncherRecipe, Recipe

RUN = Path("/runs/gpt-1")


def problems(options: Mapping[str, Any], *, nodes: int = 2) -> list[str]:
    recipe = Recipe(trainer="mine:Mine", launcher=LauncherRecipe(name="slurm", nodes=nodes, nproc=2, options=options))
    return [f"{problem.what}; {problem.instead}" for problem in Slurm.problems(recipe)]


def job(run_dir: Path = RUN, *, run_id: str = "", nodes: int = 1, **options: Any) -> Job:
    return Job(run_id=run_id or run_dir.name, run_dir=run_dir, nodes=nodes, nproc=2, options=options)


# --- options -----------------------------------------------------------------------------------------------------

GOOD = {
    "partition": ["gpu", "gpu,cpu-long"],
    "account": ["proj_42"],
    "qos": ["high"],
    "time": [30, "4:00:00", "1-12", "2-00:00:00"],
    "gpus_per_node": [4, "a100:4"],
    "gres": ["gpu:4", "gpu:a100:4,nvme:1", "tmp:20G"],
    "cpus_per_task": [16],
    "constraint": ["a100&ib", "[rack1|rack2]", "(intel|amd)*2"],
    "exclusive": [True, "user"],
    "mem": [0, "64G"],
    "mail_type": ["END,FAIL"],
    "mail_user": ["me+slurm@example.org"],
    "dependency": ["afterok:12", "afterany:12:13_4,singleton", "after:7+10?afterok:8_*"],
    "reservation": ["maint_1"],
    "nodelist": ["node[1-4,7],gpu3"],
    "exclude": ["node9"],
    "comment": ["lr search, second round (#3)"],
    "directives": [["--licenses=fluent:2", "--contiguous", "--switches=1@10:00"]],
    "requeue": [False],
    "max_requeues": [0, 3],
    "warn_seconds": [60],
    "setup": ["env.sh", "/site/env.sh"],
    "python": ["/opt/python 3/bin/python"],
    "container_image": ["/images/torch.sif", "registry.local/unitrain:0.1-torch"],
    "max_parallel": [4],
    "grace_seconds": [60],
    "entry": ["my.module:main"],
    "min_nodes": [1],
    "join_seconds": [300.0],
    "rejoin_seconds": [0],
}


@pytest.mark.fast
@pytest.mark.parametrize("key", GOOD)
def test_an_option_takes_what_it_is_for_and_the_script_has_it(key: str) -> None:
    for value in GOOD[key]:
        assert problems({key: value}) == []
        script = Slurm().render(job(nodes=2, **{key: value})).files[SCRIPT]
        if key in DIRECTIVES and value is not True:
            assert re.search(rf'^#SBATCH --{DIRECTIVES[key].flag}="?{re.escape(str(value))}"?$', script, re.MULTILINE)
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


@pytest.mark.fast
def test_every_option_is_tried() -> None:
    assert set(OPTIONS) >= {*AGENT_OPTIONS, *TEAM_OPTIONS}
    assert set(OPTIONS) == set(GOOD) | {"container_mounts"}
    assert problems({"container_image": "x.sif", "container_mounts": ["/data", "/a:/b"]}) == []


@pytest.mark.fast
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"partitoin": "gpu"}, "no option 'partitoin', did you mean 'partition'?; it has partition, account"),
        ({"array": "0-3"}, "would start the same run several times in one folder; use unitrain launch --sweep"),
        ({"hetjob": True}, "no heterogeneous jobs: every node must have the same number of ranks; ask for nodes of"),
        ({"time": "forever"}, "launcher.options.time is 'forever'; give minutes, or a text such as '4:00:00'"),
        ({"time": 1}, "time=1 is over before the warning 120 s ahead of its end; raise it, or set"),
        ({"gpus_per_node": 2, "gres": "gpu:2"}, "GPUs by gpus_per_node and by gres; keep one"),
        ({"container_mounts": ["/data"]}, "needs a container; give container_image"),
        ({"min_nodes": 3}, "min_nodes is 3 of launcher.nodes=2; give a number from 1 to 2"),
        ({"cpus_per_task": True}, "cpus_per_task is True; give a whole number from 1"),
        ({"directives": ["--nodes=4"]}, "directives is ['--nodes=4']; give any of --acctg-freq, --begin"),
        ({"directives": ["--time=4"]}, "give launcher.options.time in place of --time"),
        ({"directives": ["--wrap=id"]}, "give any of --acctg-freq"),
        ({"directives": "--nice=1"}, "give a list"),
    ],
)
def test_a_refusal_comes_with_an_alternative(options: dict[str, Any], said: str) -> None:
    (problem,) = problems(options)
    assert said in problem


@pytest.mark.fast
def test_a_job_without_checkpoints_is_not_started_again() -> None:
    launcher = LauncherRecipe(name="slurm")
    recipe = Recipe(trainer="mine:Mine", checkpoint=CheckpointRecipe(every=0), launcher=launcher)
    (problem,) = Slurm.problems(recipe)
    assert problem.instead == "set checkpoint.every, or launcher.options.requeue=false"
    launcher = LauncherRecipe(name="slurm", options={"requeue": False})
    assert Slurm.problems(recipe.replace(launcher=launcher)) == []
    assert "#SBATCH --no-requeue\n" in Slurm().render(job(requeue=False)).files[SCRIPT]


@pytest.mark.fast
def test_time_limits_are_read_as_sbatch_reads_them() -> None:
    expected = {30: 1800, "30": 1800, "4:30": 270, "1:00:00": 3600, "1-12": 129600, "1-0:30": 88200, "1-0:0:1": 86401}
    assert {limit: seconds(limit) for limit in expected} == expected


HOSTILE = [
    "x\n#SBATCH --wrap=touch\tpwned",
    "x\n touch pwned",
    "x\rtouch pwned",
    "x\x00touch pwned",
    "x\u2028touch pwned",
    "x\x85touch pwned",
    "\x1b]0;pwned\x07",
    "$(touch pwned)",
    "`touch pwned`",
    "${IFS}touch${IFS}pwned",
    "x; touch pwned",
    "x && touch pwned",
    "x | touch pwned #",
    "x' ; touch pwned ; '",
    'x" --wrap="touch pwned',
    "x' --wrap='touch pwned",
    "x\\",
    "x\\\n--wrap=id",
    "--wrap=touch pwned",
    "-o/dev/null",
    "-",
    "--",
    "x --uid=0",
    "x\t--uid=0",
    "> pwned",
    "<(touch pwned)",
    "x & touch pwned &",
    "{touch,pwned}",
    "*",
    "!!",
    "%s%n",
    "%j/../../x",
    "hetjob",
    "x-HetJob--wrap=id",
    "packjob",
    "x\n#PBS -N other",
    "x\n#BSUB -J other",
    "a" * 5000,
    "",
    " ",
]


@pytest.mark.fast
@pytest.mark.parametrize("key", [*DIRECTIVES, "directives", "setup", "python", "container_image", "container_mounts"])
def test_no_hostile_value_reaches_a_script(key: str) -> None:
    for value in HOSTILE:
        given = [value] if key in ("directives", "container_mounts") else value
        options = {key: given} | ({"container_image": "x.sif"} if key == "container_mounts" else {})
        assert problems(options), f"{key}={value!r} went through"
        with pytest.raises(Refused):
            Slurm().render(job(**options))


@pytest.mark.fast
@pytest.mark.parametrize("value", HOSTILE)
def test_no_hostile_name_reaches_a_script(value: str) -> None:
    with pytest.raises(Refused):
        Slurm().render(job(run_id=value or "\n"))
    if value.strip() and not value.startswith("-"):  # a dash inside a path is a letter
        with pytest.raises(Refused):
            Slurm().render(job(Path("/runs") / f"x{value}", run_id="x"))
    with pytest.raises(Refused):
        Slurm().render_array([job(), job(Path("/runs/gpt-2"), run_id=value or "\n")], Path("/runs/gpt"))
    assert problems({value: "x"})


@pytest.mark.fast
def test_values_of_other_kinds_are_refused() -> None:
    for key in OPTIONS:
        for value in ({"a": 1}, [["x"]], None, 1.5, object()):
            if (key, value) in [(key, 1.5) for key in ("grace_seconds", "join_seconds", "rejoin_seconds")]:
                continue
            assert problems({key: value}), f"{key}={value!r} went through"


@pytest.mark.fast
def test_all_that_a_script_says_of_its_run_is_quoted() -> None:
    folder = Path("/runs/two words/gpt-1")
    script = Slurm().render(job(folder, setup="my env.sh", comment="a # b")).files[SCRIPT]
    own, _, _ = script.partition("\n# From here on")
    directives = [line for line in own.splitlines() if line.startswith("#SBATCH")]
    assert '#SBATCH --output="/runs/two words/gpt-1/slurm-%j.log"' in directives
    assert '#SBATCH --comment="a # b"' in directives
    assert "RUN_DIR='/runs/two words/gpt-1'" in own
    done = subprocess.run(
        ["bash"], input=f'{own}\nprintf "%s\\n" "$RUN_DIR" "$SETUP"', text=True, capture_output=True, check=True
    )
    assert done.stdout == "/runs/two words/gpt-1\nmy env.sh\n"


@pytest.mark.fast
def test_the_job_inherits_no_variable_that_changes_what_was_rendered(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SBATCH_SIGNAL", "SBATCH_EXPORT", "SLURM_MEM_PER_CPU", "SLURM_JOB_ID", "SRUN_CPUS_PER_TASK"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    monkeypatch.setenv("WANDB_MODE", "offline")
    found = _environ()
    assert [name for name in found if name.startswith(("SBATCH", "SLURM", "SRUN"))] == ["SLURM_CONF"]
    assert found["WANDB_MODE"] == "offline"


# --- answers -----------------------------------------------------------------------------------------------------


@pytest.mark.fast
@pytest.mark.parametrize(
    ("seen", "left", "cancelled", "expected"),
    [
        (Seen("PENDING", "Resources"), None, False, ("pending", None, "Resources: waits for nodes that others use")),
        (Seen("PENDING", "BeginTime"), {"exit_code": 75}, False, ("pending", None, "BeginTime: may not start yet")),
        (Seen("PENDING", "QOSMaxJobs"), None, False, ("pending", None, "QOSMaxJobs")),
        (Seen("RUNNING", "node[1-2]"), None, False, ("running", None, "running on node[1-2]")),
        (Seen("COMPLETING", "node1"), {"exit_code": 0}, False, ("running", None, "completing on node1")),
        (Seen("COMPLETED"), {"exit_code": 0}, False, ("done", 0, "")),
        (Seen("COMPLETED", "", 0), None, False, ("done", 0, "")),
        (None, {"exit_code": 0}, False, ("done", 0, "")),
        (Seen("FAILED"), {"exit_code": 70, "error": "row 3"}, False, ("failed", 70, "row 3")),
        (Seen("FAILED", "", 127), None, False, ("failed", 127, "exit code 127")),
        (Seen("FAILED"), None, False, ("failed", None, "Slurm says FAILED, and its agents have left no exit code")),
        (None, None, False, ("failed", None, "Slurm no longer knows the job, and its agents have left no")),
        (None, {"exit_code": "x"}, False, ("failed", None, "Slurm no longer knows the job")),
        (Seen("FAILED"), {"exit_code": 75}, False, ("preempted", 75, "stopped after a save, and not requeued")),
        (Seen("PREEMPTED"), None, False, ("failed", None, "Slurm says PREEMPTED")),
        (Seen("TIMEOUT"), None, False, ("failed", None, "the time limit came before it was saved")),
        (Seen("NODE_FAIL"), None, False, ("failed", None, "a node failed, and the job was not requeued")),
        (Seen("OUT_OF_MEMORY"), {"exit_code": 70, "error": "killed"}, False, ("failed", 70, "killed")),
        (Seen("CANCELLED"), None, False, ("cancelled", 143, "before it began, or without time to save")),
        (Seen("CANCELLED"), {"exit_code": 75}, True, ("cancelled", 75, "stopped after a save")),
        (Seen("FAILED"), {"exit_code": 143}, True, ("cancelled", 143, "stopped by SIGTERM")),
        (None, {"exit_code": 75}, True, ("cancelled", 75, "stopped after a save")),
        (Seen("COMPLETED"), {"exit_code": 0}, True, ("done", 0, "")),
    ],
)
def test_what_slurm_says_and_what_the_agents_left_make_one_state(
    seen: Seen | None, left: dict[str, Any] | None, cancelled: bool, expected: tuple[str, int | None, str]
) -> None:
    status = status_of(seen, left, cancelled=cancelled)
    assert (status.state, status.exit_code) == expected[:2]
    assert status.detail.startswith(expected[2])


@pytest.mark.fast
def test_squeue_and_sacct_are_read_as_they_are_written() -> None:
    assert read_squeue("PENDING||(Resources)\n") == Seen("PENDING", "(Resources)")
    assert read_squeue("PENDING||ReqNodeNotAvail, UnavailableNodes:node2|x\n").why.startswith("ReqNodeNotAvail, ")
    assert read_squeue("RUNNING|node[1-2]|None\n") == Seen("RUNNING", "node[1-2]")
    assert read_sacct("REQUEUED|0:0|node1\nCANCELLED by 0|0:15|node[1-2]\n") == Seen("CANCELLED", "node[1-2]", 0)
    assert read_sacct("\n") is None


# --- sweeps ------------------------------------------------------------------------------------------------------


@pytest.mark.fast
def test_a_sweep_is_every_combination_of_its_values() -> None:
    assert combinations(["optimizer.lr=1e-4,3e-4", "optimizer.betas=[0.9,0.95],[0.9,0.99]"]) == [
        ["optimizer.lr=1e-4", "optimizer.betas=[0.9,0.95]"],
        ["optimizer.lr=1e-4", "optimizer.betas=[0.9,0.99]"],
        ["optimizer.lr=3e-4", "optimizer.betas=[0.9,0.95]"],
        ["optimizer.lr=3e-4", "optimizer.betas=[0.9,0.99]"],
    ]
    assert combinations(["name='a,b',{x: 1, y: 2}"]) == [["name='a,b'"], ["name={x: 1, y: 2}"]]


@pytest.mark.fast
@pytest.mark.parametrize(
    ("sweeps", "said"),
    [
        (["optimizer.lr"], "is not key=value,value"),
        (["optimizer.lr="], "is not key=value,value"),
        (["optimizer.lr=1,,2"], "is not key=value,value"),
        (["a=1", "a=2"], "--sweep a is given twice"),
        (["launcher.nodes=1,2"], "all runs of a sweep ask for the same machines"),
        (["a=" + "1," * 999 + "1", "b=1,2"], "--sweep makes 2000 runs; at most 1000"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused(sweeps: list[str], said: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(said)):
        combinations(sweeps)


@pytest.mark.fast
def test_an_array_gives_each_run_its_own_folder() -> None:
    jobs = [job(Path(f"/runs/gpt-{number}"), max_parallel=2) for number in range(3)]
    rendered = Slurm().render_array(jobs, Path("/runs/gpt"))
    assert set(rendered.files) == {*(f"../gpt-{number}/job.json" for number in range(3)), SCRIPT}
    assert "#SBATCH --array=0-2%2\n" in rendered.files[SCRIPT]
    own, _, _ = rendered.files[SCRIPT].partition("\n# From here on")
    done = subprocess.run(
        ["bash"], input=f"SLURM_ARRAY_TASK_ID=1\n{own}\necho $RUN_DIR", text=True, capture_output=True, check=True
    )
    assert done.stdout == "/runs/gpt-1\n"
    other = Job(run_id="x", run_dir=Path("/runs/x"), nodes=2, nproc=2)
    with pytest.raises(UserError, match="ask for the same nodes"):
        Slurm().render_array([*jobs, other], Path("/runs/gpt"))


# --- the script --------------------------------------------------------------------------------------------------

# Stand-ins for Slurm's commands: each writes down how it was called, and answers from a file where there is one.
STAND_IN = """#!/bin/bash
echo "$(basename "$0") $*" >> calls
[[ -e answer-${*: -2:1} ]] && cat "answer-${*: -2:1}"  # to the question, the last word but one
exit 0
"""
# srun starts one agent; this one ends as the test says.
SRUN = """#!/bin/bash
echo "srun $*" >> calls
SLURM_NODEID=0 exec "${@:10}"
"""


class Script:
    """The batch script of a run, without a Slurm."""

    restarts: int | None = None  # as the controller counts them; None: as the script does

    def __init__(self, folder: Path, *, ends: int, record: bool = True, state: str = "RUNNING", **options: Any) -> None:
        self.folder, self.run = folder, folder / "run"
        self.run.mkdir()
        programs = folder / "bin"
        programs.mkdir()
        for name in ("scontrol", "scancel", "srun"):
            (programs / name).write_text(SRUN if name == "srun" else STAND_IN)
            (programs / name).chmod(0o755)
        self.state = state
        (folder / "answer-hostnames").write_text("node7\nnode8\n")
        agent = folder / "agent"
        left = f"echo '{json.dumps({'exit_code': ends, 'time': 1.5})}' > {shlex.quote(str(self.run))}/exit.json"
        agent.write_text(f'#!/bin/bash\necho "agent $*" >> calls\n{left if record else ""}\nexit {ends}\n')
        agent.chmod(0o755)
        self.script = Slurm().render(job(self.run, python=str(agent), **options)).files[SCRIPT]

    def __call__(self, **environ: str) -> int:
        given = {"SLURM_JOB_ID": "10042", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_SUBMIT_DIR": str(self.folder)}
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        starts = self.restarts if self.restarts is not None else environ.get("SLURM_RESTART_COUNT", 0)
        facts = f"JobId=10042 JobName=run JobState={self.state} Reason=None Requeue=1 Restarts={starts} BatchFlag=1\n"
        (self.folder / "answer-job").write_text(facts)
        done = subprocess.run(
            ["bash", "-c", self.script],
            cwd=self.folder,
            env={**os.environ, **given, **environ, "PATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        self.err = done.stderr
        return done.returncode

    @property
    def calls(self) -> list[str]:
        return (self.folder / "calls").read_text().splitlines()

    @property
    def requeued(self) -> bool:
        return "scontrol requeue 10042" in self.calls


@pytest.mark.parametrize(
    ("ends", "state", "options", "requeued"),
    [
        (0, "RUNNING", {}, False),
        (75, "RUNNING", {}, True),
        (75, "RUNNING", {"requeue": False}, False),
        (75, "COMPLETING", {}, False),  # Slurm has decided: requeued already, or cancelled
        (75, "", {}, False),
        (143, "RUNNING", {}, True),
        (75, "SIGNALING", {}, True),
        (138, "RUNNING", {}, True),
        (70, "RUNNING", {}, False),
        (78, "RUNNING", {}, False),
        (93, "RUNNING", {}, False),
        (1, "RUNNING", {}, False),
    ],
)
def test_a_run_is_requeued_when_it_was_stopped_and_by_nobody_else(
    tmp_path: Path, ends: int, state: str, options: dict[str, Any], requeued: bool
) -> None:
    script = Script(tmp_path, ends=ends, state=state, **options)
    assert script() == ends
    assert script.requeued is requeued


@pytest.mark.parametrize(("state", "requeued"), [("COMPLETING", False), ("RUNNING", True)])
def test_agents_that_started_too_late_for_slurms_signal_get_it_from_the_script(
    tmp_path: Path, state: str, requeued: bool
) -> None:
    script = Script(tmp_path, ends=75, state=state)
    record = {"process": {"pid": 4711, "host": os.uname().nodename, "started": ""}, "attempt": 0}
    text = json.dumps(record).replace("4711", "'$$'")
    (tmp_path / "agent").write_text(f"""#!/bin/bash
        trap 'echo told >> calls; exit 75' TERM
        echo '{text}' > {script.run}/agent.json
        echo $$ > agent-pid
        kill -TERM $(cat script-pid)
        while :; do sleep 0.1; done
    """)
    (tmp_path / "bin" / "scancel").write_text(STAND_IN.replace("exit 0", "kill -TERM $(cat agent-pid)"))
    script.script = script.script.replace("set -uo pipefail", "echo $$ > script-pid\nset -uo pipefail")
    assert script() == 75
    assert "told" in script.calls
    assert script.requeued is requeued
    assert any(call.startswith("scancel") for call in script.calls) is requeued


def test_a_script_that_outlives_its_start_leaves_the_next_one_alone(tmp_path: Path) -> None:
    """Slurm took its node for lost and has started the job elsewhere, under the same number."""
    script = Script(tmp_path, ends=75)
    script.restarts = 1
    assert script() == 75
    assert not script.requeued
    assert script(SLURM_RESTART_COUNT="1") == 75
    assert script.requeued


def test_a_run_of_an_array_is_called_by_its_own_number(tmp_path: Path) -> None:
    script = Script(tmp_path, ends=75)
    assert script(SLURM_ARRAY_JOB_ID="10042", SLURM_ARRAY_TASK_ID="3") == 75
    assert "scontrol requeue 10042_3" in script.calls, "10042 is the whole array"


def test_a_run_that_lost_a_node_is_requeued_before_slurm_notices(tmp_path: Path) -> None:
    script = Script(tmp_path, ends=70, nodes=2)
    events = script.run / "events.jsonl"
    lost = '{"time": 2.0, "event": "fault", "attempt": 1, "error": "node 1 of 2 did not come within 60 s"}\n'
    events.write_text(lost)
    assert script() == 70
    assert script.requeued
    (tmp_path / "calls").unlink()
    events.write_text(lost + '{"time": 3.0, "event": "fault", "attempt": 1, "rank": 0, "error": "ValueError: row 3"}\n')
    assert script() == 70
    assert not script.requeued, "that was the node's loss of an earlier start"


def test_the_runs_own_exit_code_counts_and_not_sruns(tmp_path: Path) -> None:
    script = Script(tmp_path, ends=1)
    (tmp_path / "agent").write_text(f"#!/bin/bash\necho '{{\"exit_code\": 75}}' > {script.run}/exit.json\nexit 1\n")
    assert script() == 75
    assert script.requeued


def test_an_old_exit_code_is_no_answer(tmp_path: Path) -> None:
    script = Script(tmp_path, ends=9, record=False)
    (script.run / "exit.json").write_text('{"exit_code": 75}')
    assert script() == 9
    assert not script.requeued


def test_agents_meet_at_the_first_node_at_a_port_of_their_own(tmp_path: Path) -> None:
    script = Script(tmp_path, ends=0)
    assert script() == 0
    assert f"agent -m unitrain.agent {script.run} --node 0" in script.calls, "one node meets nobody"
    (tmp_path / "two").mkdir()
    script = Script(tmp_path / "two", ends=0, nodes=2)
    assert script(SLURM_RESTART_COUNT="2") == 0
    assert f"agent -m unitrain.agent {script.run} --meet node7:20116 --node 0" in script.calls


def test_a_list_of_nodes_that_nobody_knows_ends_the_job(tmp_path: Path) -> None:
    script = Script(tmp_path, ends=0, nodes=2)
    (tmp_path / "answer-hostnames").write_text("")
    assert script() == 78
    assert "the list of nodes is empty" in script.err
    assert json.loads((script.run / "exit.json").read_text())["error"] == "the list of nodes is empty"
    assert not any(call.startswith("srun") for call in script.calls)


def test_a_heterogeneous_job_ends_at_once(tmp_path: Path) -> None:
    script = Script(tmp_path, ends=0)
    assert script(SLURM_HET_SIZE="2") == 78
    assert "every node must start the same number of ranks" in script.err


def test_starts_without_a_newer_checkpoint_come_to_an_end(tmp_path: Path) -> None:
    script = Script(tmp_path, ends=75, max_requeues=2)
    events = script.run / "events.jsonl"
    events.write_text('{"time": 1.0, "event": "checkpoint", "step": 10}\n')
    assert [script(SLURM_RESTART_COUNT=str(count)) for count in (1, 2, 3)] == [75, 75, 75]
    with events.open("a") as file:
        file.write('{"time": 2.0, "event": "checkpoint", "step": 20}\n{"time": 3.0, "event": "stop"}\n')
    assert [script(SLURM_RESTART_COUNT=str(count)) for count in (4, 5, 6, 7)] == [75, 75, 75, 93]
    assert "started again 3 times in a row without a newer checkpoint" in script.err
    assert json.loads((script.run / "exit.json").read_text())["exit_code"] == 93
    assert script() == 75, "a job of its own counts anew"


def test_a_cancelled_run_is_not_requeued_and_slurm_is_told(tmp_path: Path) -> None:
    script = Script(tmp_path, ends=75)
    (tmp_path / "bin" / "sleep").write_text("#!/bin/bash\nexit 0\n")  # Slurm would end the script meanwhile
    (tmp_path / "bin" / "sleep").chmod(0o755)
    state = script.run / "job-state.json"
    state.write_text('{"job_id": "10042", "cancelled": 1.5}')
    assert script() == 143
    assert not any(call.startswith(("srun", "agent")) for call in script.calls), "nothing was started"
    state.unlink()
    agent = tmp_path / "agent"
    agent.write_text(f"#!/bin/bash\necho '{{\"cancelled\": 1.5}}' > {state}\nexit 75\n")
    assert script() == 143
    assert "scancel --quiet 10042" in script.calls
    assert not script.requeued


def test_the_users_own_setup_comes_first(tmp_path: Path) -> None:
    script = Script(tmp_path, ends=0, setup="my env.sh")
    (tmp_path / "my env.sh").write_text('export CUDA_HOME=/opt/cuda\necho "$UNSET" setup >> calls\n')
    (tmp_path / "agent").write_text("#!/bin/bash\necho agent with $CUDA_HOME >> calls\n")
    assert script(SLURM_CPUS_PER_TASK="6") == 0
    assert [call for call in script.calls if "srun" not in call] == [" setup", "agent with /opt/cuda"]
    (tmp_path / "my env.sh").write_text("false\n")
    assert script() == 78
    assert "setup ended with an error" in script.err
