"""The run's folder: made once, written line by line, read back after anything."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from unitrain.errors import UnitrainError, UserError
from unitrain.recipe import CheckpointRecipe, Recipe, TrainRecipe
from unitrain.recipe_file import load_recipe
from unitrain.run import Run

fast = pytest.mark.fast  # the others start processes

RECIPE = Recipe(name="tiny", trainer="a:B")


@fast
def test_a_new_run_has_a_folder_of_its_own_with_the_recipe_in_it(tmp_path):
    run = Run.create(None, RECIPE, runs=tmp_path / "deep/runs")
    assert run.folder.parent == tmp_path / "deep/runs"
    name, day, clock, short = run.id.split("-")
    assert (name, len(day), len(clock), len(short)) == ("tiny", 8, 6, 4)
    assert load_recipe(run.recipe_path) == RECIPE
    assert Run.open(run.id, runs=tmp_path / "deep/runs").folder == run.folder
    assert Run.open(run.folder).id == run.id


@fast
def test_two_hundred_runs_of_one_second_do_not_meet(tmp_path):
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.extend(Run.create(None, RECIPE, runs=tmp_path).id for _ in range(25)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 200 == len(list(tmp_path.iterdir()))


@fast
def test_a_folder_that_holds_a_run_is_refused_with_the_way_on(tmp_path):
    Run.create(tmp_path / "mine", RECIPE)
    with pytest.raises(
        UserError, match=r"mine holds a run already: go on with `unitrain resume .*mine`, or name another"
    ):
        Run.create(tmp_path / "mine", RECIPE)


@fast
def test_an_empty_folder_or_one_with_other_things_will_do(tmp_path):
    (tmp_path / "notes.txt").touch()
    assert Run.create(tmp_path, RECIPE).folder == tmp_path


@fast
def test_a_folder_that_cannot_be_made_is_the_users_to_mend(tmp_path):
    (tmp_path / "file").touch()
    for folder, runs in ((tmp_path / "file", tmp_path), (tmp_path / "file/x", tmp_path), (None, tmp_path / "file")):
        with pytest.raises(UserError, match=r"the run.s folder cannot be made: .*file"):
            Run.create(folder, RECIPE, runs=runs)


@fast
def test_a_run_that_is_not_there_is_told_with_the_closest_one(tmp_path):
    with pytest.raises(UserError, match=r"no run 'x', neither a folder nor below .*runs$"):
        Run.open("x", runs=tmp_path / "runs")
    run = Run.create(None, RECIPE, runs=tmp_path)
    with pytest.raises(UserError, match=f"did you mean '{run.id}'"):
        Run.open(run.id[:-1], runs=tmp_path)
    with pytest.raises(UserError, match=f"the newest is '{run.id}'"):
        Run.open("zzz", runs=tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty holds no run: there is no recipe\.yaml in it"):
        Run.open(tmp_path / "empty")


@fast
def test_the_id_is_the_folders_name_however_it_is_spelt(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    assert (Run(".").id, Run("../b").id, Run("../b").folder) == ("a", "b", tmp_path / "b")


@fast
def test_runs_are_listed_oldest_first(tmp_path):
    assert Run.all(tmp_path / "none") == []
    ids = [Run.create(tmp_path / name, RECIPE).id for name in ("b", "a", "c")]
    for number, name in enumerate(ids):
        os.utime(tmp_path / name / "recipe.yaml", (number, number))
    (tmp_path / "other").mkdir()
    assert [run.id for run in Run.all(tmp_path)] == ["b", "a", "c"]


@fast
def test_checkpoints_lie_in_the_folder_or_where_the_recipe_says(tmp_path):
    run = Run(tmp_path)
    assert run.checkpoints(RECIPE) == str(tmp_path / "checkpoints")
    assert run.checkpoints(RECIPE.replace(checkpoint=CheckpointRecipe(path="s3://b/c"))) == "s3://b/c"


@fast
def test_a_changed_recipe_keeps_the_ones_before(tmp_path):
    run = Run.create(tmp_path, RECIPE)
    run.rewrite_recipe(RECIPE)
    assert not list(tmp_path.glob("recipe-*.yaml"))
    for steps in (200, 300):
        run.rewrite_recipe(RECIPE.replace(train=TrainRecipe(steps=steps)))
    kept = ("recipe-1.yaml", "recipe-2.yaml", "recipe.yaml")
    assert [load_recipe(tmp_path / name).train.steps for name in kept] == [100, 200, 300]


@fast
def test_events_and_metrics_are_one_json_object_a_line(tmp_path):
    run = Run(tmp_path)
    assert (run.metrics(), run.events(), run.launched()) == ([], [], {})
    run.event("start", step=0, world_size=2)
    run.event("launch", job_id="1")
    run.event("launch", job_id="2")
    run.metric({"step": 10, "split": "train", "loss": 0.1 + 0.2, "lr": 1e-4})
    assert run.metrics() == [{"step": 10, "split": "train", "loss": 0.30000000000000004, "lr": 1e-4}]
    assert (run.events()[0]["event"], run.events()[0]["world_size"]) == ("start", 2)
    assert abs(run.events()[0]["time"] - (tmp_path / "events.jsonl").stat().st_mtime) < 60
    assert run.launched()["job_id"] == "2"


@fast
def test_what_json_has_no_number_for_is_null(tmp_path):
    run = Run(tmp_path)
    run.metric({"step": 1, "loss": math.nan, "deep": {"x": [math.inf, (-math.inf, 1.0)]}})
    assert run.metrics() == [{"step": 1, "loss": None, "deep": {"x": [None, [None, 1.0]]}}]
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


@fast
def test_a_rewound_run_forgets_later_steps_and_torn_lines(tmp_path):
    run = Run(tmp_path)
    run.rewind(5)  # nothing there yet
    for step in (10, 20, 30):
        run.metric({"step": step, "split": "train", "loss": 1 / step})
        run.metric({"step": step, "split": "eval", "loss": 2 / step})
    path = tmp_path / "metrics.jsonl"
    before = path.read_bytes().splitlines(keepends=True)
    with path.open("ab") as file:
        file.write(b'{"step": 20, "split": "tr')
    assert len(run.metrics()) == 6
    run.rewind(20)
    assert path.read_bytes() == b"".join(before[:4])
    assert [(record["step"], record["split"]) for record in run.metrics()] == [
        (10, "train"), (10, "eval"), (20, "train"), (20, "eval"),
    ]  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@fast
def test_a_torn_line_is_lost_alone(tmp_path):
    run = Run(tmp_path)
    run.event("one")
    with (tmp_path / "events.jsonl").open("ab") as file:
        file.write(b'{"time": 1, "eve')
    run.event("two")
    assert [event["event"] for event in run.events()] == ["one", "two"]


def test_a_full_disk_is_told(tmp_path):
    code = (
        "import sys; from unitrain.run import Run; from unitrain.errors import UnitrainError\n"
        "run = Run(sys.argv[1])\n"
        "try:\n"
        "    for step in range(1000): run.metric({'step': step})\n"
        "except UnitrainError as error: print(error)\n"
    )

    def small_files() -> None:  # a size limit ends a write in the middle, as a full disk does
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    done = subprocess.run(
        [sys.executable, "-B", "-c", code, str(tmp_path)],
        preexec_fn=small_files,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "metrics.jsonl took" in done.stdout
    assert "the disk is full" in done.stdout
    run = Run(tmp_path)
    run.metric({"step": 1000})
    steps = [record["step"] for record in run.metrics()]
    assert steps == [*range(len(steps) - 1), 1000]


def test_processes_that_append_at_once_mix_no_lines(tmp_path):
    code = (
        "import sys; from unitrain.run import Run\n"
        "run = Run(sys.argv[1])\n"
        "for number in range(300): run.event('x' * (number % 50), who=sys.argv[2], number=number)\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), name]) for name in "abc"]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    events = Run(tmp_path).events()
    # Who sees a line half written begins with an empty one.
    assert sum(line != "" for line in (tmp_path / "events.jsonl").read_text().split("\n")) == len(events) == 900
    for name in "abc":
        assert [event["number"] for event in events if event["who"] == name] == list(range(300))


def test_a_kill_at_any_moment_leaves_whole_lines(tmp_path):
    code = (
        "import sys; from unitrain.run import Run\n"
        "run, step = Run(sys.argv[1]), 0\n"
        "while True:\n"
        "    step += 1; run.metric({'step': step, 'pad': 'x' * 200})\n"
        "    if step % 50 == 0: run.rewind(step - 10)\n"
    )
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
        while not (tmp_path / "metrics.jsonl").exists() or (tmp_path / "metrics.jsonl").stat().st_size < 5000:
            pass
        process.kill()
        process.wait()
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert all(json.loads(line)["step"] for line in lines[:-1])
        Run(tmp_path).rewind(0)
        assert Run(tmp_path).metrics() == []


@fast
def test_a_record_that_is_no_json_is_a_bug_and_not_written(tmp_path):
    with pytest.raises(TypeError):
        Run(tmp_path).metric({"step": object()})
    assert not Path(tmp_path / "metrics.jsonl").exists()


@fast
def test_a_run_that_cannot_be_written_says_so(tmp_path):
    with pytest.raises(UnitrainError, match=r"none/events.jsonl cannot be written: No such file or directory"):
        Run(tmp_path / "none").event("start")
