"""Models of transformers train on every strategy, resume, and leave as folders that `from_pretrained` loads."""

from __future__ import annotations

import json
import shutil
import sys
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from unitrain import registry
from unitrain.errors import CheckpointMismatch
from unitrain.export import export
from unitrain.export.pieces import ROWS_BYTES
from unitrain.models.hf_torch import AUTO
from unitrain.run import Run
from unitrain.tasks import LanguageModel

sys.path.insert(0, str(Path(__file__).parent))  # the ranks import these modules by these names too
from hf_ranks import PROBE, Language, train_all
from runs import copied, fit_by, losses, unitrain

RANKS = Path(__file__).with_name("hf_ranks.py")
SIZES = "hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 4, vocab_size: 64"
CONFIGS = {
    "llama": f"{{model_type: llama, {SIZES}, num_key_value_heads: 2, tie_word_embeddings: true}}",
    "qwen2": f"{{model_type: qwen2, {SIZES}, num_key_value_heads: 2, tie_word_embeddings: false}}",
    "gpt2": "{model_type: gpt2, n_embd: 32, n_layer: 2, n_head: 4, vocab_size: 64, n_positions: 64, bos_token_id: 1, "
    "eos_token_id: 1, attn_pdrop: 0.0, embd_pdrop: 0.0, resid_pdrop: 0.0}",
    "bert": f"{{model_type: bert, {SIZES}, max_position_embeddings: 64, hidden_dropout_prob: 0.0, "
    "attention_probs_dropout_prob: 0.0}",
}
STRATEGIES = [name for name in ("ddp", "fsdp2", "zero2", "zero3") if registry.STRATEGIES[name].installed]


def recipe(trainer: str, model: str, data: Path, tokenizer: Path, **train: Any) -> str:
    """A recipe's text; classes have labels, all others whole texts in windows."""
    label = "label: label, " if trainer == "Classes" else ""
    keys = {"steps": 3, "global_batch": 6, "micro_batch": 2, "log_every": 1, "eval_every": 0} | train
    return (
        f"trainer: {RANKS}:{trainer}\n"
        f"model: {model}\n"
        f"data: {{name: datasets, path: {data}, tokenizer: {tokenizer}, {label}seq_len: 16, eval_fraction: 0, "
        f"cache: {data.parent / 'cache'}}}\n"
        "optimizer: {lr: 1e-2, weight_decay: 0.1, decay: matrices, clip: 1.0}\n"
        f"train: {json.dumps(keys)}\n"
        "checkpoint: {every: 3}\n"
    )


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with texts.jsonl (labelled), a tokenizer of 64 words, and `base`, a llama that was trained before."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    folder = tmp_path_factory.mktemp("inputs")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(59))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    rows = [
        {"text": " ".join(f"w{(row * 7 + place * place) % 59}" for place in range(5 + row % 9)), "label": row % 3}
        for row in range(60)
    ]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def recipes(inputs: Path) -> dict[str, str]:
    """Name -> recipe of each kind of model and task."""
    made = {
        name: recipe(
            "Language", f"{{name: hf, config: {CONFIGS[name]}}}", inputs / "texts.jsonl", inputs / "tokenizer.json"
        )
        for name in ("llama", "qwen2", "gpt2")
    }
    bert = f"name: hf, config: {CONFIGS['bert']}"
    for name, trainer, task in (
        ("masked", "Masked", "masked-lm"),
        ("classes", "Classes", "sequence-classification, num_labels: 3"),
    ):
        made[name] = recipe(trainer, f"{{{bert}, task: {task}}}", inputs / "texts.jsonl", inputs / "tokenizer.json")
    return made


@pytest.fixture(scope="module")
def alone(recipes: Mapping[str, str], inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every recipe trained in one process; then adapters beside the llama and the gpt2 that came of it."""
    folder = tmp_path_factory.mktemp("alone") / "single"
    train_all(folder, recipes, "single", 1)
    return folder


@pytest.fixture(scope="module")
def adapters(alone: Path, inputs: Path) -> dict[str, str]:
    """Name -> recipe of adapters beside models that were exported."""
    made = {}
    for name in ("llama", "gpt2"):
        export(Run(alone / name), inputs / f"base-{name}")
        model = f"{{name: hf, path: {inputs / f'base-{name}'}, lora: {{r: 2, alpha: 8}}}}"
        made[f"lora-{name}"] = recipe("Language", model, inputs / "texts.jsonl", inputs / "tokenizer.json")
    export(Run(alone / "masked"), inputs / "base-bert")
    model = f"{{name: hf, path: {inputs / 'base-bert'}, task: sequence-classification, num_labels: 3, lora: {{r: 2}}}}"
    made["lora-classes"] = recipe("Classes", model, inputs / "texts.jsonl", inputs / "tokenizer.json")
    return made


@pytest.fixture(scope="module", params=STRATEGIES)
def trained(
    request: pytest.FixtureRequest,
    recipes: Mapping[str, str],
    adapters: Mapping[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Every recipe and every adapter, trained on two ranks of a strategy: the folder of their runs."""
    folder = tmp_path_factory.mktemp("trained") / request.param
    train_all(folder, {**recipes, **adapters}, request.param, 2)
    return folder


def told(run: Path) -> dict[str, Any]:
    """What a run's model said at its end."""
    found: dict[str, Any] = json.loads((run / "told.json").read_text())
    return found


def says(model: Any) -> torch.Tensor:
    """Logits of a model of transformers for the fixed tokens."""
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(torch.tensor(PROBE)).logits
    return logits


def assert_says_the_same(model: Any, run: Path) -> None:
    torch.testing.assert_close(says(model), torch.tensor(told(run)["logits"]), rtol=1e-5, atol=1e-5)


TASKS = {"masked": "masked-lm", "classes": "sequence-classification"}


def test_two_ranks_learn_what_one_learns(trained: Path, alone: Path, recipes: Mapping[str, str]) -> None:
    for name in recipes:
        if name != "masked":  # which tokens are hidden depends on how rows are shared
            assert losses(trained / name) == pytest.approx(losses(alone / name), rel=1e-4), name


def test_an_export_says_what_the_model_said(trained: Path, recipes: Mapping[str, str], tmp_path: Path) -> None:
    for name in recipes:
        export(Run(trained / name), tmp_path / name, max_shard_size="20KB")
        assert (tmp_path / name / "model.safetensors.index.json").is_file()
        loaded, about = AUTO[TASKS.get(name, "causal-lm")].from_pretrained(tmp_path / name, output_loading_info=True)
        assert not about["missing_keys"] and not about["unexpected_keys"], (name, about)
        assert_says_the_same(loaded, trained / name)


def test_a_tied_weight_is_saved_and_exported_once(trained: Path, tmp_path: Path) -> None:
    from safetensors import safe_open

    from unitrain.checkpoint import open_newest

    reader = open_newest(str(trained / "llama" / "checkpoints")).reader
    assert reader is not None
    names = [name for kind, name in reader.role("model").tensors if kind == "param"]
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
    export(Run(trained / "llama"), tmp_path / "llama")
    with safe_open(tmp_path / "llama" / "model.safetensors", "pt") as file:
        assert sorted(file.keys()) == sorted(names)


WHOLE = ("classifier.", "bert.pooler.")  # of adapters for classes: what begins anew


def test_adapters_alone_are_trained_and_saved(trained: Path, adapters: Mapping[str, str]) -> None:
    from unitrain.checkpoint import open_newest

    for name in adapters:
        said = told(trained / name)
        moved = {key for key, digest in said["ended"].items() if digest != said["began"][key]}
        assert moved, name
        assert all(key.startswith(WHOLE) or ".lora_" in key for key in moved), moved
        reader = open_newest(str(trained / name / "checkpoints")).reader
        assert reader is not None
        saved = {key for kind, key in reader.role("model").tensors if kind == "param"}
        assert saved == {key for key in said["ended"] if key.startswith(WHOLE) or ".lora_" in key}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks transformers
def test_exported_adapters_load_in_peft_and_merge_to_the_same(
    trained: Path, adapters: Mapping[str, str], inputs: Path, tmp_path: Path
) -> None:
    import peft

    for name in adapters:
        task = TASKS.get(name.removeprefix("lora-"), "causal-lm")
        export(Run(trained / name), tmp_path / name)
        export(Run(trained / name), tmp_path / f"{name}-merged", merge=True)
        assert_says_the_same(AUTO[task].from_pretrained(tmp_path / f"{name}-merged"), trained / name)
        options = {"num_labels": 3} if name == "lora-classes" else {}
        base = inputs / f"base-{'bert' if name == 'lora-classes' else name.removeprefix('lora-')}"
        model = peft.PeftModel.from_pretrained(AUTO[task].from_pretrained(base, **options), tmp_path / name)
        assert_says_the_same(model, trained / name)


# --- in one process


def test_resuming_adapters_changes_no_bit(adapters: Mapping[str, str], tmp_path: Path) -> None:
    text = adapters["lora-llama"].replace("every: 3", "every: 1")
    fit_by(Language, text, tmp_path / "whole")
    fit_by(Language, text, copied(tmp_path / "whole", tmp_path / "again", up_to=2))
    assert losses(tmp_path / "again") == losses(tmp_path / "whole")
    assert told(tmp_path / "again")["ended"] == told(tmp_path / "whole")["ended"]


def test_adapters_refuse_another_base(adapters: Mapping[str, str], alone: Path, inputs: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(inputs / "base-llama", base)
    text = adapters["lora-llama"].replace(str(inputs / "base-llama"), str(base))
    fit_by(Language, text, tmp_path / "run")
    weights = base / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-100:] = bytes(100)  # another training of the same model: sizes and names are equal
    weights.write_bytes(data)
    with pytest.raises(CheckpointMismatch, match="base model was "):
        fit_by(Language, text, tmp_path / "run", "train.steps=4")
    with pytest.raises(CheckpointMismatch, match="the adapters were trained on the base model"):
        export(Run(tmp_path / "run"), tmp_path / "out")


def test_our_own_gpt_leaves_as_a_llama(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question " * 50)
    for tied in ("true", "false"):
        text = (
            f"trainer: {RANKS}:Language\n"
            f"model: {{name: gpt, layers: 2, width: 32, heads: 4, ffn: 48, tied: {tied}, "
            f"rope_theta: 500.0, norm_eps: 1e-4}}\n"
            f"data: {{name: text, path: {tmp_path / 'text.txt'}, seq_len: 16, eval_fraction: 0}}\n"
            "train: {steps: 2, global_batch: 4, eval_every: 0}\n"
        )
        run = tmp_path / f"gpt-{tied}"
        fit_by(Language, text, run)
        export(Run(run), run / "out")
        assert_says_the_same(AUTO["causal-lm"].from_pretrained(run / "out"), run)


def test_the_command_exports_with_the_tokenizer_and_rounds_to_bf16(alone: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    done = unitrain(
        "export", alone / "llama", "--to", "out", "--dtype", "bf16", "--step", "3", cwd=tmp_path
    ).succeeded()
    assert "step 3 as a LlamaForCausalLM: 4 files" in done.out
    model = AUTO["causal-lm"].from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    exact = told(alone / "llama")["logits"]
    torch.testing.assert_close(says(model).float(), torch.tensor(exact), rtol=0.05, atol=0.02)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("w0 w1")["input_ids"] == [2, 5, 6, 3]
    again = unitrain("export", alone / "llama", "--to", "out", cwd=tmp_path)
    assert (again.code, "is not empty; name a new folder" in again.last_line) == (78, True)
    absent = unitrain("export", alone / "llama", "--to", "other", "--step", "9", cwd=tmp_path)
    assert (absent.code, "has no checkpoint of step 9; it has 3" in absent.last_line) == (78, True)
    assert not (tmp_path / "other").exists()


def test_an_export_holds_a_few_rows_in_memory_and_never_the_model(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question " * 50)
    text = (
        "trainer: unitrain.tasks:LanguageModel\n"
        "model: {name: gpt, layers: 4, width: 512, heads: 8, ffn: 2048, vocab_size: 8000}\n"
        f"data: {{name: text, path: {tmp_path / 'text.txt'}, seq_len: 8, eval_fraction: 0}}\n"
        "train: {steps: 1, global_batch: 1, eval_every: 0}\n"
    )
    quiet = type("Quiet", (LanguageModel,), {"finish": lambda self: None})
    run = Run(fit_by(quiet, text, tmp_path / "run").run_dir)
    export(run, tmp_path / "first")  # what is imported and cached is no part of the measure
    tracemalloc.start()
    try:
        done = export(run, tmp_path / "out", max_shard_size="30MB")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert done.num_bytes > 75 << 20
    assert peak < 3 * ROWS_BYTES, f"{peak >> 20} MiB at once"
    assert sorted(file.name for file in done.files if file.suffix == ".safetensors") == [
        f"model-0000{number}-of-00003.safetensors" for number in range(1, 4)
    ]
