"""Packing: nothing is lost, nothing is seen that should not be, and what is learnt is what unpacked rows teach."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unitrain.data.records import Records, RecordsData
from unitrain.errors import RecipeError
from unitrain.models.config import GPT
from unitrain.models.gpt_torch import GPTModule, logits_of
from unitrain.models.hf_config import HF
from unitrain.recipe_file import recipe_from_text
from unitrain.rl import GRPO, SFT
from unitrain.rl.packing import Packed, best_fit
from unitrain.rl.sft_torch import packed
from unitrain.run import Run

pytestmark = pytest.mark.fast

WORDS = ["a", "bb", "ccc", "dddd", "eeeeeeeee", "ff", "g", "hhhhhh"]
ADD = """\
name: add
trainer: unitrain.rl:SFT
model: {name: gpt, layers: 1, width: 32, heads: 2, ffn: 32, max_len: 40}
data: {name: records, path: "unitrain.rl.examples:addition", seq_len: 40}
optimizer: {lr: 3e-3}
train: {steps: 12, global_batch: 8, log_every: 1, eval_every: 12, eval_batches: 2}
strategy: {name: single}
rl: {packing: true}
"""
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "vocab_size": 300,
}
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 300}
GPT2 |= {"bos_token_id": 0, "eos_token_id": 0, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}


def records(seq_len: int = 48) -> Records:
    rows = [{"prompt": f"{number}{word}=", "completion": word * 2} for number, word in enumerate(WORDS * 2)]
    return Records(rows, RecordsData(path="here", seq_len=seq_len))


def model(kind: str) -> Any:
    torch.manual_seed(1)
    if kind == "own":
        return GPTModule(GPT(layers=2, width=32, heads=2, ffn=32, vocab_size=300, max_len=64)).eval()
    transformers = pytest.importorskip("transformers")
    given = dict(GPT2 if kind == "gpt2" else LLAMA)
    config = transformers.CONFIG_MAPPING[given.pop("model_type")](**given)
    attention = "eager" if kind == "eager" else "sdpa"
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


@given(st.lists(st.integers(1, 20), max_size=60), st.integers(20, 30))
def test_every_text_is_in_one_pack_and_no_two_packs_would_fit_in_one(lengths: list[int], room: int) -> None:
    packs = best_fit(lengths, room)
    assert sorted(number for pack in packs for number in pack) == list(range(len(lengths)))
    totals = sorted(sum(lengths[number] for number in pack) for pack in packs)
    assert all(total <= room for total in totals)
    assert len(totals) < 2 or totals[0] + totals[1] > room


def test_packs_are_those_of_trl_s_best_fit_decreasing() -> None:
    datasets, data_utils = pytest.importorskip("datasets"), pytest.importorskip("trl.data_utils")
    draw = np.random.default_rng(3)
    texts = [draw.integers(0, 99, length).tolist() for length in draw.integers(1, 17, 200)]
    theirs = data_utils.pack_dataset(datasets.Dataset.from_dict({"input_ids": texts}), 16, "bfd")
    ours = best_fit([len(text) for text in texts], 16)
    assert len(ours) == len(theirs)
    assert sorted(sum(len(texts[number]) for number in pack) for pack in ours) == sorted(map(len, theirs["input_ids"]))
    whole = Counter(token for pack in ours for number in pack for token in texts[number])
    assert whole == Counter(token for row in theirs["input_ids"] for token in row)


@pytest.mark.parametrize("kind", ["own", "llama", "eager", "gpt2"])
def test_packed_rows_give_the_logits_the_loss_and_the_gradient_of_rows_of_their_own(kind: str) -> None:
    rows = records()
    source, net = Packed(rows), model(kind)
    assert len(source) < len(rows) / 2 and any(len(pack) > 2 for pack in source.packs)
    plain = {name: torch.from_numpy(array) for name, array in rows.fetch(np.arange(len(rows))).items()}
    batch = {name: torch.from_numpy(array) for name, array in source.fetch(np.arange(len(source))).items()}
    task = type("Task", (), {"config": HF(task="causal-lm", config=LLAMA) if kind != "own" else None})()
    results = []
    for one in (plain, batch):
        net.zero_grad()
        found = SFT.loss(task, net, one)
        (found.sum / found.weight).backward()
        results.append((found, {name: each.grad.clone() for name, each in net.named_parameters()}))
    (alone, gradients), (together, theirs) = results
    assert float(together.weight) == float(alone.weight) > 0
    assert together.sum.item() == pytest.approx(alone.sum.item(), rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(theirs[name], gradient, rtol=1e-5, atol=1e-7)
    logits = logits_of(net(plain["tokens"]))
    apart = logits_of(packed(net, batch, transformers=kind != "own")(batch["tokens"]))
    for row, pack in enumerate(source.packs):
        for segment, number in enumerate(pack):
            places = batch["segments"][row] == segment
            torch.testing.assert_close(apart[row, places], logits[number, : int(places.sum())], rtol=1e-5, atol=1e-5)


def test_without_the_mask_texts_would_see_each_other() -> None:
    source, net = Packed(records()), model("own")
    batch = {name: torch.from_numpy(array) for name, array in source.fetch(np.arange(len(source))).items()}
    apart, together = packed(net, batch, transformers=False)(batch["tokens"]), net(batch["tokens"])
    later = batch["segments"] > 0
    assert not torch.allclose(apart[later], together[later], atol=1e-2)


def test_positions_begin_anew_with_each_text_and_what_is_learnt_is_completions() -> None:
    rows = records()
    source = Packed(rows)
    found = source.fetch(np.arange(len(source)))
    for row in range(len(source)):
        for segment in range(found["segments"][row].max() + 1):
            places = found["segments"][row] == segment
            assert found["positions"][row, places].tolist() == list(range(places.sum()))
    alone = rows.fetch(np.arange(len(rows)))
    learnt = [Counter(each["targets"][each["weight"] > 0].tolist()) for each in (found, alone)]
    assert learnt[0] == learnt[1]


def test_a_packed_run_learns_and_evaluates_what_unpacked_rows_would(tmp_path: Path) -> None:
    found = SFT(recipe_from_text(ADD), run_dir=tmp_path / "run").fit()
    losses = [record["loss"] for record in Run(tmp_path / "run").metrics() if record["split"] == "train"]
    assert losses[-1] < 0.8 * losses[0]
    assert found.evaluation["loss"] < losses[0]


def test_only_sft_packs(tmp_path: Path) -> None:
    recipe = recipe_from_text(ADD, overrides=["trainer=unitrain.rl:GRPO"])
    with pytest.raises(RecipeError, match=r"rl\.packing is for SFT alone"):
        GRPO(recipe, run_dir=tmp_path).fit()
