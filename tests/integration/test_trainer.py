"""A Trainer as researchers write and drive it: in a script, a generator, with data, events and models of their own."""

from __future__ import annotations

import re
import shutil
import sys
import textwrap
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import unitrain
from unitrain.checkpoint import CheckpointReader
from unitrain.cursor import sample_ids
from unitrain.errors import CheckpointMismatch
from unitrain.recipe_file import recipe_from_text

from .runs import (
    ROWS,
    TRAINERS,
    checkpoints,
    copied,
    curve,
    difference,
    events,
    fit,
    launch,
    losses,
    metrics,
    resume,
    run,
    trainer,
)
from .trainers import NUM_ROWS, Counting, Rows

EXAMPLES = Path(__file__).parents[2] / "examples"
TIGHT = 1e-5
FEW = ["train.steps=6", "checkpoint.every=3", "train.eval_every=3"]


def test_research_takes_less_than_forty_lines() -> None:
    assert len((EXAMPLES / "research.py").read_text().splitlines()) < 40


def test_the_research_example_learns_as_a_plain_script(tmp_path: Path) -> None:
    shutil.copytree(EXAMPLES, tmp_path / "examples")
    ended = run([sys.executable, "examples/research.py"], cwd=tmp_path).succeeded()
    assert re.search(r"^eval step 300 .* accuracy 1\.0000$", ended.out, re.MULTILINE), ended.out


@pytest.mark.parametrize("example", ["research", "gan"])
@pytest.mark.parametrize("shape", ["ddp-2", "fsdp2-3"])
def test_an_example_is_the_same_on_every_strategy(tmp_path: Path, example: str, shape: str) -> None:
    recipe = (EXAMPLES / f"{example}.yaml").read_text().replace("trainer: ", f"trainer: {EXAMPLES}/")
    overrides = ["train.steps=20", "train.log_every=1", "checkpoint.every=0"]
    alone = curve(recipe, tmp_path / "alone", "single-1", *overrides)
    assert difference(curve(recipe, tmp_path / shape, shape, *overrides), alone) < TIGHT


def built(kind: type[unitrain.Trainer], folder: Path | None, *overrides: str) -> unitrain.Trainer:
    """A trainer that trains alone in this process."""
    return kind(recipe_from_text(ROWS, overrides=["strategy={name: single}", *overrides]), run_dir=folder)


def test_a_run_can_be_driven_step_by_step(tmp_path: Path) -> None:
    driven = built(Rows, tmp_path / "driven", *FEW)
    outs = list(driven.steps())
    fit(ROWS, tmp_path / "whole", *FEW)
    assert [out.read()["loss"] for out in outs] == losses(tmp_path / "driven") == losses(tmp_path / "whole")
    assert driven.result().step == 6
    assert driven.result().evaluation == {
        "loss": pytest.approx(metrics(tmp_path / "whole", "eval")[-1]["loss"]),
        "number": 18,
    }


def test_leaving_early_closes_the_run_and_it_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    driven = built(Rows, tmp_path / "run", *FEW)
    for out in driven.steps():
        if driven.cursor.step == 5:
            assert out.loss > 0
            break
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("unitrain")]
    assert [CheckpointReader(folder).step for folder in checkpoints(tmp_path / "run")] == [3]
    fit(ROWS, tmp_path / "run", *FEW)
    fit(ROWS, tmp_path / "whole", *FEW)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


@pytest.mark.parametrize("left_after", [2, 5])
@pytest.mark.parametrize("named", [True, False])
def test_a_trainer_that_was_left_early_goes_on_where_its_run_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left_after: int, named: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    driven = built(Rows, tmp_path / "run" if named else None, *FEW)
    for _ in driven.steps():
        if driven.cursor.step == left_after:
            break
    result = driven.fit()
    fit(ROWS, tmp_path / "whole", *FEW)
    assert losses(result.run_dir) == losses(tmp_path / "whole")
    assert [event["step"] for event in events(result.run_dir, "start")] == [0, left_after // 3 * 3]
    assert driven.fit().step == 6, "a finished run stays finished"


def test_what_a_step_gave_can_be_read_later(tmp_path: Path) -> None:
    """A step gives device scalars, which the next steps must not change; also: two runs of one process."""
    script = tmp_path / "later.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(TRAINERS.parent)!r})
        import numpy as np
        from trainers import Rows

        for strategy in ("ddp", "fsdp2"):
            driven = Rows.from_recipe("rows.yaml", strategy=strategy, run_dir=strategy)
            outs, late = [], []
            for out in driven.steps():
                late += [outs[-2].read()["loss"]] if len(outs) > 1 else []
                outs.append(out)
            logged = [record["loss"] for record in driven.run.metrics() if record["split"] == "train"]
            assert late == logged[:-2], (late, logged)
            assert [float(out.loss) for out in outs] == [float(np.float32(loss)) for loss in logged]
        """)
    )
    (tmp_path / "rows.yaml").write_text(ROWS)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run([*torchrun, script], cwd=tmp_path).succeeded()


def test_events_are_told_in_order(tmp_path: Path) -> None:
    told: list[tuple[str, int]] = []

    class Listening(Rows):
        def on(self, event: str, **facts: Any) -> None:
            told.append((event, facts["step"]))

    built(Listening, tmp_path / "run", *FEW, "checkpoint.async=false").fit()
    logged = [("log", step) for step in range(1, 7)]
    saved = [[("eval", step), ("checkpoint", step)] for step in (3, 6)]
    assert told == [("start", 0), *logged[:3], *saved[0], *logged[3:], *saved[1], ("stop", 6)]
    assert [(event["event"], event["step"]) for event in events(tmp_path / "run")] == [
        ("start", 0),
        ("checkpoint", 3),
        ("checkpoint", 6),
        ("stop", 6),
    ]


class Ragged(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """The samples of `trainers.Rows`, each a tensor as long as its number allows."""

    def __init__(self, source: unitrain.Source) -> None:
        self.rows = source.fetch(np.arange(len(source)))

    def __len__(self) -> int:
        return len(self.rows["number"])

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        row = {name: torch.from_numpy(array)[number] for name, array in self.rows.items()}
        return row | {"padding": torch.ones(number % 4)}


def test_any_map_style_dataset_trains_alike_with_and_without_collate(tmp_path: Path) -> None:
    def collate(rows: list[dict[str, torch.Tensor]]) -> Mapping[str, torch.Tensor]:
        names = ("x", "y", "weight", "number")
        padding = torch.nn.utils.rnn.pad_sequence([row["padding"] for row in rows], batch_first=True)
        return {name: torch.stack([row[name] for row in rows]) for name in names} | {"padding": padding}

    class Collated(Rows):
        def build_source(self, split: str) -> unitrain.Source:
            return unitrain.DatasetSource(Ragged(super().build_source(split)), collate)

    class Stacked(Rows):
        def build_source(self, split: str) -> unitrain.Source:
            rows = Ragged(super().build_source(split)).rows
            tuples = list(zip(*(rows[name] for name in ("x", "y", "weight", "number")), strict=True))
            return unitrain.DatasetSource(tuples, names=("x", "y", "weight", "number"))

    for kind in (Rows, Collated, Stacked):
        built(kind, tmp_path / kind.__name__, *FEW).fit()
    assert losses(tmp_path / "Collated") == losses(tmp_path / "Stacked") == losses(tmp_path / "Rows")


def test_a_sample_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text(
        textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(TRAINERS.parent)!r})
        from trainers import Rows
        from unitrain import DatasetSource

        class Gone(list):
            def __getitem__(self, number):
                if number == 83:
                    raise OSError("the disk is gone")
                return super().__getitem__(number)

        class Broken(Rows):
            def build_source(self, split):
                rows = super().build_source(split).fetch(__import__("numpy").arange(100))
                return DatasetSource(Gone({{name: rows[name][n] for name in rows}} for n in range(100)))
        """)
    )
    ended = launch(ROWS, tmp_path / "run", "ddp-2", f"trainer={broken}:Broken", "train.eval_every=0")
    assert ended.code == 70
    assert ended.last_line == "sample 83 of DatasetSource(Gone) could not be read: OSError: the disk is gone"
    assert "Traceback" not in ended.err
    step = int(np.argmax([83 in sample_ids(0, step, 10, 100) for step in range(10)]))
    assert len(losses(tmp_path / "run")) == step


@pytest.mark.parametrize("shape", ["single-1", "ddp-3", "fsdp2-3"])
def test_evaluation_counts_every_sample_once(tmp_path: Path, shape: str) -> None:
    # 37 = 6 * 6 + 1: the last batch leaves two of three ranks without a row
    curve(ROWS, tmp_path / "run", shape, trainer("Counting"), *FEW, "train.global_batch=6")
    whole = Rows(recipe_from_text(ROWS)).build_source("eval").fetch(np.arange(NUM_ROWS["eval"]))
    counted = CheckpointReader(checkpoints(tmp_path / "run")[-1]).state["extra"]
    assert counted["number"] == [sum(range(37)), 37]
    assert counted["loss"][1] == whole["weight"].sum()
    assert [record["number"] for record in metrics(tmp_path / "run", "eval")] == [18, 18]


def test_evaluation_counts_beyond_what_fp32_can(tmp_path: Path) -> None:
    class Heavy(Counting):
        def loss(self, model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> unitrain.Loss:
            weight = torch.where(batch["number"] == 0, 2.0**24, 1.0)
            errors = (model(batch["x"]) - batch["y"]).square().sum(dim=1)
            return unitrain.Loss((errors * weight).sum(), weight.sum())

    heavy = built(Heavy, tmp_path / "run", *FEW, "train.micro_batch=1")
    heavy.fit()
    assert heavy.extra["loss"][1] == 2**24 + 36


def test_models_of_one_run_may_be_on_different_strategies(tmp_path: Path) -> None:
    mixed, options = trainer("Mixed"), "strategy.options={gradient_as_bucket_view: false}"
    curve(ROWS, tmp_path / "run", "ddp-2", mixed, *FEW, options)
    fit(ROWS, tmp_path / "alone", mixed, *FEW)
    assert difference(losses(tmp_path / "run"), losses(tmp_path / "alone")) < TIGHT
    ours, theirs = (CheckpointReader(checkpoints(tmp_path / name)[-1]).role("other") for name in ("run", "alone"))
    for (kind, name), info in theirs.tensors.items():
        box = (kind, name, (0,) * len(info.shape), info.shape)
        np.testing.assert_allclose(ours.read(*box), theirs.read(*box), rtol=1e-4, atol=1e-6)
    again = copied(tmp_path / "run", tmp_path / "again", up_to=3)
    resume(again, "ddp-2").succeeded()
    assert losses(again) == losses(tmp_path / "run")


def test_a_script_launches_ranks_that_learn_what_one_learns(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(TRAINERS.parent)!r})
        import unitrain
        from trainers import Rows

        class Mine(Rows):
            pass

        if __name__ == "__main__":
            result = unitrain.launch(Mine, "rows.yaml", nproc=2, strategy="fsdp2", run_dir="run")
            print("result", result.step, result.metrics["loss"])
        """)
    )
    (tmp_path / "rows.yaml").write_text(ROWS)
    ended = run([sys.executable, script], cwd=tmp_path).succeeded()
    fit(ROWS, tmp_path / "alone")
    assert difference(losses(tmp_path / "run"), losses(tmp_path / "alone")) < TIGHT
    assert ended.last_line == f"result 20 {losses(tmp_path / 'run')[-1]}"


def test_a_new_run_does_not_take_over_the_checkpoints_of_another(tmp_path: Path) -> None:
    shared = (*FEW, f"checkpoint.path={tmp_path / 'shared'}")
    built(Rows, tmp_path / "first", *shared).fit()
    kept = sorted((tmp_path / "shared").iterdir())
    with pytest.raises(CheckpointMismatch, match="of the run first; give a new run a path of its own"):
        built(Rows, tmp_path / "second", *shared).fit()
    assert sorted((tmp_path / "shared").iterdir()) == kept
    assert built(Rows, tmp_path / "first", *shared).fit().step == len(losses(tmp_path / "first"))
