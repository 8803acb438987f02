"""Runs on strategy `accelerate`, as users launch them: accelerate does the work, and only what the recipe says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, PartialState

from unitrain.errors import Refused
from unitrain.recipe import Recipe, StrategyRecipe
from unitrain.strategies.accelerate import Accelerate
from unitrain.world import World

from . import runs
from .trainers import Rows

FIXTURES = Path(__file__).parents[1] / "fixtures" / "accelerate"
HOSTILE = {  # what another job may have left in a shell
    "ACCELERATE_USE_FSDP": "true",
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "7",
    "ACCELERATE_TORCH_DEVICE": "meta",
    "FSDP_VERSION": "1",
    "FSDP_OFFLOAD_PARAMS": "true",
}
SAYS_WHAT_RUNS = """\
from trainers import Rows
from accelerate import Accelerator


class Telling(Rows):
    def on(self, event, **facts):
        if event == "start" and self.world.first:
            accelerator = self._control.way.accelerator
            assert isinstance(accelerator, Accelerator)
            engine = self.engines["model"]
            wrapped = [engine.sharing.module, engine.model, *accelerator._models]
            names = [type(model).__name__ for model in wrapped]
            print("runs", accelerator.distributed_type.value, accelerator.num_processes, *names, flush=True)
"""


def option(name: str) -> str:
    return f"strategy.options.config={FIXTURES / name}"


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on DDP, to compare with."""
    folder = tmp_path_factory.mktemp("ddp") / "run"
    runs.launch(runs.ROWS, folder, "ddp-2").succeeded()
    return folder


def test_replicas_of_accelerate_are_bitwise_those_of_ddp_whatever_the_shell_says(
    ddp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in HOSTILE.items():
        monkeypatch.setenv(name, value)
    ended = runs.launch(runs.ROWS, tmp_path / "run", "accelerate-2", option("cpu_ddp.yaml")).succeeded()
    assert runs.losses(tmp_path / "run") == runs.losses(ddp)
    assert "ACCELERATE_USE_FSDP, FSDP_OFFLOAD_PARAMS, FSDP_VERSION decide nothing here" in ended.out


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("cpu_ddp.yaml", "runs MULTI_CPU 2 DistributedDataParallel Sequential LossModule"),
        ("fsdp2.yaml", "runs FSDP 2 LossModule FSDPSequential FSDPSequential"),
        ("zero2.yaml", "runs DEEPSPEED 2 RootModule Sequential DeepSpeedEngine"),
    ],
)
def test_what_the_file_names_is_what_accelerate_runs(config: str, expected: str, ddp: Path, tmp_path: Path) -> None:
    (tmp_path / "telling.py").write_text(SAYS_WHAT_RUNS)
    recipe = runs.ROWS.replace(str(runs.TRAINERS), str(tmp_path / "telling.py"))
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    (tmp_path / "recipe.yaml").write_text(recipe.replace(":Rows", ":Telling"))
    flags = ("--strategy", "accelerate", "--nproc", "2", "--run-dir", tmp_path / "run")
    ended = runs.unitrain(
        "launch", tmp_path / "recipe.yaml", *flags, option(config), cwd=tmp_path, PYTHONPATH=path
    ).succeeded()
    assert expected in ended.out
    assert runs.difference(runs.losses(tmp_path / "run"), runs.losses(ddp)) < 1e-5


def test_a_run_goes_on_without_accelerate_and_under_torchrun_with_it(ddp: Path, tmp_path: Path) -> None:
    half = runs.copied(ddp, tmp_path / "half", up_to=10)
    runs.resume(half, "accelerate-2", option("fsdp2.yaml"), "launcher.name=torchrun").succeeded()
    assert runs.difference([record["loss"] for record in runs.metrics(half)][-10:], runs.losses(ddp)[-10:]) < 1e-5
    there = runs.copied(half, tmp_path / "there", up_to=20)
    runs.resume(there, "single-1", "strategy.options={}", "train.steps=21").succeeded()


@pytest.mark.parametrize("name", ["gpu_ddp.yaml", "fsdp1.yaml", "zero3_tuned.yaml"])
def test_a_file_that_contradicts_the_recipe_is_refused_before_a_process_starts(name: str, tmp_path: Path) -> None:
    ended = runs.launch(runs.ROWS, tmp_path / "run", "accelerate-2", option(name))
    assert ended.code == 78
    assert "num_processes" in ended.err
    assert not (tmp_path / "run").exists()


def opened(folder: Path, text: str) -> Accelerate:
    """The strategy with a file of that text, open in this process alone."""
    path = folder / "a.yaml"
    path.write_text(text)
    strategy = Accelerate(
        Recipe(trainer="a:b", strategy=StrategyRecipe(name="accelerate", options={"config": str(path)}))
    )
    try:
        strategy.open(World())
    except Refused:
        strategy.close()
        raise
    return strategy


def test_what_accelerate_would_run_in_place_of_what_was_asked_is_refused_with_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(Refused, match="asks accelerate for MULTI_GPU, and it would run MULTI_CPU on cpu here"):
        opened(tmp_path, "distributed_type: MULTI_GPU\n")


def test_closing_forgets_the_ranks(tmp_path: Path) -> None:
    strategy = opened(tmp_path, "distributed_type: MULTI_CPU\n")
    assert PartialState._shared_state and AcceleratorState._shared_state
    strategy.close()
    assert not PartialState._shared_state and not AcceleratorState._shared_state
    assert World.from_environment().starter == "alone"
    opened(tmp_path, "fsdp_config: {fsdp_version: 2}\ndistributed_type: FSDP\n").close()
    assert not [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]


def test_two_runs_of_one_process_do_not_meet(tmp_path: Path) -> None:
    first = runs.fit_by(Rows, runs.ROWS, tmp_path / "one", "train.steps=3", strategy="accelerate")
    second = runs.fit_by(Rows, runs.ROWS, tmp_path / "two", "train.steps=3", strategy="accelerate")
    assert first.metrics["loss"] == second.metrics["loss"]
