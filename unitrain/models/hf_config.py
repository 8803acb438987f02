"""Options of models of the package transformers, as `model: {name: hf}` spells them; imports no framework."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from .. import registry
from ..errors import RecipeError
from ..recipe import above, at_least, key, one_of
from .config import share
from .hf_folder import ModelFolder, read_config

TASKS = ("causal-lm", "masked-lm", "sequence-classification")
_LENGTHS = ("max_position_embeddings", "n_positions")  # how architectures call their longest sequence


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """Low-rank adapters (Hu et al., "LoRA", 2021): the model stays as it is and small matrices beside it learn."""

    r: int = key(8, "rank: columns of each adapter")
    alpha: float = key(16.0, "an adapter's output is multiplied by alpha / r")
    dropout: float = key(0.0, "share of an adapter's inputs dropped in training")
    target_modules: str | tuple[str, ...] | None = key(
        None, "names of linear layers, or `all-linear`; null: those that peft has for the architecture"
    )

    def __post_init__(self) -> None:
        at_least("model.lora.r", self.r, 1)
        above("model.lora.alpha", self.alpha, 0)
        share("model.lora.dropout", self.dropout)


@dataclass(frozen=True, kw_only=True)
class HF:
    """A model of the package transformers, from a local folder or from its configuration alone; no network, ever.

    Parameters and moments are fp32 whatever the folder has; `train.precision` says what is computed in.
    """

    modules: ClassVar[Mapping[str, str]] = MappingProxyType({"torch": "unitrain.models.hf_torch:build"})

    path: str | None = key(None, "a local folder with config.json and safetensors; null: begin with random weights")
    config: str | Mapping[str, Any] | None = key(
        None, "the configuration (`model_type` and its keys), or the path of a config.json; with `path`: changes to it"
    )
    task: str = key("causal-lm", "`causal-lm`, `masked-lm` or `sequence-classification`: which head the model has")
    num_labels: int | None = key(None, "classes of sequence-classification; null: as the configuration has them")
    lora: LoRA | None = key(None, "train low-rank adapters only; null: all weights")

    def __post_init__(self) -> None:
        one_of("model.task", self.task, TASKS)
        if self.path is None and self.config is None:
            raise RecipeError("model.path and model.config are both null; give a local folder or a configuration")
        if self.path is not None and isinstance(self.config, str):
            raise RecipeError(
                f"model.config is {self.config!r}, but model.path has a configuration; leave one of them out"
            )
        if self.num_labels is not None:
            at_least("model.num_labels", self.num_labels, 1)

    def values(self) -> dict[str, Any]:
        """The whole configuration as plain values. Raises RecipeError where it cannot be read."""
        values: dict[str, Any] = {}
        if self.path is not None:
            values = self.folder.config()
        elif isinstance(self.config, str):
            values = read_config("model.config", Path(self.config).expanduser())
        if isinstance(self.config, Mapping):
            values |= _plain(self.config)
        if "model_type" not in values:
            raise RecipeError("model.config has no model_type; name the architecture, such as model_type: llama")
        if "quantization_config" in values:
            raise RecipeError("the model's configuration asks for quantised weights, which cannot be trained")
        if self.num_labels is not None:
            values = {name: value for name, value in values.items() if name not in ("id2label", "label2id")}
            values["num_labels"] = self.num_labels
        return values

    @functools.cached_property
    def folder(self) -> ModelFolder:
        """The local folder; call it only where `path` is given."""
        assert self.path is not None, "a caller asked first"
        return ModelFolder(self.path)

    @property
    def max_len(self) -> int | None:
        """Longest sequence that the model accepts; None where the configuration does not say."""
        values = self.values()
        return next((int(values[name]) for name in _LENGTHS if values.get(name)), None)

    def with_vocabulary(self, num_tokens: int) -> HF:
        """The same model. Raises RecipeError where it has no room for the data's tokens."""
        vocab_size = self.values().get("vocab_size")
        if vocab_size is not None and vocab_size < num_tokens:
            raise RecipeError(
                f"model.config has vocab_size {vocab_size}, but the data has {num_tokens} tokens; "
                "use the tokenizer that belongs to the model, or a configuration with a larger vocabulary"
            )
        return self

    def initial(self, name: str, shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
        """The first value of a parameter: the folder's, or drawn as the architecture draws it."""
        return self._initial(name, shape, seed)

    @functools.cached_property
    def _initial(self) -> Callable[[str, tuple[int, ...], int], NDArray[np.float32]]:
        made: Any = registry.resolve("unitrain.models.hf_torch:InitialValues")
        values: Callable[[str, tuple[int, ...], int], NDArray[np.float32]] = made(self)
        return values

    def flops_per_token(self, seq_len: int) -> float:
        """Training FLOPs of one token, forward and backward; see hf_torch.flops_per_token."""
        count: Callable[[HF, int], float] = registry.resolve("unitrain.models.hf_torch:flops_per_token")
        return count(self, seq_len)

    def held_name(self, name: str) -> str | None:
        """The folder's name of a parameter; None where it has none. Call it only where `path` is given."""
        values: Any = self._initial
        held: str | None = values.held(name)
        return held

    def base_digest(self) -> str:
        """Changes when the weights that adapters stand on do: the folder's, or the configuration they are drawn by."""
        if self.path is not None:
            return self.folder.digest()
        return hashlib.sha256(json.dumps(self.values(), sort_keys=True).encode()).hexdigest()[:32]

    def located(self, base: Path) -> HF:
        """The same with absolute paths, where relative ones start at `base`."""
        path = None if self.path is None else str(base / Path(self.path).expanduser())
        config = str(base / Path(self.config).expanduser()) if isinstance(self.config, str) else self.config
        return dataclasses.replace(self, path=path, config=config)


def _plain(value: Any) -> Any:
    """Mappings and tuples of a recipe as dicts and lists."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
