"""Configurations of accelerate, DeepSpeed and torchrun become recipes; what is not understood is listed."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unitrain import registry
from unitrain.cli.importing import TRAINER, import_
from unitrain.errors import RecipeError, UnitrainError, UserError
from unitrain.importers.accelerate import accelerate_config, import_accelerate, read_accelerate
from unitrain.importers.ds_config import import_ds_config
from unitrain.importers.foreign import read_file
from unitrain.importers.torchrun import import_torchrun
from unitrain.recipe import Recipe
from unitrain.recipe_file import load_recipe, recipe_from_text
from unitrain.strategy import Cluster

pytestmark = pytest.mark.fast

FIXTURES = Path(__file__).parents[1] / "fixtures"
FILES = [*sorted((FIXTURES / "accelerate").glob("*.yaml")), *sorted((FIXTURES / "deepspeed").glob("*.json"))]

COMMANDS = {
    "torchrun --nproc-per-node 4 --nnodes 2 train.py --lr 1e-3": (
        {"name": "torchrun", "nodes": 2, "nproc": 4},
        {"script": "train.py --lr 1e-3"},
    ),
    "OMP_NUM_THREADS=4 /opt/env/bin/torchrun --standalone --nproc_per_node=8 -m pack.train 'a b' --nnodes 9": (
        {"name": "torchrun", "nodes": 1, "nproc": 8},
        {"environment.OMP_NUM_THREADS": "4", "script": "-m pack.train 'a b' --nnodes 9"},
    ),
    "python3 -m torch.distributed.run --nnodes=1:4 --rdzv-endpoint=h:29400 --rdzv_backend c10d --max_restarts 3 t.py": (
        {
            "name": "torchrun",
            "nodes": 4,
            "nproc": 1,
            "options": {"rdzv_backend": "c10d", "rdzv_endpoint": "h:29400", "max_restarts": 3},
        },
        {"script": "t.py"},
    ),
    "torchrun --nproc-per-node gpu -t 3 t.py": (
        {"name": "torchrun", "nodes": 1},
        {"nproc_per_node": "gpu", "script": "t.py"},
    ),
}


def imported(capsys: pytest.CaptureFixture[str], path: Path | None = None, **options: object) -> tuple[str, str]:
    """stdout and stderr of `unitrain import`."""
    import_(**{"path": path, "torchrun": None, "to": None, "trainer": TRAINER, **options})  # type: ignore[arg-type]
    found = capsys.readouterr()
    return found.out, found.err


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_configuration_becomes_the_recorded_recipe_and_notes(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, notes = imported(capsys, path)
    recorded = (FIXTURES / "imported" / f"{path.name}.txt").read_text(encoding="utf-8")
    assert f"{recipe}\n{notes}" == recorded


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_recipe_is_one_that_its_strategy_takes(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_from_text(imported(capsys, path)[0])
    cluster = Cluster(nodes=recipe.launcher.nodes, nproc=recipe.launcher.nproc)
    assert registry.resolve(registry.STRATEGIES[recipe.strategy.name].problems)(recipe, cluster) == []


def test_what_a_launch_will_refuse_is_said_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}')
    _, notes = imported(capsys, path)
    assert "note: a launch will refuse this: strategy.options.zero_optimization.zenflow would change" in notes


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[:24])
def test_a_torchrun_command_becomes_a_launcher_and_its_script_is_listed(command: str) -> None:
    launcher, unknown = COMMANDS[command]
    found = import_torchrun(command)
    assert found.recipe == {"launcher": launcher}
    assert found.unknown == unknown


def test_a_torchrun_command_is_written_as_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    text, notes = imported(capsys, torchrun="torchrun --nproc-per-node 4 --nnodes 2 train.py --lr 1e-3")
    launcher = recipe_from_text(text).launcher
    assert (launcher.name, launcher.nodes, launcher.nproc) == ("torchrun", 2, 4)
    assert notes.splitlines()[-1] == "not understood: script: train.py --lr 1e-3"


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        ("", "the command starts with 'nothing'; it must be torchrun, or python -m torch.distributed.run"),
        ("python train.py", "the command starts with 'python'; it must be torchrun"),
        ("torchrun 'open", "the torchrun command cannot be split into words: No closing quotation"),
        ("torchrun --nproc-per-gpu 2 t.py", "torchrun has no option '--nproc-per-gpu' that is known here"),
        ("torchrun --nnodes", "the option --nnodes of the torchrun command has no value"),
    ],
)
def test_a_command_that_cannot_be_read_is_refused(command: str, complaint: str) -> None:
    with pytest.raises(RecipeError, match=r"^") as error:
        import_torchrun(command)
    assert str(error.value).startswith(complaint)


def test_a_trainer_of_ones_own_needs_no_placeholders(capsys: pytest.CaptureFixture[str]) -> None:
    text, notes = imported(capsys, FIXTURES / "accelerate" / "fsdp2.yaml", trainer="mine.py:Mine")
    recipe = recipe_from_text(text)
    assert (recipe.trainer, recipe.model.name, recipe.data.name) == ("mine.py:Mine", "", "")
    assert "placeholder" not in notes


def test_a_file_is_written_and_never_over_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    to, source = tmp_path / "recipe.yaml", FIXTURES / "deepspeed" / "zero2.json"
    out, notes = imported(capsys, source, to=to)
    assert out == "" and notes.endswith(f"wrote {to}\n")
    assert load_recipe(to).strategy.name == "zero2"
    before = to.read_bytes()
    with pytest.raises(UserError, match=r"recipe\.yaml exists already; give --to another name"):
        imported(capsys, source, to=to)
    assert to.read_bytes() == before
    with pytest.raises(UserError, match="cannot be written: No such file or directory"):
        imported(capsys, source, to=tmp_path / "none" / "recipe.yaml")


@pytest.mark.parametrize("options", [{}, {"path": Path("x"), "torchrun": "torchrun t.py"}])
def test_one_source_is_asked_for(options: dict[str, object], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="give one of PATH and --torchrun COMMAND"):
        imported(capsys, **options)  # type: ignore[arg-type]


def test_a_folder_is_a_checkpoint_and_goes_to_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="read as a DeepSpeed checkpoint: give --to FOLDER"):
        imported(capsys, tmp_path)


# --- meanings ----------------------------------------------------------------------------------------------------


def ds(**values: object) -> Recipe:
    """The recipe of a DeepSpeed configuration."""
    found = import_ds_config(values, "ds.json", ranks=4).recipe
    return recipe_from_text(json.dumps({"trainer": "a:b", **found}))


def test_batches_of_deepspeed_count_all_ranks() -> None:
    assert ds(train_micro_batch_size_per_gpu=4, gradient_accumulation_steps=2).train.global_batch == 32
    assert ds(train_batch_size=64, train_micro_batch_size_per_gpu=4).train.global_batch == 64


def test_no_clipping_stays_none_and_zero_is_none() -> None:
    assert ds().optimizer.clip is None
    assert ds(gradient_clipping=0.0).optimizer.clip is None
    assert ds(gradient_clipping=0.5).optimizer.clip == 0.5


@pytest.mark.parametrize(
    ("zero", "strategy"),
    [
        ({"stage": 0}, "ddp"),
        ({"stage": 1}, "zero1"),
        ({"stage": 2, "offload_optimizer": {"device": "none"}}, "zero2"),
        ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, "zero2_offload"),
        ({"stage": 2, "cpu_offload": True}, "zero2_offload"),
        ({"stage": 3}, "zero3"),
        ({"stage": 3, "offload_param": {"device": "cpu"}}, "zero3_offload"),
    ],
)
def test_a_stage_and_its_offload_are_a_strategy(zero: dict[str, object], strategy: str) -> None:
    assert ds(zero_optimization=zero).strategy.name == strategy


def test_sgd_and_an_unknown_optimizer() -> None:
    assert ds(optimizer={"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}).optimizer.momentum == 0.9
    found = import_ds_config({"optimizer": {"type": "Lamb", "params": {"lr": 1.0}}}, "ds.json")
    assert found.unknown == {"optimizer.type": "Lamb", "optimizer.params": {"lr": 1.0}}
    assert "optimizer" not in found.recipe


def test_the_kind_follows_the_group_that_is_there_as_in_accelerate() -> None:
    assert accelerate_config({}, "a.yaml").kind == "ddp"
    assert accelerate_config({"fsdp_config": {"fsdp_version": 2}}, "a.yaml").kind == "fsdp"
    assert accelerate_config({"deepspeed_config": {"zero_stage": 3}}, "a.yaml").kind == "deepspeed"
    assert accelerate_config({"distributed_type": False}, "a.yaml").kind == "alone"


@pytest.mark.parametrize(
    ("sharding", "strategy", "options"),
    [
        (1, "fsdp2", {}),
        ("SHARD_GRAD_OP", "fsdp2", {"reshard_after_forward": False}),
        ("no_shard", "ddp", {}),
        ("HYBRID_SHARD", "fsdp2", {"shard_size": 4}),
        (5, "fsdp2", {"reshard_after_forward": False, "shard_size": 4}),
    ],
)
def test_sharding_strategies_of_fsdp_1_have_their_like(
    sharding: object, strategy: str, options: dict[str, object], tmp_path: Path
) -> None:
    values = {"distributed_type": "FSDP", "num_processes": 8, "num_machines": 2}
    path = tmp_path / "a.json"
    path.write_text(json.dumps({**values, "fsdp_config": {"fsdp_sharding_strategy": sharding}}))
    found = import_accelerate(path).recipe["strategy"]
    assert (found["name"], found.get("options", {})) == (strategy, options)


# --- hostile and broken files --------------------------------------------------------------------------------------

BROKEN = {
    "tag.yaml": ("distributed_type: !!python/object/apply:os.system [ls]\n", "the tag !!python/object/apply"),
    "twice.yaml": ("use_cpu: true\nuse_cpu: false\n", "the key 'use_cpu' was given before, in line 1"),
    "bomb.yaml": (
        "a: &a [1,1,1,1,1,1,1,1]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b]\n"
        "d: &d [*c,*c,*c,*c,*c,*c,*c,*c]\ne: [*d,*d,*d,*d,*d,*d,*d,*d]\n",
        "holds more than 10000 values once its aliases are written out",
    ),
    "deep.yaml": ("a: " + "[" * 40 + "]" * 40, "groups are nested deeper than 32"),
    "list.yaml": ("[1, 2]\n", "this is a list"),
    "empty.yaml": ("  \n", "is empty; there is nothing to read"),
    "environment.yaml": ("distributed_type: ${oc.env:HOME}\n", "is refused"),
    "twice.json": ('{"train_batch_size": 1, "train_batch_size": 2}', "a key stands in it twice"),
    "nan.json": ('{"train_batch_size": NaN}', "NaN is no JSON number"),
    "infinite.json": ('{"gradient_clipping": 1e999}', "is not JSON that can be used"),
    "half.json": ('{"optimizer": {"type": "\\ud800"}}', "is not JSON that can be used"),
    "long.json": ('{"train_batch_size": ' + "9" * 5000 + "}", "is not JSON that can be used"),
    "deep.json": ('{"a":' * 40 + "1" + "}" * 40, "groups are nested deeper than 32"),
    "deeper.json": ('{"a":' * 100_000 + "1" + "}" * 100_000, "is not JSON that can be used"),
    "list.json": ("[1]", "it holds a list in place of an object"),
    "cut.json": ('{"train_batch_size": 1', "is not JSON that can be used"),
    "large.json": ('{"a": "' + "x" * (1 << 20) + '"}', "is larger than 1 MiB"),
    "stage.json": ('{"zero_optimization": {"stage": 4}}', "zero_optimization.stage is 4; it must be 0, 1, 2 or 3"),
    "group.json": ('{"zero_optimization": [1]}', "zero_optimization is [1]; it must be a group of keys"),
    "both.json": (
        '{"train_batch_size": 1, "bf16": {"enabled": true}, "fp16": {"enabled": true}}',
        "both bf16 and fp16 are enabled",
    ),
    "rate.json": (
        '{"train_batch_size": 1, "optimizer": {"type": "Adam", "params": {"lr": -1}}}',
        "optimizer.lr is -1.0; it must be at least 0",
    ),
    "other.yaml": ("learning_rate: 1\n", "is neither an accelerate config (no distributed_type) nor a DeepSpeed one"),
    "processes.yaml": ("distributed_type: NO\nnum_processes: many\n", "num_processes is 'many'; it must be a whole"),
    "version.yaml": (
        "distributed_type: FSDP\nfsdp_config: {fsdp_version: 3}\n",
        "fsdp_config.fsdp_version is 3; it must be 1 or 2",
    ),
    "wrap.yaml": (
        "distributed_type: FSDP\nfsdp_config: {fsdp_auto_wrap_policy: ALL}\n",
        "fsdp_config.fsdp_auto_wrap_policy is 'ALL'; it must be one of NO_WRAP",
    ),
    "file.yaml": (
        "distributed_type: DEEPSPEED\ndeepspeed_config: {deepspeed_config_file: gone.json}\n",
        "cannot be read: No such file or directory",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_or_hostile_file_is_refused_in_a_sentence(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, complaint = BROKEN[name]
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as error:
        imported(capsys, path)
    assert complaint in str(error.value)
    assert "\n" not in str(error.value)


def test_bytes_that_are_no_text_and_files_that_are_not_there(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(b"distributed_type: \xff\xfe")
    with pytest.raises(RecipeError, match=r"a\.yaml is not UTF-8 text"):
        read_accelerate(path)
    with pytest.raises(RecipeError, match="cannot be read: No such file"):
        read_file(tmp_path / "gone.json")


def test_a_value_cannot_write_lines_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"distributed_type": "X\nstrategy: {name: ddp}", "b\x1b[2J": "c\nnot understood: d"}))
    text, notes = imported(capsys, path)
    assert recipe_from_text(text).trainer == TRAINER
    assert "\x1b" not in notes
    assert all(line.startswith(("note: ", "not understood: ")) for line in notes.splitlines())


PLAIN = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["auto", "none"])
)
KEYS = st.sampled_from(
    [
        *("stage", "device", "enabled", "type", "params", "lr", "betas", "offload_optimizer", "optimizer", "scheduler"),
        *("zero_optimization", "bf16", "fp16", "gradient_clipping", "train_batch_size", "x", "distributed_type"),
        *("fsdp_config", "fsdp_version", "deepspeed_config", "zero_stage", "num_processes", "dynamo_config", "gpu_ids"),
    ]
)
ANY = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4))


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(KEYS, ANY, max_size=6))
def test_no_values_make_an_importer_fail_but_by_a_sentence(values: dict[str, object]) -> None:
    for read in (accelerate_config, import_ds_config):
        with contextlib.suppress(UnitrainError):
            read(values, "a.json")


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from(["--nnodes", "--nproc-per-node=", "-m", "2", "1:x", "=", "t.py", "--", "'"]), max_size=6)
)
def test_no_command_makes_an_importer_fail_but_by_a_sentence(words: list[str]) -> None:
    with contextlib.suppress(UnitrainError):
        import_torchrun(" ".join(["torchrun", *words]))
