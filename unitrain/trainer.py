"""The loop, and the one class that users subclass.

`fit` runs `steps` to its end; `steps` is the whole loop and can be driven by hand, from a notebook say. It knows
no backend: an engine does the work of a step, and everything else is a function of the cursor.
"""

from __future__ import annotations

import contextlib
import functools
import secrets
import shlex
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from . import registry
from .batch import Batch
from .checkpoint import CheckpointReader, Saver, SaveReport, open_newest, take_over
from .cursor import Cursor, mix
from .data.feed import Feed
from .data.source import Source
from .errors import CheckpointDamaged, CheckpointError, CheckpointMismatch, ExitCode, RecipeError, UserError
from .heartbeat import Phase
from .keras_backend import settle_keras
from .policy import due
from .recipe import OptimizerRecipe, Recipe, StrategyRecipe
from .recipe_file import load_recipe, refuse_problems
from .run import Run
from .schedule import learning_rate
from .stopping import Agreement, StopSignals
from .strategy import Cluster, Engine, HyperParameters, Role, StepOut, Strategy
from .track.lines import evaluation_line, progress_line
from .world import World


@dataclass(frozen=True)
class Result:
    """What a finished run leaves."""

    run_dir: Path
    step: int
    metrics: dict[str, float]  # of the last log line
    evaluation: dict[str, float]  # of the last evaluation; empty without one
    exit_code: int = 0  # 75: stopped by a signal, and saved (see `errors.ExitCode`)


class Trainer:
    """Trains the models of a recipe. Override `build_model`, `build_source` and `loss`; the rest if you need it."""

    # (canonical name, shape, seed) -> fp32 values; see Role.initial
    initial: Any = None

    def __init__(self, recipe: Recipe, *, run_dir: Path | str | None = None, world: World | None = None) -> None:
        self.recipe = recipe
        settle_keras(registry.entry("strategies", recipe.strategy.name).framework)  # which build_model may import
        self.world = world or World.from_environment()
        self.cursor = Cursor()
        self.engines: dict[str, Engine] = {}
        self.run: Run | None = None  # known once the run has started
        self.extra: dict[str, Any] = {}  # JSON values of your own, saved with every checkpoint
        self.evaluation: dict[str, float] = {}
        self.train_source: Source | None = None
        self.eval_source: Source | None = None
        self._run_dir = None if run_dir is None else Path(run_dir)
        self._rates: dict[str, tuple[float, float | None]] = {}
        self._last: dict[str, float] = {}
        self._exit_code: int = ExitCode.DONE

    @classmethod
    def from_recipe(
        cls,
        path: str | Path,
        *,
        strategy: str | None = None,
        run_dir: Path | str | None = None,
        overrides: Sequence[str] = (),
    ) -> Trainer:
        """A trainer of this class for a recipe file; its ranks are the processes that torchrun, srun, ... started.

        Raises RecipeError and other UserErrors where the recipe cannot be used.
        """
        return cls(load_recipe(path, overrides, strategy=strategy), run_dir=run_dir)

    @functools.cached_property
    def framework(self) -> str:
        """The framework of the recipe's strategy: torch, jax or tensorflow."""
        framework: str = registry.load("strategies", self.recipe.strategy.name).framework
        return framework

    # What research code overrides.

    def build_model(self) -> Any:
        """The model, in the framework of the strategy."""
        raise UserError(f"{type(self).__name__} has no build_model; override it to return a model")

    def build_source(self, split: str) -> Source | None:
        """The data of a split, "train" or "eval"; None for no evaluation. By default what `data:` names."""
        if not self.recipe.data.name:
            raise UserError(f"{type(self).__name__} has no build_source and the recipe no data; give one of them")
        data = registry.load("sources", self.recipe.data.name)(**self.recipe.data.options)
        source: Source | None = data.open(split)
        return source

    def loss(self, model: Any, batch: Any) -> Any:
        """Loss(sum, weight), or a scalar that is the mean over the rows of `batch` (named arrays, rows first)."""
        raise UserError(f"{type(self).__name__} has no loss; override it to return a scalar or a Loss")

    def step(self, batch: Batch) -> StepOut:
        """One optimizer step; a GAN or RL loop updates several roles here."""
        return self.engines["model"].update(batch, self.hp())

    def roles(self) -> dict[str, Role]:
        """Every model of the run by name."""
        model = Role(
            model=self.build_model, losses={"loss": self.loss}, optimizer=self.recipe.optimizer, initial=self.initial
        )
        return {"model": model}

    def evaluate(self) -> dict[str, float]:
        """Metrics of the evaluation split, by default the mean loss of the first role and what it reports."""
        assert self._eval_feed is not None, "called only where there is an evaluation split"
        engine = next(iter(self.engines.values()))
        sums = engine.evaluate(self._eval_feed.sweep(self.recipe.train.eval_batches))
        return {name: amount / weight for name, (amount, weight) in sums.items() if weight}

    def on(self, event: str, **facts: Any) -> None:
        """Called on every rank at: start, log, eval, checkpoint, stop."""

    def finish(self) -> None:
        """Called on every rank after the last step and its checkpoint."""

    def flops_per_sample(self) -> float | None:
        """Training FLOPs of one sample, forward and backward; None where unknown (no MFU then)."""
        return None

    def identity(self) -> dict[str, Any]:
        """What a resumed run must share with the one that wrote the checkpoint, beyond data, seed and batch (JSON)."""
        return {}

    def hp(self, role: str = "model") -> HyperParameters:
        """Hyper-parameters of this step for a role."""
        top, clip = self._rates[role]
        rate = learning_rate(self.recipe.schedule, self.cursor.step, self.recipe.train.steps, top)
        return HyperParameters(rate, clip)

    # The loop.

    @final
    def fit(self) -> Result:
        """Train to the end or to a stop signal, resuming where the run's folder holds a checkpoint."""
        for _ in self.steps():
            pass
        return self.result()

    @final
    def steps(self) -> Iterator[StepOut]:
        """Yield what each step gave, until the recipe's last; leaving early closes the run in good order.

        A stop signal (SIGTERM, SIGUSR1, SIGUSR2, Ctrl-C) ends the loop after a step that all ranks agree on and save.
        """
        train, every = self.recipe.train, self.recipe.checkpoint.every
        with self._session() as (feed, saver):
            while self.cursor.step < train.steps:
                if number := self._agreement.stop(self.cursor.step, self._signals.caught):
                    self._preempt(saver, number)
                    return
                self._beat(Phase.STEP)
                batch = feed.batch(self.cursor.step)
                out = self.step(batch)
                self.cursor = self.cursor.advanced(len(batch), batch.tokens)
                step = self.cursor.step
                if self.world.heartbeat is not None:
                    self.world.heartbeat.finished()
                if due(step, train.log_every, train.steps):
                    self._log(out)
                yield out
                if due(step, train.eval_every, train.steps):
                    self._evaluate()
                if due(step, every, train.steps):
                    self._save(saver)
            self._beat(Phase.SAVING)
            saver.wait()
            self._beat(Phase.FINISHING)
            self.finish()

    @final
    def result(self) -> Result:
        """Where the run stands."""
        assert self.run is not None, "the run has started"
        return Result(self.run.folder, self.cursor.step, dict(self._last), dict(self.evaluation), self._exit_code)

    # How a run begins and ends.

    @contextlib.contextmanager
    def _session(self) -> Iterator[tuple[Feed, Saver]]:
        """Everything that a run holds open, closed in reverse order whatever happens."""
        world, recipe = self.world, self.recipe
        roles = self.roles()
        self._check(roles)
        self._exit_code = ExitCode.DONE
        with contextlib.ExitStack() as stack:
            self._signals = stack.enter_context(StopSignals())
            self._open_strategies(roles, stack)
            self._signals.hold()
            self._open_run(stack)
            self.train_source, feed = self._feed("train", stack)
            self.eval_source, self._eval_feed = (
                self._feed("eval", stack) if recipe.train.eval_every != 0 else (None, None)
            )
            assert self.run is not None and feed is not None, "opened above"
            for number, (name, role) in enumerate(roles.items()):
                seed = recipe.train.seed if number == 0 else mix(recipe.train.seed, number)
                self.engines[name] = self._strategy_of(role).bind(role, seed)
                optimizer = role.optimizer if isinstance(role.optimizer, OptimizerRecipe) else recipe.optimizer
                self._rates[name] = (optimizer.lr, optimizer.clip)
            self._restore()
            if world.heartbeat is not None:
                world.heartbeat.began(self.cursor.step)
            self._began, self._began_at = time.monotonic(), self.cursor
            self._event("start", strategy=recipe.strategy.name, world_size=world.size, threads=world.threads)
            self.on("start", step=self.cursor.step)
            saver = stack.enter_context(contextlib.closing(self._saver()))
            self._agreement = Agreement(world, self._control.share, self.run.folder)
            try:
                yield feed, saver
            except GeneratorExit:  # whoever drives `steps` by hand has left early
                self._stopped()
                raise
            self._stopped()

    def _stopped(self) -> None:
        self._event("stop", **({"exit_code": int(self._exit_code)} if self._exit_code else {}))
        self.on("stop", step=self.cursor.step)

    def _check(self, roles: dict[str, Role]) -> None:
        """Refuse what cannot work, before anything is joined, read or written."""
        world, recipe = self.world, self.recipe
        if not roles:
            raise UserError(f"{type(self).__name__}.roles() is empty; return at least one Role")
        for name, role in roles.items():
            if not isinstance(role, Role):
                raise UserError(
                    f"{type(self).__name__}.roles() has a {type(role).__name__} as {name!r}; give a unitrain.Role"
                )
        if world.size > recipe.train.global_batch:
            raise RecipeError(
                f"{world.size} ranks cannot share a batch of {recipe.train.global_batch} samples; use at most "
                f"{recipe.train.global_batch} ranks or a larger train.global_batch"
            )
        cluster = Cluster(nodes=world.nodes, nproc=world.local_size)
        recipes = {recipe.strategy.name: recipe} | {
            # The recipe's options are for the recipe's strategy.
            role.strategy: recipe.replace(strategy=StrategyRecipe(name=role.strategy))
            for role in roles.values()
            if role.strategy not in (None, recipe.strategy.name)
        }
        classes = {name: registry.load("strategies", name) for name in recipes}
        refuse_problems(problem for name, kind in classes.items() for problem in kind.problems(recipes[name], cluster))
        frameworks = {kind.framework for kind in classes.values()}
        if len(frameworks) > 1:
            raise UserError(
                f"the roles' strategies need {' and '.join(sorted(frameworks))} in one process; use one framework"
            )
        self._strategies: dict[str, Strategy] = {name: kind(recipes[name]) for name, kind in classes.items()}

    def _open_strategies(self, roles: dict[str, Role], stack: contextlib.ExitStack) -> None:
        for strategy in self._strategies.values():
            stack.callback(strategy.close)
            strategy.open(self.world)
        self._control = self._strategy_of(next(iter(roles.values())))

    def _strategy_of(self, role: Role) -> Strategy:
        return self._strategies[role.strategy or self.recipe.strategy.name]

    def _open_run(self, stack: contextlib.ExitStack) -> None:
        """The run's folder, agreed by all ranks, and a nonce that no other attempt has."""
        if self.world.first:
            exists = self._run_dir is not None and Run.exists(self._run_dir)
            run = Run.open(self._run_dir) if exists and self._run_dir else Run.create(self._run_dir, self.recipe)
            agreed = self._control.share(f"{secrets.token_hex(3)} {run.folder.absolute()}")
        else:
            agreed = self._control.share("")
        self._nonce, _, folder = agreed.partition(" ")
        self.run = Run(Path(folder))
        self._run_dir = self.run.folder  # a second `steps` of this trainer goes on with the same run

    def _feed(self, split: str, stack: contextlib.ExitStack) -> tuple[Source | None, Feed | None]:
        source = self.build_source(split)
        if source is None:
            if split == "train":
                raise UserError(f"{type(self).__name__}.build_source('train') returned None; return a Source")
            return None, None
        if not isinstance(source, Source):
            raise UserError(
                f"{type(self).__name__}.build_source({split!r}) returned a {type(source).__name__}; return a "
                "unitrain.Source, for example DatasetSource(dataset) or ArraySource(x=..., y=...)"
            )
        train = self.recipe.train
        share, shares = self._control.data_share(self.world)
        feed = Feed(
            source,
            seed=train.seed,
            global_batch=train.global_batch,
            micro_batch=train.micro_batch,
            rank=share,
            size=shares,
            place=self._control.place,
            even=self._control.even,
        )
        stack.callback(feed.close)
        return source, feed

    # State in and out.

    def _saver(self) -> Saver:
        assert self.run is not None, "opened before"
        return Saver(
            self.run.checkpoints(self.recipe),
            writer=self.world.rank,
            writers=self.world.size,
            nonce=self._nonce,
            keep=self.recipe.checkpoint.keep,
            asynchronous=self.recipe.checkpoint.asynchronous,
            producer={
                "strategy": self.recipe.strategy.name,
                "framework": self._control.framework,
                "world_size": self.world.size,
            },
            report=self._saved,
        )

    def _identity(self) -> dict[str, Any]:
        """What a resumed run must share with the one that wrote the checkpoint."""
        assert self.train_source is not None, "opened before"
        return {
            "train.seed": self.recipe.train.seed,
            "train.global_batch": self.recipe.train.global_batch,
            "training data": self.train_source.fingerprint(),
            **self.identity(),
        }

    def _preempt(self, saver: Saver, number: int) -> None:
        """All ranks end here, and what they have learned is saved, unless the recipe wants nothing saved."""
        assert self.run is not None, "opened before"
        self._beat(Phase.SAVING)
        name, step = signal.Signals(number).name, self.cursor.step
        if self.recipe.checkpoint.every == 0:
            self._exit_code = 128 + number  # as a shell counts
        else:
            if step != self._saved_step:
                self._save(saver)
            saver.wait()
            self._exit_code = ExitCode.PREEMPTED
        self._event("preempt", signal=name, exit_code=int(self._exit_code))
        if self.world.first:
            saved = "saved" if self._exit_code == ExitCode.PREEMPTED else "not saved (checkpoint.every is 0)"
            hint = f"; to go on: unitrain resume {shlex.quote(str(self.run.folder))}"  # our agent says it itself
            self._say(f"stopped by {name} at step {step}, {saved}{'' if self.world.starter == 'agent' else hint}")

    def _beat(self, phase: Phase) -> None:
        self.world.beat(phase, self.cursor.step)

    def _save(self, saver: Saver) -> None:
        assert self.run is not None, "opened before"
        self._beat(Phase.SAVING)
        cursor = self.cursor
        self._saved_step = cursor.step
        state = {
            "cursor": {"step": cursor.step, "samples": cursor.samples, "tokens": cursor.tokens},
            "identity": self._identity(),
            "run": self.run.id,
            "extra": self.extra,
        }
        saver.save(cursor.step, {name: engine.shards() for name, engine in self.engines.items()}, state)

    def _saved(self, report: SaveReport) -> None:
        """Called when a save has ended, from the thread that wrote it."""
        facts = {"step": report.step, "bytes": report.bytes, "seconds": round(report.seconds, 4)}
        if report.ok:
            if self.world.first:
                if self.world.heartbeat is not None:
                    self.world.heartbeat.saved(report.step)
                self._event("checkpoint", **facts)
                self._say(f"saved step {report.step}", {"event": "checkpoint", **facts})
            if report.error:
                print(f"warning: step {report.step} was saved, but {report.error}", flush=True)
        else:
            self._event("checkpoint_failed", **facts, error=report.error)
            print(f"warning: the checkpoint of step {report.step} was not saved: {report.error}", flush=True)
        self.on("checkpoint", step=report.step, ok=report.ok)

    def _restore(self) -> None:
        """Continue from the newest sound checkpoint, which rank 0 finds and checks for all."""
        assert self.run is not None, "opened before"
        root = self.run.checkpoints(self.recipe)
        self.cursor, self._saved_step = Cursor(), 0
        folder = ""
        if self.world.first:
            if self.recipe.checkpoint.path is not None and (found := open_newest(root, verify="manifest").reader):
                self._refuse_shared_path(found.folder, found.state.get("run"))
            self._take_over(root)
            newest = open_newest(root, verify="full")
            for passed in newest.passed_over:
                print(
                    f"warning: the checkpoint {passed.folder} is damaged and was passed over: {passed.reason}",
                    flush=True,
                )
                self._event("checkpoint_damaged", folder=passed.folder, error=passed.reason)
            if newest.reader is None and newest.passed_over:
                # Starting from scratch here would lose the run's work without a word.
                raise CheckpointDamaged(
                    f"no checkpoint in {root} is sound: {newest.passed_over[0].reason}; mend one, or move them away "
                    "to start from the beginning"
                )
            folder = newest.reader.folder if newest.reader is not None else ""
        folder = self._control.share(folder)
        if not folder:
            if self.world.first and self.run.metrics():
                # An attempt that ended before its first checkpoint: its steps come again.
                self.run.rewind(0)
                self._say(f"there is no checkpoint in {root}: training starts over")
            return
        reader = CheckpointReader(folder)
        self._refuse_other_run(folder, reader.state["identity"])
        for name, engine in self.engines.items():
            engine.load(reader.role(name)).require_all(f"the checkpoint {folder}")
        self.cursor = Cursor(**reader.state["cursor"])
        self._saved_step = self.cursor.step
        self.extra = dict(reader.state["extra"])
        if self.world.first:
            self.run.rewind(self.cursor.step)
            done = "; nothing is left to do" if self.cursor.step >= self.recipe.train.steps else ""
            self._say(f"resumed at step {self.cursor.step} of {self.recipe.train.steps} from {folder}{done}")

    def _take_over(self, root: str) -> None:
        """Keep an earlier attempt that is still about from publishing, before the newest checkpoint is looked for."""
        if self.recipe.checkpoint.every == 0:
            return
        try:
            take_over(root, self._nonce)
        except CheckpointError as error:  # the disk may be full, which costs a checkpoint and not the run
            print(f"warning: {error}", flush=True)

    def _refuse_shared_path(self, folder: str, writer: str | None) -> None:
        """A new run must not go on with, and later delete, what another one has saved at `checkpoint.path`."""
        assert self.run is not None, "opened before"
        path = self.recipe.checkpoint.path
        began = any(event["event"] == "start" for event in self.run.events())
        if not began and writer not in (None, self.run.id):
            raise CheckpointMismatch(
                f"checkpoint.path {path} holds {folder} of the run {writer}; give a new run a path of its own, or go "
                "on with that run by `unitrain resume`"
            )

    def _refuse_other_run(self, folder: str, identity: dict[str, Any]) -> None:
        changed = [
            f"{key} was {identity.get(key)!r} and is now {value!r}"
            for key, value in self._identity().items()
            if identity.get(key) != value
        ]
        if changed:
            raise CheckpointMismatch(
                f"the checkpoint {folder} belongs to another run: {'; '.join(changed)}; the sample order would "
                "change, so set them back, or start a new run"
            )

    # What a person sees.

    def _log(self, out: StepOut) -> None:
        """One line of metrics. The only place in the loop that waits for the device."""
        values = out.read()
        elapsed = time.monotonic() - self._began
        cursor, before = self.cursor, self._began_at
        names = list(self._rates)
        record: dict[str, Any] = {
            "step": cursor.step,
            "split": "train",
            "loss": values.pop("loss"),
            "lr": learning_rate(
                self.recipe.schedule, cursor.step - 1, self.recipe.train.steps, self._rates[names[0]][0]
            ),
            "grad_norm": values.pop("grad_norm"),
            "samples": cursor.samples,
            "tokens": cursor.tokens,
            "seconds": round(elapsed, 6),
            "samples_per_second": (cursor.samples - before.samples) / elapsed,
            "tokens_per_second": (cursor.tokens - before.tokens) / elapsed,
            "memory_bytes": self._control.memory_bytes(),
        }
        if taken := record.keys() & values.keys():
            raise UserError(
                f"the loss function returned a metric named {min(taken)!r}, which every record has already; rename it"
            )
        record |= values
        flops, peak = self.flops_per_sample(), self._control.peak_flops()
        if flops and peak:
            record["mfu"] = record["samples_per_second"] * flops / (peak * self.world.size)
        self._last = record
        if self.world.first and self.run is not None:
            self.run.metric(record)
            self._say(progress_line(record, self.recipe.train.steps), record)
        self.on("log", **record)

    def _evaluate(self) -> None:
        if self._eval_feed is None:
            return
        self._beat(Phase.EVALUATING)
        began = time.monotonic()
        self.evaluation = self.evaluate()
        pause = time.monotonic() - began
        self._began += pause  # throughput is of training alone
        record = {"step": self.cursor.step, "split": "eval", **self.evaluation, "seconds": round(pause, 6)}
        if self.world.first and self.run is not None:
            self.run.metric(record)
            self._say(evaluation_line(record), record)
        self.on("eval", **record)

    def _say(self, line: str, record: dict[str, Any] | None = None) -> None:
        """A line for people: in the log, and to the agent, which may show a panel instead."""
        if record is not None:
            self.world.tell_agent(kind="progress", record=record, line=line, steps=self.recipe.train.steps)
        print(f"{line}\n", end="", flush=True)  # in one write: a save that has ended speaks from its own thread

    def _event(self, event: str, **facts: Any) -> None:
        if self.world.first and self.run is not None:
            self.run.event(event, **{"step": self.cursor.step, **facts})
