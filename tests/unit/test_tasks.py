"""The built-in tasks, without ranks: their losses against sums by hand, and what they refuse."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from unitrain.data.arrays import ArraySource
from unitrain.errors import RecipeError, UnknownName
from unitrain.recipe import DataRecipe, ModelRecipe, Recipe
from unitrain.tasks import Classification, LanguageModel

pytestmark = pytest.mark.fast

TEXT = {"seq_len": 8, "eval_fraction": 0}


@pytest.fixture
def text(tmp_path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("to be or not to be, that is the question " * 10)
    return str(path)


def language_model(path: str, model: Mapping[str, Any] | None = None, **data: Any) -> LanguageModel:
    options = {"layers": 1, "width": 16, "heads": 2, "ffn": 16, **(model or {})}
    return LanguageModel(
        Recipe(
            trainer="unitrain.tasks:LanguageModel",
            model=ModelRecipe(name="gpt", options=options),
            data=DataRecipe(name="text", options={"path": path, **TEXT, **data}),
        )
    )


def classification(name: str, options: Mapping[str, Any], data: Mapping[str, Any] | None = None) -> Classification:
    return Classification(
        Recipe(
            trainer="unitrain.tasks:Classification",
            model=ModelRecipe(name=name, options=options),
            data=DataRecipe(name="digits", options=data or {}),
        )
    )


def fixed_logits(logits: torch.Tensor) -> Any:
    """A model that says the same whatever it sees."""
    return lambda inputs: logits


# --- the language model


def test_the_loss_of_a_language_model_is_the_sum_over_tokens(text):
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[0, 1, 2], [3, 4, 0]])
    loss = language_model(text).loss(fixed_logits(logits), {"tokens": targets, "targets": targets})
    by_hand = -sum(logits[r, s].log_softmax(0)[targets[r, s]] for r in range(2) for s in range(3))
    torch.testing.assert_close(loss.sum, by_hand)
    assert loss.weight == 6


def test_weights_scale_each_token_of_the_loss(text):
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[0, 1, 2], [3, 4, 0]])
    weight = torch.tensor([[1.0, 0.5, 0.0], [2.0, 0.0, 0.0]])
    batch = {"tokens": targets, "targets": targets, "weight": weight}
    loss = language_model(text).loss(fixed_logits(logits), batch)
    chances = logits.log_softmax(-1)
    torch.testing.assert_close(loss.sum, -(chances[0, 0, 0] + 0.5 * chances[0, 1, 1] + 2 * chances[1, 0, 3]))
    assert loss.weight == 3.5


def test_the_loss_is_summed_in_fp32(text):
    logits = torch.randn(4, 64, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = torch.zeros(4, 64, dtype=torch.int64)
    loss = language_model(text).loss(fixed_logits(logits), {"tokens": targets, "targets": targets})
    assert loss.sum.dtype == torch.float32
    torch.testing.assert_close(loss.sum, -logits.float().log_softmax(-1)[..., 0].sum())


def test_a_language_model_takes_what_its_source_gives(text):
    task = language_model(text, pack=False)
    source, model = task.build_source("train"), task.build_model()
    arrays = {name: torch.from_numpy(array) for name, array in source.fetch(np.array([0])).items()}
    assert arrays.keys() == {"tokens", "targets", "weight"}
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(torch.from_numpy(task.initial(name, tuple(param.shape), 0)))
        loss = task.loss(model, arrays)
    assert loss.weight == 8
    assert loss.sum / 8 == pytest.approx(math.log(256), rel=0.01)  # a new model knows nothing


def test_the_vocabulary_is_the_data_s(text):
    assert language_model(text).build_model().embed.weight.shape == (256, 16)
    assert language_model(text, {"vocab_size": 300}).build_model().embed.weight.shape == (300, 16)


def test_a_vocabulary_smaller_than_the_data_s_is_refused(text):
    with pytest.raises(RecipeError, match=r"model\.vocab_size is 200, but the data has 256 tokens"):
        language_model(text, {"vocab_size": 200}).build_model()


def test_sequences_longer_than_the_model_accepts_are_refused(text):
    with pytest.raises(RecipeError, match=r"model\.max_len is 4, but the data has sequences of 8 tokens"):
        language_model(text, {"max_len": 4}).build_model()


def test_data_without_tokens_is_refused(text):
    task = language_model(text)
    task.train_source = ArraySource(x=np.zeros((3, 2)))
    with pytest.raises(RecipeError, match="a language model needs tokens, and data 'text' has none"):
        task.build_model()


def test_a_language_model_counts_its_flops(text):
    task = language_model(text)
    assert task.flops_per_sample() == 8 * task.config.flops_per_token(8)


def test_each_parameter_of_a_task_has_an_initial_value(text):
    for task in (language_model(text), classification("mlp", {}), classification("convnet", {})):
        for name, param in task.build_model().named_parameters():
            assert task.initial(name, tuple(param.shape), 0).shape == tuple(param.shape)


# --- the classifier


def test_the_loss_of_a_classifier_is_the_sum_over_rows_with_its_accuracy():
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 3.0, 0.0]])
    classes = torch.tensor([0, 1, 1])
    loss = classification("mlp", {}).loss(fixed_logits(logits), {"x": logits, "y": classes})
    chances = logits.log_softmax(-1)
    torch.testing.assert_close(loss.sum, -(chances[0, 0] + chances[1, 1] + chances[2, 1]))
    assert loss.weight == 3
    correct, rows = loss.metrics["accuracy"]
    assert (int(correct), rows) == (2, 3)


@pytest.mark.parametrize("name", ["mlp", "convnet"])
def test_a_classifier_takes_the_digits_as_they_come(name):
    task = classification(name, {"hidden": [16]} if name == "mlp" else {"channels": 8, "depth": 1})
    arrays = {key: torch.from_numpy(array) for key, array in task.build_source("train").fetch(np.arange(5)).items()}
    loss = task.loss(task.build_model(), arrays)
    assert loss.weight == 5
    assert loss.sum.isfinite()


def test_a_classifier_for_fewer_classes_than_the_data_has_is_refused():
    with pytest.raises(RecipeError, match=r"model\.num_classes is 5, but the data has 10 classes"):
        classification("convnet", {"num_classes": 5}).build_model()


def test_a_classifier_for_other_samples_is_refused():
    with pytest.raises(RecipeError, match=r"model\.in_features is 32, but a sample of the data has 64"):
        classification("mlp", {"in_features": 32}).build_model()
    with pytest.raises(RecipeError, match=r"model\.in_channels is 3, but samples .* \(1, 8, 8\)"):
        classification("convnet", {"in_channels": 3}).build_model()
    with pytest.raises(RecipeError, match=r"have the shape \(64,\); a convnet takes"):
        classification("convnet", {}, {"flat": True}).build_model()


# --- what a recipe names


def test_a_model_that_the_task_cannot_train_is_refused():
    with pytest.raises(RecipeError, match="Classification cannot train model 'gpt'; it trains mlp, convnet"):
        classification("gpt", {}).build_model()


def test_a_model_that_does_not_exist_is_refused_with_the_known_ones():
    with pytest.raises(UnknownName, match="no model named 'mpl', did you mean 'mlp'"):
        classification("mpl", {}).build_model()


def test_an_unknown_option_of_the_model_is_refused_with_its_key(text):
    with pytest.raises(RecipeError, match=r"no key 'model\.widht', did you mean 'model\.width'"):
        language_model(text, {"widht": 3}).build_model()
