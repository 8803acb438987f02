"""TRL's trainers as our recipe configures them; the one file that imports TRL, where it is used."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from ..models import hf_torch  # rules the network out before the packages below are imported

# isort: split
from accelerate.state import AcceleratorState, GradientState
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from transformers.utils.logging import disable_progress_bar

from ..data.tokenizer import BYTES
from ..errors import RecipeError, did_you_mean
from ..schedule import learning_rate
from ..world import World

if TYPE_CHECKING:
    from .trl_torch import _TRL


class Told(TrainerCallback):
    """TRL's loop asks our task what to do after a step, and tells it what it did."""

    def __init__(self, task: _TRL) -> None:
        self.task = task

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See TrainerCallback."""
        self.task.begins()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """See TrainerCallback."""
        asked = self.task.ended(state.global_step)
        control.should_log, control.should_evaluate, control.should_save, control.should_training_stop = asked
        return control

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See TrainerCallback."""
        self.task.logged(kwargs["logs"])

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See TrainerCallback."""
        self.task.evaluated(kwargs["metrics"])

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See TrainerCallback."""
        self.task.saved()


def made(task: _TRL, kind: str) -> Any:
    """TRL's trainer of that kind, ready to train."""
    import trl
    from datasets import disable_progress_bars

    disable_progress_bars()
    disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers' own
    tokenizer = _tokenizer(task)
    given: dict[str, Any] = {
        "model": _model(task),
        "args": _arguments(task, getattr(trl, f"{kind}Config")),
        "train_dataset": _dataset(task, kind, "train"),
        "eval_dataset": _dataset(task, kind, "eval"),
        "processing_class": tokenizer,
        "callbacks": [Told(task)],
        "peft_config": _adapters(task),
    }
    if kind != "SFT" and given["peft_config"] is None:
        given["ref_model"] = _model(task)  # the very first weights, also in a resumed run
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries among themselves
        found = _class(task, getattr(trl, f"{kind}Trainer"), kind)(**given)
    found.remove_callback(PrinterCallback)
    return found


def forget(world: World) -> None:
    """What accelerate knows of the ranks is in singletons, which would outlive them."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def _class(task: _TRL, trainer: Any, kind: str) -> Any:
    """TRL's class with our optimizer and schedule, on rows that have tokens already."""
    optimizer, schedule, steps = task.recipe.optimizer, task.recipe.schedule, task.recipe.train.steps

    class Made(trainer):  # type: ignore[misc]
        def create_optimizer(self, model: Any = None) -> Any:
            trained = [each for each in (model or self.model).parameters() if each.requires_grad]
            matrices = [each for each in trained if each.ndim >= 2 or optimizer.decay == "all"]
            others = [each for each in trained if each.ndim < 2 and optimizer.decay != "all"]
            groups: list[dict[str, Any]] = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
            own: dict[str, Any] = {"lr": optimizer.lr, "weight_decay": optimizer.weight_decay}
            made: torch.optim.Optimizer
            if optimizer.name == "sgd":
                made = torch.optim.SGD(groups, momentum=optimizer.momentum, **own)
            else:
                made = torch.optim.AdamW(groups, betas=optimizer.betas, eps=optimizer.eps, **own)
            self.optimizer = made
            return made

        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            top = task.recipe.optimizer.lr or 1.0
            of_step = lambda step: learning_rate(schedule, step, steps, top) / top  # noqa: E731
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, of_step)
            return self.lr_scheduler

        def create_model_card(self, *given: Any, **named: Any) -> None:
            """None: the recipe beside the checkpoint says what was done."""

        def _prepare_dataset(self, dataset: Any, *given: Any, **named: Any) -> Any:
            if kind == "SFT":  # has columns for rows of tokens
                return super()._prepare_dataset(dataset, *given, **named)
            if kind == "KTO" and self.calculate_KL:
                whole, size = list(dataset["completion_ids"]), task.micro_batch
                parts = [whole[begin : begin + size] for begin in range(0, len(whole), size)]
                # As TRL does it: within a micro-batch every prompt gets the completion of the row before it.
                dataset = dataset.add_column("KL_completion_ids", [row for p in parts for row in (p[-1], *p[:-1])])
            return dataset

    Made.__name__ = Made.__qualname__ = trainer.__name__
    return Made


def _arguments(task: _TRL, configuration: Any) -> Any:
    """TRL's configuration. Raises RecipeError for what it does not have."""
    recipe, device = task.recipe, task._control.device  # type: ignore[attr-defined]  # torch strategies have one
    train = recipe.train
    own: dict[str, Any] = {
        "output_dir": str(task.root),
        "max_steps": train.steps,
        "per_device_train_batch_size": task.micro_batch,
        "per_device_eval_batch_size": task.micro_batch,
        "gradient_accumulation_steps": train.global_batch // (task.micro_batch * task.world.size),
        "learning_rate": recipe.optimizer.lr,
        "max_grad_norm": recipe.optimizer.clip or 0.0,
        "seed": train.seed,
        "data_seed": train.seed,
        "bf16": train.precision == "bf16",
        "fp16": train.precision == "fp16",
        "use_cpu": device.type == "cpu",
        "save_strategy": "no",  # our callback says when
        "logging_strategy": "no",
        "eval_strategy": "no",
        "logging_nan_inf_filter": False,
        "max_length": None,  # rows are cut already
        "report_to": "none",
        "disable_tqdm": True,
        "activation_checkpointing": False,  # TRL would, unasked
        "ddp_find_unused_parameters": False,
        "dataloader_pin_memory": device.type != "cpu",
    }
    known = inspect.signature(configuration).parameters
    if "completion_only_loss" in known:
        own["completion_only_loss"] = True
    for name in task.rl.trl:
        if name not in known:
            raise RecipeError(
                f"rl.trl.{name} is no argument of trl.{configuration.__name__}{did_you_mean(name, known)}"
            )
    Path(own["output_dir"]).mkdir(parents=True, exist_ok=True)
    try:
        return configuration(**{**own, **task.rl.trl})
    except (TypeError, ValueError) as error:
        raise RecipeError(f"rl.trl is refused by trl.{configuration.__name__}: {error}") from error


def _model(task: _TRL) -> Any:
    """The model with its first weights, on the CPU."""
    model = hf_torch.build(task.model_options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(task.first(name, tuple(parameter.shape))))
    return model


def _adapters(task: _TRL) -> Any:
    lora = getattr(task.config, "lora", None)
    if lora is None:
        return None
    import peft

    targets = lora.target_modules
    return peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets if targets is None or isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
    )


def _dataset(task: _TRL, kind: str, split: str) -> Any:
    from datasets import Dataset

    rows = task.rows_of(split)
    if rows is None:
        return None
    if kind == "SFT":
        prompts, completions = rows["prompt_ids"], rows["completion_ids"]
        pairs = list(zip(prompts, completions, strict=True))
        rows = {
            "input_ids": [prompt + completion for prompt, completion in pairs],
            "completion_mask": [[0] * len(prompt) + [1] * len(completion) for prompt, completion in pairs],
        }
    return Dataset.from_dict(rows)


def _tokenizer(task: _TRL) -> Any:
    """That of the data, for padding and for whoever loads a checkpoint: rows have tokens already."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    records = task.records("train")
    path, fast = records.options.tokenizer, cast(Any, PreTrainedTokenizerFast)
    if path == BYTES:
        letters = _byte_letters()
        made = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.decoder = decoders.ByteLevel()
        names = {"pad_token": letters[0]} | ({"eos_token": letters[records.stop[0]]} if records.stop else {})
        return fast(tokenizer_object=made, **names)
    where = Path(path).expanduser()
    if where.is_dir() and (where / "tokenizer_config.json").is_file():
        found = fast.from_pretrained(str(where), local_files_only=True)
    else:
        file = where / "tokenizer.json" if where.is_dir() else where
        found = fast(tokenizer_file=str(file))
    if found.pad_token is None:
        found.pad_token = found.convert_ids_to_tokens(records.tokenizer.pad)
    if found.eos_token is None and records.stop:
        found.eos_token = found.convert_ids_to_tokens(records.stop[0])
    return found


def _byte_letters() -> list[str]:
    """The letter that byte-level tokenizers write for each byte: printable ones stand for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
