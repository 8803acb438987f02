"""The same recipe gives the same loss curve on every strategy and number of ranks, and the curve of plain torch.

Rows carry very different weights and ranks hold different numbers of them, so that a mean of means would show.
Every difference reached is printed (`pytest -rP`) and recorded in the XML report.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from unitrain.checkpoint import CheckpointReader
from unitrain.cursor import sample_ids
from unitrain.recipe import Recipe
from unitrain.recipe_file import recipe_from_text
from unitrain.schedule import learning_rate

from .runs import (
    ROWS,
    TRAINERS,
    checkpoints,
    copied,
    curve,
    difference,
    fit,
    launch,
    losses,
    metrics,
    resume,
    trainer,
)
from .trainers import Rows

TIGHT = 1e-5  # relative, fp32, over 50 steps
BAND = 2e-2  # relative: bf16 or fp16 against fp32, and batch norms that see other rows

TEXT = """\
name: text
trainer: {trainers}:Text
model: {{name: gpt, layers: 2, width: 64, heads: 4, ffn: 96}}
data: {{name: text, path: {text}, seq_len: 32, pack: false, lines: true}}
optimizer: {{lr: 3e-3, betas: [0.9, 0.95], weight_decay: 0.1, clip: 1.0}}
schedule: {{name: cosine, warmup_steps: 5}}
train: {{steps: 50, global_batch: 10, micro_batch: 2, log_every: 1}}
checkpoint: {{every: 0}}
"""
DIGITS = """\
name: digits
trainer: unitrain.tasks:Classification
model: {name: convnet, channels: 8, depth: 1}
data: {name: digits}
optimizer: {lr: 1e-3}
train: {steps: 50, global_batch: 20, micro_batch: 4, log_every: 1}
checkpoint: {every: 0}
"""
WORDS = ["the", "a", "of", "loss", "batch", "rank", "step", "never", "always", "shard", "gradient", "learns", "and"]

Record = Callable[[str, list[float], list[float]], float]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parity")


@pytest.fixture(scope="module")
def text(folder: Path) -> str:
    """A recipe whose samples have from 2 to 32 tokens, and padding."""
    chance = random.Random(0)
    lines = [" ".join(chance.choices(WORDS, k=chance.choice([1, 2, 3, 9]))) for _ in range(600)]
    (folder / "words.txt").write_text("\n".join(lines))
    return TEXT.format(trainers=TRAINERS, text=folder / "words.txt")


@pytest.fixture(scope="module")
def reference(folder: Path, text: str) -> list[float]:
    """The curve of `single` without accumulation."""
    return curve(text, folder / "reference", "single-1", "train.micro_batch=null")


@pytest.fixture
def compared(record_property: Callable[[str, object], None]) -> Record:
    """The largest relative difference of two curves, also printed and recorded."""

    def compare(name: str, ours: list[float], theirs: list[float]) -> float:
        reached = difference(ours, theirs)
        print(f"{name}: {reached:.1e} over {len(ours)} steps")
        record_property(name, reached)
        return reached

    return compare


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_accumulation_changes_nothing(
    folder: Path, text: str, reference: list[float], compared: Record, micro_batch: int
) -> None:
    name = f"single-1, micro_batch {micro_batch}"
    ours = curve(text, folder / name, "single-1", f"train.micro_batch={micro_batch}")
    assert compared(name, ours, reference) < TIGHT


@pytest.mark.parametrize(
    ("shape", "micro_batch"),
    [
        ("ddp-1", "2"),
        ("ddp-2", "2"),
        ("ddp-3", "2"),  # ranks hold 3, 3 and 4 rows: some micro-batches are fillers
        ("fsdp2-1", "2"),
        ("fsdp2-2", "2"),
        ("fsdp2-3", "2"),
        ("ddp-2", "null"),
        ("fsdp2-3", "1"),
    ],
)
def test_a_curve_is_that_of_single(
    folder: Path, text: str, reference: list[float], compared: Record, shape: str, micro_batch: str
) -> None:
    name = f"{shape}, micro_batch {micro_batch}"
    ours = curve(text, folder / name, shape, f"train.micro_batch={micro_batch}")
    assert compared(name, ours, reference) < TIGHT
    ours_end, end = metrics(folder / name, "eval")[-1], metrics(folder / "reference", "eval")[-1]
    assert ours_end["loss"] == pytest.approx(end["loss"], rel=TIGHT)


def test_single_refuses_more_than_one_rank(folder: Path, text: str) -> None:
    ended = launch(text, folder / "refused", "single-2")
    assert ended.code == 78
    assert ended.last_line == (
        "error: strategy 'single' trains in one process, but 2 ranks were asked for; "
        "use --nproc 1, or --strategy ddp or fsdp2"
    )
    assert not (folder / "refused").exists()


@pytest.mark.parametrize("shape", ["single-1", "ddp-2", "fsdp2-2"])
def test_bf16_stays_in_a_band_around_fp32(
    folder: Path, text: str, reference: list[float], compared: Record, shape: str
) -> None:
    ours = curve(text, folder / f"bf16-{shape}", shape, "train.precision=bf16")
    assert 0 < compared(f"bf16 {shape}", ours, reference) < BAND


@pytest.mark.parametrize("shape", ["single-1", "fsdp2-2"])
def test_fp16_scales_its_loss_and_its_scale_is_saved(folder: Path, compared: Record, shape: str) -> None:
    whole = folder / f"fp16-{shape}"
    ours = curve(ROWS, whole, shape, "train.precision=fp16")
    applied = [record["applied"] for record in metrics(whole)]
    skipped = applied.count(0)
    assert applied[0] == 0, "the first scale is too large for these losses"
    assert applied[-8:] == [1] * 8
    newest = CheckpointReader(checkpoints(whole)[-1]).role("model")
    assert newest.read("fp16.scale", "*", (), ()) == 2.0 ** (16 - skipped)

    again = copied(whole, folder / f"fp16-{shape}-again", up_to=10)
    if shape == "single-1":
        fit(ROWS, again, "train.precision=fp16")
    else:
        resume(again, shape).succeeded()
    assert losses(again) == ours

    exact = curve(ROWS, folder / f"fp32-{shape}", shape, "optimizer.lr=0", "train.steps=3")
    half = curve(ROWS, folder / f"fp16-{shape}-still", shape, "optimizer.lr=0", "train.steps=3", "train.precision=fp16")
    assert 0 < compared(f"fp16 {shape}", half, exact) < BAND


@pytest.mark.parametrize("shape", ["ddp-2", "fsdp2-3"])
def test_group_norms_are_tight(folder: Path, compared: Record, shape: str) -> None:
    theirs = curve(DIGITS, folder / f"group-single-{shape}", "single-1", "train.micro_batch=null")
    ours = curve(DIGITS, folder / f"group-{shape}", shape)
    assert compared(f"group norm {shape}", ours, theirs) < TIGHT


def test_batch_norms_see_the_rows_of_a_rank_and_stay_in_a_band(folder: Path, compared: Record) -> None:
    recipe = DIGITS.replace("depth: 1", "depth: 1, norm: batch").replace("micro_batch: 4", "micro_batch: null")
    theirs, ours = curve(recipe, folder / "batch-single", "single-1"), curve(recipe, folder / "batch-ddp", "ddp-2")
    assert TIGHT < compared("batch norm ddp-2", ours, theirs) < BAND


ADAMW = "{lr: 1e-2, betas: [0.8, 0.95], eps: 1e-6, weight_decay: 0.3, clip: 0.5}"
torch_adamw = functools.partial(torch.optim.AdamW, betas=(0.8, 0.95), eps=1e-6)


@pytest.mark.parametrize(
    ("recipe", "make"),
    [
        (ADAMW, lambda groups: torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=1e-6)),
        (
            ADAMW.replace("}", ", decay: matrices}"),
            lambda groups: torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=1e-6),
        ),
        (
            "{name: sgd, lr: 1e-2, momentum: 0.9, weight_decay: 0.3}",
            lambda groups: torch.optim.SGD(groups, momentum=0.9),
        ),
        ("{name: sgd, lr: 1e-2, clip: 0.5, weight_decay: 0.3, decay: matrices}", torch.optim.SGD),
    ],
    ids=["adamw", "adamw, matrices decay", "sgd with momentum", "sgd, matrices decay"],
)
def test_a_curve_is_that_of_plain_torch(
    tmp_path: Path, compared: Record, recipe: str, make: Callable[[Any], torch.optim.Optimizer]
) -> None:
    overrides = [f"optimizer={recipe}", "train.steps=50"]
    ours = curve(ROWS, tmp_path / "run", "single-1", *overrides)
    assert compared(recipe, ours, plain_torch(recipe_from_text(ROWS, overrides=overrides), make)) < TIGHT


def plain_torch(recipe: Recipe, make: Callable[[Any], torch.optim.Optimizer]) -> list[float]:
    """What a loop by hand gives for `trainers.Rows`."""
    wanted, train = recipe.optimizer, recipe.train
    rows = Rows(recipe)
    torch.manual_seed(train.seed)
    model, source = rows.build_model(), rows.build_source("train")
    decaying = [param for param in model.parameters() if wanted.decay == "all" or param.ndim >= 2]
    still = [param for param in model.parameters() if wanted.decay != "all" and param.ndim < 2]
    groups = [{"params": decaying, "weight_decay": wanted.weight_decay}, {"params": still, "weight_decay": 0.0}]
    optimizer = make([group for group in groups if group["params"]])
    found = []
    for step in range(train.steps):
        ids = sample_ids(train.seed, step, train.global_batch, len(source))
        batch = {name: torch.from_numpy(array) for name, array in source.fetch(ids).items()}
        total, weight, _ = rows.loss(model, batch)
        loss = total / weight
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), float("inf") if wanted.clip is None else wanted.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe.schedule, step, train.steps, wanted.lr)
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("shape", ["single-1", "ddp-2", "fsdp2-2"])
def test_an_optimizer_of_ones_own_learns_alike_and_resumes_exactly(folder: Path, compared: Record, shape: str) -> None:
    own, whole = trainer("Own"), folder / f"own-{shape}"
    ours = curve(ROWS, whole, shape, own)
    alone = ours if shape == "single-1" else curve(ROWS, folder / f"own-beside-{shape}", "single-1", own)
    assert compared(f"RMSprop {shape}", ours, alone) < TIGHT
    again = copied(whole, folder / f"own-{shape}-again", up_to=10)
    if shape == "single-1":
        fit(ROWS, again, own)
    else:
        resume(again, shape).succeeded()
    assert losses(again) == ours
