"""SFT, DPO and KTO by TRL's own trainers: their loop and checkpoints, under our launchers and in our run's folder.

What is ours: the recipe, the ranks, the data and its tokens, the first weights, the optimizer and its schedule,
metrics.jsonl and events.jsonl, when to save and what to keep, stop signals, exit codes. What is TRL's: the loop, the
loss, the order of samples, the contents of a checkpoint. A run is therefore resumed by TRL, on as many ranks as wrote
the checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import json
import signal
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, ClassVar, NoReturn

import numpy as np
from numpy.typing import NDArray

from ..cursor import Cursor
from ..errors import CheckpointDamaged, CheckpointMismatch, ExitCode, MissingExtra, RecipeError, Refused
from ..heartbeat import Phase
from ..models.hf_config import HF
from ..policy import due
from ..stopping import RESIZE, Agreement, StopSignals
from ..track.lines import evaluation_line, progress_line
from ..trainer import Result
from . import trl_folders
from .task_torch import RLTask

_STRATEGIES = ("single", "ddp")


class _TRL(RLTask):
    """`model:` is a causal-lm of transformers; `data:` records; `rl.trl` goes to TRL's configuration as it is."""

    kind: ClassVar[str]  # how TRL calls its trainer
    columns: ClassVar[Mapping[str, str]]  # TRL's column -> ours, whose tokens are put there

    # What TRL is given.

    @functools.cached_property
    def model_options(self) -> HF:
        """The model's, without adapters: TRL puts these on itself."""
        assert isinstance(self.config, HF), "see _refuse"
        return dataclasses.replace(self.config, lora=None)

    def first(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """The first value of a parameter: the same as with our own trainers."""
        return self._first(self.model_options, name, shape, self.recipe.train.seed)

    def rows_of(self, split: str) -> dict[str, list[Any]] | None:
        """The tokens of a split by TRL's columns; None where nothing is held out."""
        train = self.recipe.train
        if split == "eval" and (train.eval_every == 0 or self.eval_source is None):
            return None
        records = self.records(split)
        limited = split == "eval" and train.eval_batches is not None
        most = min(len(records), (train.eval_batches or 0) * train.global_batch) if limited else len(records)
        found: dict[str, list[Any]] = {name: [] for name in ("prompt_ids", *self.columns)}
        for number in range(most):
            for name, column in self.columns.items():
                whole, prompt = records.whole(number, number, getattr(records.options, column))
                found[name].append(whole[prompt:].tolist())
            found["prompt_ids"].append(whole[:prompt].tolist())
        return found

    @property
    def micro_batch(self) -> int:
        """Rows of a forward pass. Raises RecipeError: TRL cannot share out a batch that its parts do not fill."""
        train, ranks = self.recipe.train, self.world.size
        micro = train.micro_batch or train.global_batch // ranks
        if not micro or train.global_batch % (micro * ranks):
            raise RecipeError(
                f"train.global_batch is {train.global_batch}, which {ranks} ranks and micro-batches of {micro} do not "
                "divide, as TRL needs it; change train.global_batch or train.micro_batch"
            )
        return micro

    # The run.

    def fit(self) -> Result:  # type: ignore[misc]  # the loop is TRL's
        """Train to the end or to a stop signal, resuming where the run's folder holds a sound checkpoint of TRL's."""
        with contextlib.ExitStack() as stack:
            self._refuse()
            roles = self.roles()
            self._check(roles)
            self._exit_code = ExitCode.DONE
            self._signals = stack.enter_context(StopSignals())
            self._open_strategies(roles, stack)
            self._open_run(stack)
            stack.callback(self._give_back)
            self.train_source = self._source()
            self.eval_source = self.build_source("eval") if self.recipe.train.eval_every != 0 else None
            loop = _loop(type(self).__name__)
            stack.callback(loop.forget, self.world)
            made = loop.made(self, self.kind)
            self._signals.hold()  # libraries were imported, and may have put handlers of their own in place
            self._train(made)
        return self.result()

    def steps(self) -> NoReturn:  # type: ignore[misc]
        """TRL's loop cannot be driven by hand."""
        raise Refused(f"{type(self).__name__} trains by TRL's own loop, which has no single steps; call fit()")

    def _refuse(self) -> None:
        recipe, name = self.recipe, type(self).__name__
        if recipe.strategy.name not in _STRATEGIES:
            raise Refused(
                f"{name} runs on {' or '.join(_STRATEGIES)}, not on {recipe.strategy.name}: TRL shards by "
                f"configurations of its own. unitrain.rl:{name.removeprefix('TRL')} trains on every torch strategy"
            )
        if not isinstance(self.config, HF):
            raise RecipeError(f"{name} trains models of transformers; give model: {{name: hf, ...}}")
        if recipe.checkpoint.path is not None and "://" in recipe.checkpoint.path:
            raise RecipeError(f"checkpoint.path is {recipe.checkpoint.path}; TRL writes to local folders alone")
        if recipe.checkpoint.memory_every is not None:
            raise RecipeError(f"checkpoint.memory_every is set, but {name} takes no snapshots; take it out")
        if recipe.guard.spike is not None:
            raise RecipeError(f"guard.spike is set, but {name} cannot roll back; take it out")
        _ = self.micro_batch
        if taken := sorted(OURS.keys() & self.rl.trl.keys()):
            raise RecipeError(f"rl.trl.{taken[0]} is set by {OURS[taken[0]]} of the recipe; take it out")

    @property
    def root(self) -> Path:
        """Where checkpoints are."""
        assert self.run is not None, "opened before"
        return Path(self.run.checkpoints(self.recipe)).expanduser().absolute()

    def facts(self) -> dict[str, Any]:
        """What a resumed run must share with the one that wrote a checkpoint."""
        return {
            "trainer": type(self).__name__,
            "trl": version("trl").rpartition(".")[0],
            "ranks": self.world.size,
            "micro-batch": self.micro_batch,
            **self._identity(),
        }

    def _train(self, made: Any) -> None:
        assert self.run is not None, "opened before"
        folder = self._newest()
        self._agreement = Agreement(self.world, self._control.share, self.run.folder)
        self._stopped_by = 0
        steps = self.recipe.train.steps
        if self.world.heartbeat is not None:
            self.world.heartbeat.began(self.cursor.step)
        self._event("start", strategy=self.recipe.strategy.name, world_size=self.world.size, trl=version("trl"))
        self.on("start", step=self.cursor.step)
        self._began, self._began_at = time.monotonic(), self.cursor
        if self.cursor.step < steps:
            self._beat(Phase.STEP)
            made.train(resume_from_checkpoint=folder or None)
        if number := self._stopped_by:
            self._end_early(number)
        self._event("stop", **({"exit_code": int(self._exit_code)} if self._exit_code else {}))
        self.on("stop", step=self.cursor.step)

    def _newest(self) -> str:
        """The newest sound checkpoint, found by rank 0; empty: none. The run then stands there."""
        assert self.run is not None, "opened before"
        answer = ""
        if self.world.first:
            self._take_over(str(self.root)) if self.recipe.checkpoint.every != 0 else None
            found, damaged = trl_folders.newest(self.root)
            for path, why in damaged:
                print(f"warning: the checkpoint {path} is damaged and was passed over: {why}", flush=True)
                self._event("checkpoint_damaged", folder=str(path), error=why)
            if found is None and damaged:
                raise CheckpointDamaged(f"no checkpoint in {self.root} is sound: {damaged[0][1]}")
            step = 0
            if found is not None:
                step = found.step
                changed = [
                    f"{key} was {found.facts.get(key)!r} and is now {value!r}"
                    for key, value in self.facts().items()
                    if found.facts.get(key) != value
                ]
                if changed:
                    raise CheckpointMismatch(
                        f"the checkpoint {found.path} belongs to another run: {'; '.join(changed)}; TRL goes on with "
                        "the ranks, batches and data that wrote it, so set them back, or start a new run"
                    )
            self.run.rewind(step)
            answer = json.dumps([step, "" if found is None else str(found.path)])
        step, folder = json.loads(self._control.share(answer))
        self.cursor = Cursor(step, step * self.recipe.train.global_batch)
        if folder and self.world.first:
            self._say(f"resumed at step {step} of {self.recipe.train.steps} from {folder}")
        return str(folder)

    def _end_early(self, number: int) -> None:
        saved = self.recipe.checkpoint.every != 0
        name = "a resize" if number == RESIZE else signal.Signals(number).name
        self._exit_code = ExitCode.PREEMPTED if saved else 128 + number
        self._event("leave" if number == RESIZE else "preempt", signal=name, exit_code=int(self._exit_code))
        if self.world.first:
            words = "saved" if saved else "not saved (checkpoint.every is 0)"
            self._say(f"stopped by {name} at step {self.cursor.step}, {words}")

    # What TRL's loop calls, on every rank.

    def begins(self) -> None:
        """A step is about to be trained."""
        self._beat(Phase.STEP)

    def ended(self, step: int) -> tuple[bool, bool, bool, bool]:
        """A step is over: whether to log, to evaluate, to save and to stop now."""
        train, every = self.recipe.train, self.recipe.checkpoint.every
        self.cursor = Cursor(step, step * train.global_batch)
        if self.world.heartbeat is not None:
            self.world.heartbeat.finished()
        self._stopped_by = self._agreement.stop(step, self._signals.caught) if step < train.steps else 0
        stopping = bool(self._stopped_by)
        saving = due(step, every, train.steps) or (stopping and every != 0)
        evaluating = due(step, train.eval_every, train.steps) and self.eval_source is not None
        if saving or evaluating:
            self._beat(Phase.SAVING if saving else Phase.EVALUATING)
        return due(step, train.log_every, train.steps), evaluating, saving, stopping or step >= train.steps

    def logged(self, found: Mapping[str, float]) -> None:
        """TRL's numbers since the last time, as a record of ours."""
        if "loss" not in found:
            return  # the summary at the end
        elapsed, cursor = time.monotonic() - self._began, self.cursor
        record: dict[str, Any] = {
            "step": cursor.step,
            "split": "train",
            "loss": found["loss"],
            "lr": found["learning_rate"],
            "grad_norm": found.get("grad_norm"),
            "samples": cursor.samples,
            "seconds": round(elapsed, 6),
            "samples_per_second": (cursor.samples - self._began_at.samples) / elapsed,
            "memory_bytes": self._control.memory_bytes(),
        }
        record |= {name: value for name, value in found.items() if name not in _NOT_OURS and name not in record}
        self._last = record
        if self.world.first and self.run is not None:
            self.run.metric(record)
            self._say(progress_line(record, self.recipe.train.steps), record)
        self.on("log", **record)

    def evaluated(self, found: Mapping[str, float]) -> None:
        """TRL's numbers of the held-out rows."""
        own = {name.removeprefix("eval_"): value for name, value in found.items()}
        seconds = own.pop("runtime", 0.0)
        self._began += seconds  # throughput is of training alone
        self.evaluation = {name: value for name, value in own.items() if name not in _NOT_OURS}
        record = {"step": self.cursor.step, "split": "eval", **self.evaluation, "seconds": seconds}
        if self.world.first and self.run is not None:
            self.run.metric(record)
            self._say(evaluation_line(record), record)
        self.on("eval", **record)

    def saved(self) -> None:
        """TRL has written its part of a checkpoint on every rank. It counts from here on."""
        self._control.barrier()
        if self.world.first:
            began, step = time.monotonic(), self.cursor.step
            # A pickle, and nothing reads it.
            (trl_folders.place(self.root, step) / "training_args.bin").unlink(missing_ok=True)
            size = trl_folders.seal(trl_folders.place(self.root, step), step, self.facts())
            trl_folders.clear(self.root, keep=self.recipe.checkpoint.keep, newest=step)
            if self.world.heartbeat is not None:
                self.world.heartbeat.saved(step)
            facts = {"step": step, "bytes": size, "seconds": round(time.monotonic() - began, 4)}
            self._event("checkpoint", **facts)
            self._say(f"saved step {step}", {"event": "checkpoint", **facts})
        self._control.barrier()
        self.on("checkpoint", step=self.cursor.step, ok=True)


class TRLSFT(_TRL):
    """trl.SFTTrainer: the loss is a mean over the tokens of completions."""

    kind = "SFT"
    columns = MappingProxyType({"completion_ids": "completion"})


class TRLDPO(_TRL):
    """trl.DPOTrainer with every loss that it has: `rl.trl: {loss_type: [ipo], beta: 0.1}`."""

    kind = "DPO"
    columns = MappingProxyType({"chosen_ids": "chosen", "rejected_ids": "rejected"})


class TRLKTO(_TRL):
    """trl.KTOTrainer: single completions with a label."""

    kind = "KTO"
    columns = MappingProxyType({"completion_ids": "completion"})

    def rows_of(self, split: str) -> dict[str, list[Any]] | None:
        """See _TRL."""
        found = super().rows_of(split)
        if found is not None:
            records = self.records(split)
            labels = [row.get(records.options.label) for row in records.rows[: len(found["prompt_ids"])]]
            if not all(isinstance(label, bool | int) for label in labels):
                raise RecipeError(f"{records!r} has rows without {records.options.label!r}; name it in data.label")
            found["label"] = [bool(label) for label in labels]
        return found


# argument of TRL's configurations -> the key of the recipe that says it
OURS: Mapping[str, str] = MappingProxyType({
    "output_dir": "checkpoint.path",
    "max_steps": "train.steps",
    "num_train_epochs": "train.steps",
    "per_device_train_batch_size": "train.micro_batch",
    "per_device_eval_batch_size": "train.micro_batch",
    "gradient_accumulation_steps": "train.global_batch",
    "learning_rate": "optimizer.lr",
    "weight_decay": "optimizer.weight_decay",
    "adam_beta1": "optimizer.betas",
    "adam_beta2": "optimizer.betas",
    "adam_epsilon": "optimizer.eps",
    "optim": "optimizer.name",
    "max_grad_norm": "optimizer.clip",
    "lr_scheduler_type": "schedule.name",
    "warmup_steps": "schedule.warmup_steps",
    "warmup_ratio": "schedule.warmup_steps",
    "seed": "train.seed",
    "data_seed": "train.seed",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "logging_steps": "train.log_every",
    "logging_strategy": "train.log_every",
    "eval_steps": "train.eval_every",
    "eval_strategy": "train.eval_every",
    "save_steps": "checkpoint.every",
    "save_strategy": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "max_length": "data.seq_len",
    "use_cpu": "strategy",
    "deepspeed": "strategy",
    "fsdp": "strategy",
    "resume_from_checkpoint": "the folder of the run",
})  # fmt: skip
_NOT_OURS = ("learning_rate", "epoch", "samples_per_second", "steps_per_second", "total_flos")


def _loop(name: str) -> ModuleType:
    """The file that imports TRL. Raises MissingExtra."""
    for package in ("transformers", "accelerate", "datasets", "peft", "trl"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtra(f"the trainer {name}", package, "trl")
    return importlib.import_module("unitrain.rl.trl_loop_torch")
