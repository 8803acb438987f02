"""Models of the package transformers in PyTorch: built without memory, with buffers, ties and adapters set right.

Parameter names are transformers' own, a tied weight once, by its first name. With adapters a layer's own weight is
`<layer>.base_layer.weight` and its adapter `<layer>.lora_A.default.weight` and `.lora_B.default.weight`, as in peft.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..cursor import mix
from ..errors import MissingExtra, RecipeError, did_you_mean
from ..offline import go_offline
from .hf_config import HF, LoRA
from .initial import normal

go_offline()

import transformers  # noqa: E402 - after the network was ruled out
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

AUTO: dict[str, Any] = {
    "causal-lm": AutoModelForCausalLM,
    "masked-lm": AutoModelForMaskedLM,
    "sequence-classification": AutoModelForSequenceClassification,
}
PEFT_TASKS = {"causal-lm": "CAUSAL_LM", "masked-lm": None, "sequence-classification": "SEQ_CLS"}
ADAPTER, BASE = ".default", ".base_layer"  # what peft puts into names
_RANDOM = frozenset({
    *("normal_", "uniform_", "trunc_normal_", "kaiming_normal_", "kaiming_uniform_"),
    *("xavier_normal_", "xavier_uniform_", "orthogonal_", "sparse_"),
})  # fmt: skip


def build(config: HF) -> Any:
    """The model of a recipe, a transformers.PreTrainedModel in fp32; its weights are `config.initial`'s business.

    It has one method more, `reset_buffers()`, which sets the buffers of a model that was built on the meta device.
    Raises RecipeError where transformers knows no such model.
    """
    values = config.values()
    with _quiet():
        model = AUTO[config.task].from_config(_configuration(config, values), dtype=torch.float32)
        if config.lora is not None:
            _adapt(model, config.lora, config.task)
    model.config.use_cache = False  # of past keys and values: for generation only
    model.reset_buffers = functools.partial(reset_buffers, model, config)
    return model


class InitialValues:
    """The first value of each parameter by name: read from the local folder, else drawn as transformers draws it.

    Distributions are those that the model's own code asks for, recorded on a model without memory; the numbers are a
    function of the parameter's name and the seed alone, so that every rank and sharding gets the same.
    """

    def __init__(self, config: HF) -> None:
        self.weights = config.folder if config.path is not None else None
        self.where, self.task = config.path, config.task
        recorder = _Recorder()
        with recorder, torch.device("meta"):
            self.model = build(config)
            # Here: transformers would then treat adapters as layers of the model, and none would begin at zero.
            adapters = {
                name: list(recorder.draws_of(param))
                for name, param in self.model.named_parameters()
                if ".lora_" in name
            }
            _initialize(self.model)
        self.aliases = _aliases(self.model)
        drawn = {name: recorder.draws_of(self.model.get_parameter(name)) for name in self.aliases}
        self.draws = drawn | adapters

    def __call__(self, name: str, shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
        """The whole tensor. Raises RecipeError where the folder lacks it, or nothing says how it begins."""
        if self.weights is not None and ".lora_" not in name:
            held = self.held(name)
            if held is not None:
                if self.weights.shape(held) != shape:
                    raise RecipeError(
                        f"{self.where} holds {held} of shape {self.weights.shape(held)}, but the configuration makes "
                        f"it {shape}; leave out the changes to it, or begin with random weights"
                    )
                return self.weights.read(held)
            if not self.is_new(name):
                raise RecipeError(
                    f"{self.where} has no weights for {name}; they are of another architecture, or of a version of it "
                    "that must be saved anew with this version of transformers (save_pretrained)"
                )
        if not self.draws[name]:
            raise RecipeError(f"transformers does not say how {name} begins; start from a local folder with weights")
        return _drawn(self.draws[name], name, shape, seed)

    def held(self, name: str) -> str | None:
        """The folder's name of a parameter, under any of the names that it is tied to, with or without the head."""
        assert self.weights is not None, "called where there is a folder"
        prefix = f"{self.model.base_model_prefix}."
        for alias in self.aliases[name]:
            plain = alias.replace(BASE, "")
            for candidate in (plain, prefix + plain, plain.removeprefix(prefix)):
                if candidate in self.weights.files:
                    return candidate
        return None

    def is_new(self, name: str) -> bool:
        """True for what a folder of a language model cannot have: a classifier's own layers."""
        return self.task == "sequence-classification" and _of_classifier(self.model, name)


def reset_buffers(model: Any, config: HF) -> None:
    """Set every buffer as transformers itself does (rotary frequencies, position ids); parameters stay as they are."""
    params = list(model.parameters())
    for param in params:
        param._is_hf_initialized = True  # by this mark transformers leaves it alone
    try:
        _initialize(model)
    finally:
        for marked in (*params, *model.modules()):
            if hasattr(marked, "_is_hf_initialized"):
                del marked._is_hf_initialized
    if config.path is None:
        return
    kept = set(model.state_dict(keep_vars=True))
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name in kept and name in config.folder.files:
                buffer.copy_(torch.from_numpy(config.folder.read(name)))


def _initialize(model: Any) -> None:
    """Set parameters and buffers as transformers does, all that it has not marked as set."""
    # Not model.initialize_weights: a sharding strategy may have wrapped it to gather parameters first.
    transformers.PreTrainedModel.initialize_weights(model)  # type: ignore[no-untyped-call]  # transformers' own


def saved_config(config: HF, dtype: str) -> dict[str, Any]:
    """config.json of an exported model."""
    with torch.device("meta"):
        model = build(config)
    model.config.use_cache = True
    values: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=True))
    return {**values, "architectures": [type(model).__name__], "dtype": dtype}


def saved_adapter(config: HF) -> dict[str, Any]:
    """adapter_config.json of exported adapters, for peft."""
    assert config.lora is not None, "a caller asked first"
    with torch.device("meta"):
        model = build(config)
    values = {
        name: sorted(value) if isinstance(value, set) else getattr(value, "value", value)
        for name, value in model.peft_config["default"].to_dict().items()
    }
    heads = sorted({name.rpartition(".")[0] for name, param in model.named_parameters() if _trains_whole(name, param)})
    return {
        **values,
        "base_model_name_or_path": config.path,
        "inference_mode": True,
        "modules_to_save": heads or None,
        "peft_type": "LORA",
    }


def transposed_layers(config: HF) -> set[str]:
    """Names of adapted weights that are (inputs, outputs), as in GPT-2, where others are (outputs, inputs)."""
    with torch.device("meta"):
        model = build(config)
    return {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}


def parameters(config: HF) -> dict[str, tuple[int, ...]]:
    """Every parameter's canonical name and shape."""
    with torch.device("meta"):
        return {name: tuple(param.shape) for name, param in build(config).named_parameters()}


def flops_per_token(config: HF, seq_len: int) -> float:
    """6 for each number that is multiplied (4 where it is frozen: no gradient of its own) + 12 layers width seq_len.

    Chowdhery et al., "PaLM", 2022, appendix B. An embedding of its own (untied) is looked up and not multiplied.
    """
    with torch.device("meta"):
        model = build(config)
    multiplied = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear | Conv1D)}
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)} - multiplied
    count = sum(
        param.numel() * (6 if param.requires_grad else 4) for param in model.parameters() if id(param) not in looked_up
    )
    return float(count + 12 * model.config.num_hidden_layers * model.config.hidden_size * seq_len)


def _configuration(config: HF, values: dict[str, Any]) -> Any:
    kind = values["model_type"]
    known = transformers.CONFIG_MAPPING
    if kind not in known:
        raise RecipeError(
            f"model.config.model_type is {kind!r}, which transformers {transformers.__version__} does not know"
            f"{did_you_mean(str(kind), list(known.keys()))}; code that comes with a model is not run"
        )
    if config.path is None and not isinstance(config.config, str):
        spelled = {*known[kind]().to_dict(), *known[kind].attribute_map, "model_type", "num_labels", "id2label"}
        for name in values:
            if name not in spelled:
                raise RecipeError(f"model.config.{name} is no key of model_type {kind!r}{did_you_mean(name, spelled)}")
    try:
        made = known[kind].from_dict(values)
    except Exception as error:  # transformers raises whatever a bad value leads to
        raise RecipeError(f"model.config cannot be used as a {kind!r}: {type(error).__name__}: {error}") from error
    if type(made) not in AUTO[config.task]._model_mapping:
        raise RecipeError(f"model.task is {config.task!r}, which transformers does not have for model_type {kind!r}")
    return made


def _adapt(model: Any, lora: LoRA, task: str) -> None:
    """Put adapters beside linear layers and freeze all else but a head of classes, which begins anew."""
    try:
        import peft
    except ImportError as error:
        raise MissingExtra("model.lora", "peft", "hf") from error
    targets = lora.target_modules
    # Classes begin anew, so their layers are trained as a whole and need no adapters.
    own = [
        name
        for name, module in model.named_modules()
        if task == "sequence-classification" and _of_classifier(model, name) and list(module.parameters(recurse=False))
    ]
    options = peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # it multiplies, whole or not
        lora_dropout=lora.dropout,
        target_modules=targets if targets is None or isinstance(targets, str) else list(targets),
        exclude_modules=own or None,
        task_type=PEFT_TASKS[task],
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that GPT-2's layers are transposed, which peft then heeds by itself
            peft.inject_adapter_in_model(options, model)
    except ValueError as error:
        raise RecipeError(f"model.lora.target_modules is {targets!r}: {error}") from error
    for name, param in model.named_parameters():
        if ".lora_" in name and (param.ndim != 2 or ".lora_embedding" in name):
            raise RecipeError(
                f"model.lora.target_modules names {name.partition('.lora_')[0]}, which is no linear layer"
            )
        if name.rpartition(".")[0] in own:
            param.requires_grad_(True)


def _of_classifier(model: Any, name: str) -> bool:
    """True for what a model has for its classes: the head, and a pooler before it."""
    return not name.startswith(f"{model.base_model_prefix}.") or ".pooler." in name


def _trains_whole(name: str, param: Tensor) -> bool:
    return param.requires_grad and ".lora_" not in name


def _aliases(model: nn.Module) -> dict[str, list[str]]:
    """All names of each parameter by its first, which is the canonical one."""
    names: dict[int, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(param), []).append(name)
    return {found[0]: found for found in names.values()}


class _Draw(NamedTuple):
    """One in-place operation on a parameter or on a view of it."""

    name: str
    function: Callable[..., Any]
    target: Tensor
    rest: tuple[Any, ...]
    named: dict[str, Any]


class _Recorder(TorchFunctionMode):
    """Keeps the in-place operations on each storage, in their order."""

    def __init__(self) -> None:
        super().__init__()
        # The targets that it holds keep their storages alive, so that an address never stands for two of them.
        self.draws: dict[int, list[_Draw]] = {}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = dict(kwargs or {})
        result = function(*args, **named)
        name = getattr(function, "__name__", "")
        target = named.pop("tensor", args[0] if args else None)
        if name.endswith("_") and not name.startswith("_") and name != "requires_grad_" and isinstance(target, Tensor):
            named.pop("generator", None)
            storage = target.untyped_storage()._cdata
            self.draws.setdefault(storage, []).append(_Draw(name, function, target.detach(), args[1:], named))
        return result

    def draws_of(self, param: Tensor) -> list[_Draw]:
        return self.draws.get(param.untyped_storage()._cdata, [])


def _drawn(draws: list[_Draw], name: str, shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
    """The operations, done in memory."""
    place = int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little")
    generator = torch.Generator().manual_seed(mix(seed, place) & 0x7FFF_FFFF_FFFF_FFFF)
    whole = torch.empty(shape, dtype=torch.float32)
    for draw in draws:
        values = whole
        if tuple(draw.target.shape) != shape:
            values = whole.as_strided(draw.target.shape, draw.target.stride(), draw.target.storage_offset())
        elif draw.name == "normal_" and not draw.rest:
            # The draw of the built-in models, which torch's version and the number of threads cannot change.
            whole.copy_(torch.from_numpy(normal(draw.named.get("std", 1.0))(name, shape, seed)))
            whole.add_(draw.named.get("mean", 0.0))
            continue
        if any(isinstance(value, Tensor) and value.is_meta for value in draw.rest):
            raise RecipeError(f"transformers computes how {name} begins; start from a local folder with weights")
        random = {"generator": generator} if draw.name in _RANDOM else {}
        with torch.no_grad():
            draw.function(values, *draw.rest, **draw.named, **random)
    return whole.numpy()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' remarks on special tokens of tiny vocabularies and the like."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)
