"""Losses of the tasks for models of transformers, by hand."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers")

import torch

from unitrain.data.arrays import ArraySource
from unitrain.errors import RecipeError
from unitrain.recipe import DataRecipe, ModelRecipe, Recipe
from unitrain.tasks import LanguageModel, MaskedLanguageModel, SequenceClassification

BERT = {"model_type": "bert", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 300}
BERT = {**BERT, "num_attention_heads": 2, "max_position_embeddings": 32}


def task(kind: Any, folder: Path, model: dict[str, Any], **data: Any) -> Any:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": "ab" * (row + 1), "label": row % 3}) + "\n" for row in range(9)))
    options = {"path": str(path), "seq_len": 8, "eval_fraction": 0, "cache": str(folder / "cache"), **data}
    return kind(
        Recipe(
            trainer=f"unitrain.tasks:{kind.__name__}",
            model=ModelRecipe(name="hf", options={"config": BERT, **model}),
            data=DataRecipe(name="datasets", options=options),
        )
    )


def test_masked_tokens_are_real_ones_and_they_alone_count(tmp_path: Path) -> None:
    trainer = task(MaskedLanguageModel, tmp_path, {"task": "masked-lm"}, pack=False)
    trainer.mask_token = 299
    asked: list[Any] = []

    def model(tokens: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        asked.append((tokens, attention_mask))
        return SimpleNamespace(logits=torch.zeros(*tokens.shape, 300))

    tokens = torch.full((200, 8), 65)
    weight = torch.zeros(200, 8)
    weight[:, :4] = 1  # five real tokens, the first and the targets of four
    torch.manual_seed(0)
    loss = trainer.loss(model, {"tokens": tokens, "targets": tokens, "weight": weight})
    seen, mask = asked[0]
    assert mask.sum(dim=1).tolist() == [5] * 200
    assert (seen[:, 5:] == 65).all()
    assert 0.8 * 150 < int(loss.weight) < 1.2 * 150  # 15 % of a thousand
    assert 0.7 < float((seen == 299).sum()) / int(loss.weight) < 0.9
    torch.testing.assert_close(loss.sum, loss.weight * torch.tensor(300.0).log())


def test_a_classifier_sees_padding_as_its_own_pad_token(tmp_path: Path) -> None:
    trainer = task(
        SequenceClassification, tmp_path, {"task": "sequence-classification", "num_labels": 3}, label="label"
    )
    trainer.build_model()
    trainer.pad = 7
    asked: list[Any] = []

    def model(tokens: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        asked.append((tokens, attention_mask))
        return SimpleNamespace(logits=torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))

    arrays = {name: torch.from_numpy(array) for name, array in trainer.train_source.fetch(np.array([0, 2])).items()}
    loss = trainer.loss(model, arrays)
    tokens, mask = asked[0]
    assert tokens.tolist() == [[97, 98, 7, 7, 7, 7, 7, 7], [97, 98, 97, 98, 97, 98, 7, 7]]
    assert mask.sum(dim=1).tolist() == [2, 6]
    chances = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]]).log_softmax(-1)
    torch.testing.assert_close(loss.sum, -(chances[0, 0] + chances[1, 2]))
    assert (int(loss.metrics["accuracy"][0]), loss.weight) == (1, 2)


def test_models_and_data_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    classes = {"task": "sequence-classification"}
    for kind, model, data, message in (
        (LanguageModel, {"task": "masked-lm"}, {}, "model.task is 'masked-lm', but .* set model.task: causal-lm"),
        (
            SequenceClassification,
            classes,
            {"label": "label"},
            "has 2 classes, but the data has 3; set model.num_labels",
        ),
        (SequenceClassification, classes, {}, "has no classes; use datasets, and name its column in data.label"),
        (MaskedLanguageModel, {"task": "masked-lm"}, {"seq_len": 40}, "sequences of 40 tokens"),
        (MaskedLanguageModel, {"task": "masked-lm", "config": {**BERT, "vocab_size": 99}}, {}, "vocab_size 99, but"),
    ):
        with pytest.raises(RecipeError, match=message):
            task(kind, tmp_path, model, **data).build_model()
    masked = task(MaskedLanguageModel, tmp_path, {"task": "masked-lm"})
    with pytest.raises(RecipeError, match="has no mask token"):
        _ = masked.mask_token
    masked.train_source = ArraySource(x=np.zeros((3, 2)))
    with pytest.raises(RecipeError, match="needs tokens, and data 'datasets' has none"):
        masked.build_model()
