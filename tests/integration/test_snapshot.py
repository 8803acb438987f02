"""A run with a copy of its code, from the command line: edits after the launch reach it only when they are asked to."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

from .runs import unitrain

MINE = """
import time
from pathlib import Path
from types import SimpleNamespace
from unitrain.trainer import Trainer

class Mine(Trainer):
    def fit(self):
        while not Path("data/go").exists():
            time.sleep(0.01)
        import late  # long after the launch
        print("works in", Path.cwd().name, "with", late.VALUE, flush=True)
        return SimpleNamespace(exit_code=0)
"""
RECIPE = """
name: mine
trainer: mine.py:Mine
strategy: {name: single}
code: {snapshot: true, link: [sub/data]}
"""


def git(folder: Path, *words: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def test_edits_after_the_launch_do_not_reach_a_run(tmp_path: Path) -> None:
    project, here = tmp_path / "project", tmp_path / "project/sub"
    (here / "data").mkdir(parents=True)
    for name, text in {
        "mine.py": MINE,
        "late.py": "VALUE = 1",
        "recipe.yaml": RECIPE,
        ".gitignore": "data\nruns\n",
    }.items():
        (here / name).write_text(text)
    git(project, "init", "-q")
    git(project, "add", ".")
    git(project, "commit", "-q", "-m", "one")
    (here / "late.py").write_text("VALUE = 2")

    def said() -> str:
        lines = unitrain("logs", "one", "--follow", cwd=here).succeeded().out.splitlines()
        while json.loads(unitrain("status", "one", "--json", cwd=here).out)["state"] == "running":
            time.sleep(0.1)
        return lines[-1]

    dry = unitrain("launch", "recipe.yaml", "--run-dir", "runs/one", "--dry-run", cwd=here).succeeded()
    assert "# folder runs/one/code: 4 files, 0.0 MiB" in dry.out
    assert "\nsub/late.py\n" in dry.out and not (here / "runs").exists()

    begun = unitrain("launch", "recipe.yaml", "--run-dir", "runs/one", "--detach", cwd=here).succeeded()
    assert begun.out == "one\n", "the run's name, and nothing else, for scripts"
    (here / "late.py").write_text("VALUE = 3")
    (here / "mine.py").write_text("raise SystemExit('edited')")
    (here / "data/go").touch()
    assert said() == "works in sub with 2"
    record = json.loads((here / "runs/one/code.json").read_text())
    assert (record["commit"], record["changed"]) == (git(project, "rev-parse", "HEAD"), ["sub/late.py"])
    assert "+VALUE = 2" in (here / "runs/one/code.diff").read_text()

    unitrain("resume", "one", "--detach", cwd=here).succeeded()
    assert said() == "works in sub with 2", "a resumed run has the code that it began with"
    assert not list((here / "runs/one").glob("recipe-*")), "its recipe has not changed"

    (here / "mine.py").write_text(MINE)
    unitrain("resume", "one", "--new-code", "--detach", cwd=here).succeeded()
    assert said() == "works in sub with 3"
    assert (here / "runs/one/code-1/sub/late.py").read_text() == "VALUE = 2"

    (here / ".env").write_text("KEY=1")
    refused = unitrain("launch", "recipe.yaml", "--run-dir", "runs/two", cwd=here)
    assert refused.code == 78
    assert "'sub/.env' has the name of a secret" in refused.err
    assert not (here / "runs/two").exists()
