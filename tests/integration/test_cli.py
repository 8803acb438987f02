"""The command line as its users meet it: real processes, their output and their exit codes."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from unitrain.recipe_file import load_recipe, recipe_from_text
from unitrain.run import Run

RECIPE = """\
name: tiny
trainer: unitrain.tasks:Classification
model: {name: mlp, in_features: 4, hidden: [8], num_classes: 2}
data: {name: arrays, path: data.npz, eval_fraction: 0.25}
optimizer:
  lr: 1e-2
train: {steps: 4, global_batch: 8, log_every: 2}
strategy: {name: single}
launcher: {name: local, nproc: 1}
checkpoint: {every: 2}
"""

COMMAND = Path(sys.executable).with_name("unitrain")


def unitrain(*arguments: str | Path, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run the command and wait for its end."""
    return subprocess.run(
        [COMMAND, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environ,
        timeout=120,
        check=False,
    )


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with one finished run in runs/, and what launching it said."""
    import numpy as np

    folder = tmp_path_factory.mktemp("trained")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 4)).astype(np.float32)
    np.savez(folder / "data.npz", x=x, y=(x[:, 0] > 0).astype(np.int64))
    (folder / "tiny.yaml").write_text(RECIPE)
    return folder, unitrain("launch", "tiny.yaml", cwd=folder)


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from unitrain.cli import app\n"
        "try: app(['--help'])\n"
        "except SystemExit as end: assert not end.code\n"
        "print(len(sys.modules), *sorted(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    count, *modules = done.stderr.split()
    assert not {"torch", "numpy", "omegaconf", "yaml", "rich", "unitrain.recipe", "unitrain.registry"} & set(modules)
    assert int(count) < 250
    for command in ("launch", "resume", "list", "status", "logs", "cancel"):
        assert re.search(rf"^  {command}  +\w.*\.$", done.stdout, re.MULTILINE), command


def test_every_command_has_help(folder):
    for command in ("launch", "resume", "list", "status", "logs", "cancel"):
        done = unitrain(command, "--help", cwd=folder)
        assert (done.returncode, done.stderr) == (0, "")
    assert "unitrain 0." in unitrain("--version", cwd=folder).stdout


MISTAKES: list[tuple[list[str], int, str]] = [
    (["launch", "tini.yaml"], 78, "error: no recipe file 'tini.yaml', did you mean 'tiny.yaml'?\n"),
    (
        ["launch", "tiny.yaml", "optimzer.lr=1"],
        78,
        "error: on the command line: no key 'optimzer.lr', did you mean 'optimizer.lr'?\n",
    ),
    (
        ["launch", "bad.yaml"],
        78,
        "error: bad.yaml:6: optimizer.lr is 'fast' (str); it must be a number\n",
    ),
    (
        ["launch", "tiny.yaml", "--strategy", "fsdp3"],
        78,
        "error: no strategy named 'fsdp3', did you mean 'fsdp2'?; known: ",
    ),
    (["launch", "tiny.yaml", "--launcher", "slrm"], 78, "error: no launcher named 'slrm'"),
    (
        ["launch", "tiny.yaml", "--strategy", "ddp", "--nproc", "64"],
        78,
        "error: 64 ranks cannot share a batch of 8 samples; use at most 8 ranks or a larger train.global_batch\n",
    ),
    (
        ["launch", "tiny.yaml", "--nproc", "2", "--dry-run"],
        78,
        "error: strategy 'single' trains in one process, but 2 ranks were asked for; ",
    ),
    (
        ["launch", "tiny.yaml", "trainer=nowhere.at.all:Mine"],
        78,
        "error: trainer is 'nowhere.at.all:Mine', but no module 'nowhere' can be found; "
        "install it, or give path/to/file.py:Class\n",
    ),
    (
        ["launch", "tiny.yaml", "--run-dir", "taken"],
        78,
        "error: taken holds a run already: go on with `unitrain resume taken`",
    ),
    (["launch", "tiny.yaml", "--run-dir", "taken", "--dry-run"], 78, "error: taken holds a run already"),
    (["launch", "tiny.yaml", "--run-dir", "tiny.yaml/x"], 78, "error: the run's folder cannot be made: "),
    (["resume", "nothing"], 78, "error: no run 'nothing', neither a folder nor below runs\n"),
    (["status", "."], 78, "error: . holds no run: there is no recipe.yaml in it\n"),
    (["cancel", "taken"], 78, "error: taken is not running (unknown): nothing to cancel\n"),
    (["launch"], 2, "Usage: unitrain launch "),
    (["launch", "tiny.yaml", "--nproc", "0"], 2, "Usage: unitrain launch "),
    (["launch", "tiny.yaml", "--nprocs", "2"], 2, "Usage: unitrain launch "),
    (["launch", "tiny.yaml", "--json"], 2, "Usage: unitrain launch "),
    (["resume", "taken", "--json"], 2, "Usage: unitrain resume "),
    (["list", "strategy"], 2, "Usage: unitrain list "),
    (["frobnicate"], 2, "Usage: unitrain "),
]


@pytest.fixture(scope="module")
def mistaken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "tiny.yaml").write_text(RECIPE)
    (folder / "bad.yaml").write_text(RECIPE.replace("lr: 1e-2", "lr: fast"))
    Run.create(folder / "taken", recipe_from_text(RECIPE))
    return folder


@pytest.mark.parametrize(("arguments", "code", "message"), MISTAKES, ids=[" ".join(case[0]) for case in MISTAKES])
def test_a_mistake_ends_with_one_message_and_its_exit_code(mistaken, arguments, code, message):
    before = sorted(mistaken.rglob("*"))
    done = unitrain(*arguments, cwd=mistaken)
    assert done.returncode == code
    assert done.stderr.startswith(message) if not message.endswith("\n") else done.stderr == message
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert sorted(mistaken.rglob("*")) == before, "nothing may be left behind"


def test_a_dry_run_prints_the_recipe_and_the_command_and_creates_nothing(folder):
    done = unitrain("launch", "tiny.yaml", "--dry-run", "train.steps=7", "--run-dir", "out/mine", cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(path.name for path in folder.iterdir()) == ["tiny.yaml"]
    parts = dict(re.findall(r"^# (\S+ [^\n,]+)[^\n]*\n(.*?)(?=^# |\Z)", done.stdout, re.MULTILINE | re.DOTALL))
    assert list(parts) == ["file out/mine/recipe.yaml", "file out/mine/job.json", "command on this machine"]
    recipe = recipe_from_text(parts["file out/mine/recipe.yaml"])
    assert (recipe.train.steps, recipe.train.seed, recipe.optimizer.lr) == (7, 0, 1e-2)
    job = json.loads(parts["file out/mine/job.json"])
    assert (job["run_id"], job["nproc"], job["launcher"]) == ("mine", 1, "local")
    python, *arguments = parts["command on this machine"].split()
    assert Path(python).samefile(sys.executable)
    assert arguments == [
         "-m", "unitrain.agent", str(folder / "out/mine"), "--node", "0",
    ]  # fmt: skip


def test_what_there_is_is_listed_as_a_table_and_as_json(folder):
    for group, name in {"strategies": "fsdp2", "launchers": "local", "models": "gpt", "sources": "digits"}.items():
        table = unitrain("list", group, cwd=folder).stdout.splitlines()
        found = json.loads(unitrain("list", group, "--json", cwd=folder).stdout)
        assert table[0].startswith("NAME ")
        assert [line.split()[0] for line in table[1:]] == [entry["name"] for entry in found]
        assert name in [entry["name"] for entry in found]
        assert all(set(entry) == {"name", "framework", "installed", "install", "summary"} for entry in found)
    assert unitrain("list", "runs", cwd=folder).stdout == "no runs in ./runs; start one with `unitrain launch RECIPE`\n"
    assert json.loads(unitrain("list", "runs", "--json", cwd=folder).stdout) == []


def test_one_unreadable_run_does_not_hide_the_others(folder):
    for name, text in {"good": RECIPE, "bad": "trainer: a:B\ntrain: 3"}.items():
        (folder / "runs" / name).mkdir(parents=True)
        (folder / "runs" / name / "recipe.yaml").write_text(text)
    done = unitrain("list", "runs", cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    rows = {line.split()[0]: line.split()[1] for line in done.stdout.splitlines()[1:]}
    assert rows == {"good": "unknown", "bad": "unreadable"}
    assert "bad/recipe.yaml:2: train is 3 (int)" in done.stdout


def test_a_launched_run_says_where_it_is_and_what_it_reached(trained):
    folder, done = trained
    assert (done.returncode, done.stderr) == (0, "")
    (run,) = Run.all(folder / "runs")
    lines = done.stdout.splitlines()
    assert lines[0] == f"{run.id}: single on 1 rank, by local"
    assert lines[-1] == f"done: runs/{run.id}, metrics in runs/{run.id}/metrics.jsonl"
    assert [line.split("  ")[0] for line in lines if line.startswith("step")] == ["step 2/4", "step 4/4"]
    assert [record["step"] for record in run.metrics() if record["split"] == "train"] == [2, 4]
    assert run.launched()["cwd"] == str(folder)
    assert load_recipe(run.recipe_path) == load_recipe(folder / "tiny.yaml")


def test_status_logs_and_list_tell_of_the_run(trained):
    folder, _ = trained
    (run,) = Run.all(folder / "runs")
    told = unitrain("status", run.id, cwd=folder).stdout
    for line in ("state     done", "started   single on 1 rank, by local", "step      4/4", "saved     step 4, in "):
        assert line in told
    assert "eta" not in told
    facts = json.loads(unitrain("status", run.folder, "--json", cwd=folder).stdout)
    assert (facts["state"], facts["exit_code"], facts["step"], facts["checkpoint"]) == ("done", 0, 4, 4)
    assert facts["train"]["loss"] == run.metrics()[-2]["loss"]
    assert "step 4/4" in unitrain("logs", run.id, cwd=folder).stdout
    (row,) = unitrain("list", "runs", cwd=folder).stdout.splitlines()[1:]
    assert row.split()[:3] == [run.id, "done", "4/4"]
    assert json.loads(unitrain("list", "runs", "--json", cwd=folder).stdout) == [facts]
    done = unitrain("cancel", run.id, cwd=folder)
    assert (done.returncode, done.stderr) == (78, f"error: {run.id} is not running (done): nothing to cancel\n")


def test_a_resumed_run_goes_on_from_elsewhere_with_other_ranks(trained, tmp_path):
    folder, _ = trained
    (run,) = Run.all(folder / "runs")
    kept = folder / "kept"
    shutil.copytree(run.folder, kept)
    done = unitrain("resume", kept, "--strategy", "ddp", "--nproc", "2", "train.steps=6", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "resumed at step 4" in done.stdout
    assert done.stdout.splitlines()[-1] == f"done: {kept}, metrics in {kept}/metrics.jsonl"
    steps = [record["step"] for record in Run(kept).metrics() if record["split"] == "train"]
    assert steps == [2, 4, 6]
    assert [load_recipe(kept / name).train.steps for name in ("recipe-1.yaml", "recipe.yaml")] == [4, 6]
    assert not list(tmp_path.iterdir()), "the data's relative path starts where the run was launched"


def test_a_dry_run_of_resuming_by_another_launcher_shows_its_job_and_changes_nothing(trained):
    folder, _ = trained
    (run,) = Run.all(folder / "runs")
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    words = ["resume", run.id, "--launcher", "torchrun", "--strategy", "ddp", "--nproc", "2", "--dry-run", "--json"]
    done = unitrain(*words, cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    shown = json.loads(done.stdout)
    assert (shown["id"], shown["launcher"], shown["nproc"], shown["code"]) == (run.id, "torchrun", 2, None)
    assert shown["argv"][2] == "torch.distributed.run"
    assert json.loads(shown["files"][str(run.folder / "job.json")])["launcher"] == "torchrun"
    assert {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()} == before


def test_logs_and_cancel_answer_in_json(trained):
    folder, _ = trained
    (run,) = Run.all(folder / "runs")
    lines = [json.loads(line) for line in unitrain("logs", run.id, "--json", cwd=folder).stdout.splitlines()]
    assert {tuple(line) for line in lines} == {("rank", "line")}
    assert [line["line"] for line in lines] == unitrain("logs", run.id, cwd=folder).stdout.splitlines()


def test_a_run_that_runs_is_not_resumed_and_can_be_cancelled(trained):
    folder, _ = trained
    slow = ["train.steps=1000000", "train.log_every=100", "train.eval_every=0", "checkpoint.every=0"]
    started = subprocess.Popen(
        [COMMAND, "launch", "tiny.yaml", "--run-dir", "slow", *slow], cwd=folder, stdout=subprocess.PIPE
    )
    assert started.stdout is not None
    while b"step" not in started.stdout.readline():
        assert started.poll() is None
    refused = unitrain("resume", "slow", cwd=folder)
    assert refused.returncode == 78
    assert refused.stderr == "error: slow is running; wait for its end, or stop it with `unitrain cancel slow`\n"
    assert re.search(r"state +running.*\n(.*\n)*train .* eta ", unitrain("status", "slow", cwd=folder).stdout)
    cancelled = unitrain("cancel", "slow", "--grace", "20", "--json", cwd=folder)
    assert (cancelled.returncode, cancelled.stderr) == (0, "")
    answer = json.loads(cancelled.stdout)
    assert (answer["id"], answer["state"] in ("cancelled", "preempted")) == ("slow", True)
    started.stdout.close()
    assert started.wait(30) != 0
    assert json.loads(unitrain("status", "slow", "--json", cwd=folder).stdout)["state"] in ("cancelled", "preempted")


def test_on_a_terminal_there_is_a_panel(trained):
    folder, _ = trained
    ours, theirs = pty.openpty()
    environ = {key: value for key, value in os.environ.items() if key != "NO_COLOR"} | {
        "TERM": "xterm",
        "COLUMNS": "80",
    }
    process = subprocess.Popen([COMMAND, "launch", "tiny.yaml"], cwd=folder, stdout=theirs, env=environ)
    os.close(theirs)
    seen = b""
    while True:
        try:
            seen += os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
    os.close(ours)
    assert process.wait() == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.decode())
    assert re.search(r"step +4/4 +━+ +100%", text)
    assert "metrics in runs/tiny-" in text


def test_the_shell_completes_names(folder):
    def completed(line: str) -> str:
        environ = {
            "_UNITRAIN_COMPLETE": "complete_bash",
            "COMP_WORDS": line,
            "COMP_CWORD": str(len(line.split(" ")) - 1),
        }
        return unitrain(cwd=folder, **environ).stdout

    Run.create(folder / "runs/tiny-1", recipe_from_text(RECIPE))
    assert "fsdp2" in completed("unitrain launch tiny.yaml --strategy fs")
    assert "torchrun" in completed("unitrain launch tiny.yaml --launcher t")
    assert "tiny-1" in completed("unitrain status ti")
