"""Strategy `accelerate` refuses, before launch, what a configuration file says against the recipe or in vain."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from unitrain import registry
from unitrain.errors import RecipeError
from unitrain.recipe import OptimizerRecipe, Recipe, StrategyRecipe, TrainRecipe
from unitrain.strategies import _torch_refusals
from unitrain.strategy import Cluster

pytestmark = pytest.mark.fast

FIXTURES = Path(__file__).parents[1] / "fixtures" / "accelerate"
PLAIN = {"distributed_type": "MULTI_CPU"}
ZERO = {"distributed_type": "DEEPSPEED"}


def refusals(config: Path | None, *, nproc: int = 2, nodes: int = 1, precision: str = "fp32") -> list[str]:
    """What `accelerate` says to a recipe with that file."""
    return refusals_of({"config": str(config)} if config else {}, nproc=nproc, nodes=nodes, precision=precision)


def refusals_of(options: dict[str, Any], *, nproc: int = 2, nodes: int = 1, precision: str = "fp32") -> list[str]:
    """What `accelerate` says to a recipe with those options."""
    recipe = Recipe(
        trainer="a:b",
        train=TrainRecipe(precision=precision),
        optimizer=OptimizerRecipe(clip=1.0),
        strategy=StrategyRecipe(name="accelerate", options=options),
    )
    problems = registry.resolve(registry.STRATEGIES["accelerate"].problems)(recipe, Cluster(nodes=nodes, nproc=nproc))
    return [f"{problem.what}; {problem.instead}" for problem in problems]


@pytest.mark.parametrize(
    "name", ["cpu_ddp.yaml", "fsdp2.yaml", "fsdp2_tuned.yaml", "zero2.yaml", "zero3_offload.yaml", None]
)
def test_files_that_leave_the_recipe_its_part_are_taken(name: str | None) -> None:
    assert refusals(FIXTURES / name if name else None) == []


SAID: dict[str, tuple[dict[str, Any], list[str]]] = {
    "processes": (
        PLAIN | {"num_processes": 8, "num_machines": 2},
        [
            "FILE has num_processes: 8, and the recipe starts 2; "
            "set launcher.nproc, or take num_processes out of the file",
            "FILE has num_machines: 2, and the recipe starts 1; "
            "set launcher.nodes, or take num_machines out of the file",
        ],
    ),
    "one process": (
        {"distributed_type": "NO"},
        [
            "FILE has distributed_type: NO, which is one process, and the recipe starts 2; "
            "use --nproc 1, or set distributed_type: MULTI_GPU or MULTI_CPU"
        ],
    ),
    "precision": (
        PLAIN | {"mixed_precision": "bf16"},
        ["FILE has mixed_precision: bf16, and train.precision is fp32; set train.precision=bf16"],
    ),
    "fp8": (
        PLAIN | {"mixed_precision": "fp8"},
        ["FILE has mixed_precision: fp8, and train.precision is fp32; use one of fp32, bf16, fp16"],
    ),
    "accumulation": (
        PLAIN | {"gradient_accumulation_steps": 4},
        [
            "FILE has gradient_accumulation_steps: 4; "
            "take it out: train.global_batch and train.micro_batch say how often ranks accumulate"
        ],
    ),
    "compiler": (
        PLAIN | {"dynamo_config": {"dynamo_backend": "INDUCTOR", "dynamo_mode": "default"}},
        [
            "FILE has dynamo_config.dynamo_backend: INDUCTOR; "
            "take it out, and set strategy.options.compile=true to compile the model's blocks"
        ],
    ),
    "in vain": (
        PLAIN
        | {"gpu_ids": "0,1", "parallelism_config": {"parallelism_config_tp_size": 2}, "enable_cpu_affinity": True},
        [
            "FILE has gpu_ids: 0,1, which would have no effect; take gpu_ids out of the file",
            "FILE has parallelism_config: {'parallelism_config_tp_size': 2}, which would have no effect; "
            "take parallelism_config out of the file",
            "FILE has enable_cpu_affinity: True, which would have no effect; take enable_cpu_affinity out of the file",
        ],
    ),
    "FSDP 1": (
        {"distributed_type": "FSDP", "fsdp_config": {"fsdp_sharding_strategy": "FULL_SHARD"}},
        [
            "FILE asks for FSDP 1, which flattens the parameters that checkpoints name; "
            "set fsdp_version: 2 (`accelerate to-fsdp2` rewrites a file), or use --strategy fsdp2"
        ],
    ),
    "FSDP in vain": (
        {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2, "fsdp_ignored_modules": "head"}},
        [
            "FILE has fsdp_config.fsdp_ignored_modules: head, which would have no effect; "
            "take fsdp_config.fsdp_ignored_modules out of the file"
        ],
    ),
    "Megatron": (
        {"distributed_type": "MEGATRON_LM", "num_processes": 8},
        [
            "FILE has distributed_type: MEGATRON_LM; "
            "use MULTI_CPU, MULTI_GPU, FSDP or DEEPSPEED there, or another strategy"
        ],
    ),
    "DeepSpeed's batches": (
        ZERO | {"deepspeed_config": {"zero_stage": 2, "gradient_accumulation_steps": 2, "gradient_clipping": 0.5}},
        [
            "FILE has gradient_accumulation_steps: 2; "
            "take it out: train.global_batch and train.micro_batch say how often ranks accumulate",
            "FILE asks for optimizer.clip=0.5, and the recipe has 1.0; "
            "set optimizer.clip=0.5, or take it out of the file",
        ],
    ),
    "DeepSpeed's stages": (
        ZERO | {"deepspeed_config": {"zero_stage": 0}},
        ["FILE has ZeRO stage 0; set distributed_type: MULTI_GPU or MULTI_CPU"],
    ),
    "ZeRO-1 offloaded": (
        ZERO | {"deepspeed_config": {"zero_stage": 1, "offload_optimizer_device": "cpu"}},
        ["FILE has ZeRO stage 1 with an offloaded optimizer; set the stage to 2"],
    ),
    "DeepSpeed in vain": (
        ZERO | {"deepspeed_config": {"zero_stage": 2, "deepspeed_moe_layer_cls_names": "Experts"}},
        [
            "FILE has deepspeed_config.deepspeed_moe_layer_cls_names: Experts, which would have no effect; "
            "take deepspeed_config.deepspeed_moe_layer_cls_names out of the file"
        ],
    ),
}


@pytest.mark.parametrize("case", SAID)
def test_what_a_file_says_against_the_recipe_is_named(case: str, tmp_path: Path) -> None:
    values, expected = SAID[case]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(values))
    assert [said.replace(str(path), "FILE") for said in refusals(path)] == expected


def test_a_file_of_deepspeeds_own_is_compared_with_the_recipe_key_by_key() -> None:
    said = refusals(FIXTURES / "deepspeed_file.yaml", nproc=4, nodes=2)
    where = FIXTURES / "../deepspeed/zero2.json"
    assert [line.partition(", and the recipe has ")[0] for line in said] == [
        f"{where} asks for {what}"
        for what in (
            "optimizer.betas=[0.9, 0.95]",
            "optimizer.lr=0.0003",
            "optimizer.weight_decay=0.1",
            "schedule.name=linear",
            "schedule.warmup_steps=100",
            "train.micro_batch=8",
            "train.global_batch=256",
            "train.precision=bf16",
            "train.steps=2000",
        )
    ]


def test_a_recipe_that_agrees_in_precision_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(PLAIN | {"mixed_precision": "bf16"}))
    assert refusals(path, precision="bf16") == []


def test_a_deepspeed_configuration_that_says_nothing_of_precision_takes_the_recipes(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(ZERO | {"deepspeed_config": {"zero_stage": 3}}))
    assert refusals(path, precision="bf16") == []


def test_a_config_that_is_no_path_and_an_unknown_option() -> None:
    assert refusals_of({"config": 3}) == ["strategy.options.config is 3; give the path of an accelerate config file"]
    (said,) = refusals_of({"confg": "a.yaml"})
    assert "strategy 'accelerate' has no option 'confg', did you mean 'config'?" in said


def test_a_file_that_is_not_there_is_said() -> None:
    with pytest.raises(RecipeError, match=r"'none\.yaml' cannot be read: No such file or directory"):
        refusals(Path("none.yaml"))


def test_refusing_imports_neither_accelerate_nor_torch() -> None:
    code = (
        "import sys; from unitrain.strategies import _torch_refusals as r; from unitrain.recipe import *\n"
        "from unitrain.strategy import Cluster\n"
        f"own = StrategyRecipe(name='accelerate', options={{'config': {str(FIXTURES / 'zero2.yaml')!r}}})\n"
        "r.accelerate(Recipe(trainer='a:b', strategy=own), Cluster(nodes=1, nproc=2))\n"
        "assert not {'torch', 'accelerate', 'deepspeed'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_stage_keeps_the_recipes_own_common_options() -> None:
    config = _torch_refusals.read_accelerate(FIXTURES / "zero3_offload.yaml")
    recipe = Recipe(trainer="a:b", strategy=StrategyRecipe(name="accelerate", options={"compile": True}))
    stage = _torch_refusals.accelerate_stage(recipe, config)
    assert (stage.number, stage.offloads) == (3, ("offload_optimizer", "offload_param"))
    assert stage.recipe.strategy.options == {"compile": True}
