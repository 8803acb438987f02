"""Models of transformers without ranks: buffers, ties, first values, local folders and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

import torch
from safetensors.torch import save_file
from torch import nn

from unitrain.errors import DataError, RecipeError
from unitrain.models.hf_config import HF, LoRA
from unitrain.models.hf_folder import ModelFolder
from unitrain.models.hf_torch import build, flops_per_token
from unitrain.schema import build as from_values
from unitrain.strategies._torch_models import build_model
from unitrain.strategy import Role

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
LLAMA = {"model_type": "llama", **SIZES, "num_key_value_heads": 2, "tie_word_embeddings": True}
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 64}
BERT = {"model_type": "bert", **SIZES, "max_position_embeddings": 64}
SCALED = {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}
KINDS = [
    HF(config=LLAMA),
    HF(config={**LLAMA, **SCALED, "tie_word_embeddings": False}),
    HF(config=GPT2),
    HF(config=BERT, task="masked-lm"),
    HF(config=BERT, task="sequence-classification", num_labels=5),
    HF(config=LLAMA, lora=LoRA(r=2)),
    HF(config=GPT2, lora=LoRA(r=2)),
]


def built(config: HF, seed: int = 0) -> nn.Module:
    """As a strategy builds it: without memory first."""
    return build_model(Role(model=lambda: build(config), initial=config.initial), seed, torch.device("cpu"))


def saved(model: Any, folder: Path) -> Path:
    """A folder as from_pretrained takes it."""
    model.config.save_pretrained(folder)
    tensors = {name: param.detach().clone() for name, param in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("config", KINDS, ids=lambda config: f"{config.values()['model_type']}-{config.task}")
def test_a_model_born_without_memory_is_like_one_that_transformers_makes(config: HF) -> None:
    model, theirs = built(config), build(config)
    assert dict(model.named_parameters()).keys() == dict(theirs.named_parameters()).keys()  # ties are ties
    for (name, ours), (_, wanted) in zip(model.named_buffers(), theirs.named_buffers(), strict=True):
        assert torch.equal(ours, wanted), name
    for (name, ours), (_, wanted) in zip(model.named_parameters(), theirs.named_parameters(), strict=True):
        assert ours.requires_grad == wanted.requires_grad, name
        assert ours.dtype == torch.float32
        if wanted.std() == 0:
            assert torch.equal(ours, wanted), name  # ones, zeros
        elif wanted.numel() >= 256:
            torch.testing.assert_close(ours.std(), wanted.std(), rtol=0.25, atol=0)


def test_first_values_depend_on_name_and_seed_alone() -> None:
    config, again = HF(config=LLAMA), HF(config=LLAMA)
    name, shape = "model.layers.1.mlp.up_proj.weight", (48, 32)
    first = config.initial(name, shape, 3)
    config.initial("model.embed_tokens.weight", (64, 32), 3)
    assert np.array_equal(first, config.initial(name, shape, 3))
    assert np.array_equal(first, again.initial(name, shape, 3))
    assert not np.array_equal(first, config.initial(name, shape, 4))


def test_weights_come_from_a_local_folder_whatever_their_type(tmp_path: Path) -> None:
    original = build(HF(config=LLAMA))
    saved(original.to(torch.bfloat16), tmp_path)
    model = built(HF(path=str(tmp_path)))
    for (name, ours), (_, theirs) in zip(model.named_parameters(), original.named_parameters(), strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs.float()), name
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_classifier_begins_with_a_language_models_body_and_a_new_head(tmp_path: Path) -> None:
    original = build(HF(config=BERT, task="masked-lm"))
    saved(original, tmp_path)
    model = built(HF(path=str(tmp_path), task="sequence-classification", num_labels=5))
    body = dict(original.named_parameters())
    same = [name for name, param in model.named_parameters() if name in body and torch.equal(param, body[name])]
    assert len(same) == len([name for name in body if name.startswith("bert.")])
    assert model.classifier.weight.shape == (5, 32)
    assert model.classifier.weight.std() > 0


def test_a_changed_model_changes_its_digest_though_sizes_are_equal(tmp_path: Path) -> None:
    model = build(HF(config=LLAMA))
    before = HF(path=str(saved(model, tmp_path))).base_digest()
    assert HF(path=str(tmp_path)).base_digest() == before
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    assert HF(path=str(saved(model, tmp_path))).base_digest() != before


def test_flops_leave_out_what_is_looked_up_and_frozen() -> None:
    tied, untied = HF(config=LLAMA), HF(config={**LLAMA, "tie_word_embeddings": False})
    numbers = sum(param.numel() for param in build(tied).parameters())
    attention = 12 * 2 * 32 * 16
    assert flops_per_token(tied, 16) == 6 * numbers + attention
    assert flops_per_token(untied, 16) == flops_per_token(tied, 16)
    adapters = [
        param.numel() for name, param in build(HF(config=LLAMA, lora=LoRA(r=2))).named_parameters() if "lora" in name
    ]
    assert flops_per_token(HF(config=LLAMA, lora=LoRA(r=2)), 16) == 4 * numbers + 6 * sum(adapters) + attention


# --- refusals


def model_of(**values: Any) -> nn.Module:
    config = from_values(HF, values, "model")
    model = build(config)
    for name, param in model.named_parameters():
        config.initial(name, tuple(param.shape), 0)
    return model


REFUSED = [
    ({}, "model.path and model.config are both null"),
    ({"path": "gpt2"}, "model.path is 'gpt2', where there is no folder"),
    ({"path": "org/name"}, "unitrain never asks a network"),
    ({"config": "gone.json"}, "model.config leads to 'gone.json', where there is no file"),
    ({"config": {"hidden_size": 3}}, "model.config has no model_type"),
    ({"config": {"model_type": "lama"}}, "'lama', which transformers .* did you mean 'llama'"),
    ({"config": {**LLAMA, "hidden_sise": 3}}, "model.config.hidden_sise is no key .* did you mean 'hidden_size'"),
    ({"config": {**LLAMA, "num_attention_heads": 5}}, "model.config cannot be used as a 'llama'"),
    ({"config": {**LLAMA, "quantization_config": {}}}, "quantised weights"),
    ({"config": {"model_type": "vit"}}, "model.task is 'causal-lm', which transformers does not have for .* 'vit'"),
    ({"config": LLAMA, "task": "translation"}, "model.task is 'translation'"),
    ({"config": LLAMA, "lora": {"target_modules": ["no_proj"]}}, "model.lora.target_modules is"),
    ({"config": LLAMA, "lora": {"target_modules": ["embed_tokens"]}}, "embed_tokens, which is no linear layer"),
    ({"config": LLAMA, "lora": {"r": 0}}, "model.lora.r is 0"),
    ({"config": LLAMA, "lora": {"rank": 4}}, "no key 'model.lora.rank'"),
]


@pytest.mark.parametrize(("values", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_what_cannot_be_built_is_refused(
    values: dict[str, Any], message: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=message):
        model_of(**values)


def test_pickled_weights_are_refused_with_how_to_convert_them(tmp_path: Path) -> None:
    build(HF(config=LLAMA)).config.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(RecipeError, match=r"as pickle \(pytorch_model.bin\).*save_pretrained"):
        model_of(path=str(tmp_path))


def test_a_folder_of_another_architecture_is_refused(tmp_path: Path) -> None:
    saved(build(HF(config=GPT2)), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    with pytest.raises(RecipeError, match=r"has no weights for model\.embed_tokens\.weight"):
        model_of(path=str(tmp_path))


def test_a_folder_of_another_size_is_refused(tmp_path: Path) -> None:
    saved(build(HF(config=LLAMA)), tmp_path)
    with pytest.raises(RecipeError, match=r"of shape \(64, 32\), but the configuration makes it \(70, 32\)"):
        model_of(path=str(tmp_path), config={"vocab_size": 70})


def test_damaged_and_quantised_files_are_named(tmp_path: Path) -> None:
    saved(build(HF(config=LLAMA)), tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-1])
    with pytest.raises(DataError, match=r"model\.safetensors has .* bytes, but its header"):
        model_of(path=str(tmp_path))
    save_file({"x": torch.zeros(2, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(DataError, match="holds x as int8; quantised weights"):
        ModelFolder(str(tmp_path)).read("x")


def test_an_index_leads_to_no_file_outside_the_folder(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    save_file({"x": torch.zeros(2)}, tmp_path / "secret.safetensors")
    (inside / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../secret.safetensors"}}))
    with pytest.raises(DataError, match=r"inside/secret\.safetensors cannot be read"):
        ModelFolder(str(inside)).read("x")
