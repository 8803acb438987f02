"""The loop, and the one class that users subclass.

`fit` runs `steps` to its end; `steps` is the whole loop and can be driven by hand, from a notebook say. It knows
no backend: an engine does the work of a step, and everything else is a function of the cursor.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import secrets
import shlex
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, final

from . import registry
from .batch import Batch
from .checkpoint import CheckpointReader, Holder, Lease, Saver, SaveReport, open_newest, take_lease, take_over
from .checkpoint.lease import RootHeld
from .checkpoint.memory import MemoryFolder, Snapshots, whole_snapshots
from .cursor import Cursor, mix, positions
from .data.feed import Feed
from .data.source import Source
from .errors import (
    CheckpointDamaged,
    CheckpointError,
    CheckpointMismatch,
    Diverged,
    ExitCode,
    RecipeError,
    UserError,
)
from .guard import Guard, Reading, Spike, refuse_differing
from .heartbeat import Phase
from .keras_backend import settle_keras
from .ledger import Ledger, Trail
from .policy import due
from .recipe import OptimizerRecipe, Recipe, StrategyRecipe
from .recipe_file import load_recipe, refuse_problems
from .run import Run
from .schedule import learning_rate
from .stopping import RESIZE, Agreement, StopSignals
from .strategy import Cluster, Engine, HyperParameters, Role, Shard, StepOut, Strategy
from .track.lines import evaluation_line, progress_line
from .world import World

_MOST_UNREAD = 1024  # updates whose losses nobody has looked at yet; they hold scalars on the device
_MOST_IDS = 1 << 16  # in an account of a failure


@dataclass(frozen=True)
class Result:
    """What a finished run leaves."""

    run_dir: Path
    step: int
    metrics: dict[str, float]  # of the last log line
    evaluation: dict[str, float]  # of the last evaluation; empty without one
    exit_code: int = 0  # 75: stopped by a signal, and saved (see `errors.ExitCode`)


@dataclass(frozen=True, kw_only=True)
class Replay:
    """From where a failed step is trained up to again, and what the guard had decided by then."""

    checkpoint: str | None  # None: from the beginning
    skipped: tuple[tuple[int, int], ...] = ()
    rollbacks: int = 0


class Trainer:
    """Trains the models of a recipe. Override `build_model`, `build_source` and `loss`; the rest if you need it."""

    # (canonical name, shape, seed) -> fp32 values; see Role.initial
    initial: Any = None

    token: str  # tells this Trainer from others, in whatever process
    _made_from: tuple[tuple[Any, ...], dict[str, Any]]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Keep what it is made from: where ranks are other processes, each makes its own."""
        trainer = super().__new__(cls)
        trainer._made_from = (args, kwargs)
        trainer.token = secrets.token_hex(8)
        return trainer

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process it is made anew, for the strategy that runs there: one for all that come of this one."""
        strategy = registry.inner(self.recipe.strategy)

        def there(value: Any) -> Any:
            return value.replace(strategy=strategy) if isinstance(value, Recipe) else value

        args, kwargs = self._made_from
        kept = {name: there(value) for name, value in kwargs.items() if name not in ("world", "strategy")}
        return _twin, (self.token, type(self), [there(value) for value in args], kept)

    def __init__(
        self,
        recipe: Recipe,
        *,
        strategy: str | None = None,
        run_dir: Path | str | None = None,
        world: World | None = None,
    ) -> None:
        if strategy is not None and strategy != recipe.strategy.name:
            recipe = recipe.replace(strategy=StrategyRecipe(name=strategy))  # options are one strategy's own
        self.recipe = recipe
        registry.entry("strategies", recipe.strategy.name)  # what it needs is installed
        settle_keras(registry.framework_of(recipe.strategy))  # which build_model may import
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
        self._lease: Lease | None = None
        self._last: dict[str, float] = {}
        self._exit_code: int = ExitCode.DONE
        self._guard = Guard(recipe.guard)
        self._batch: Batch | None = None
        self._from: str | None = None  # the checkpoint that this attempt goes on from
        self._replay: Replay | None = None
        self._looked = False  # replicas have been compared

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
        strategy = registry.inner(self.recipe.strategy)
        framework: str = registry.load("strategies", strategy.name).framework
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
        train, every, memory_every = (
            self.recipe.train,
            self.recipe.checkpoint.every,
            self.recipe.checkpoint.memory_every,
        )
        with self._session() as (feed, saver):
            if self.recipe.guard.spike is not None and self.cursor.step == 0 and self._replay is None:
                self._save(saver)  # so that there is always one to roll back to
            while self.cursor.step < train.steps:
                if number := self._agreement.stop(self.cursor.step, self._signals.caught):
                    if (spike := self._judge()) is not None:  # no checkpoint is from after one
                        self._roll_back(spike, feed, saver)
                    self._preempt(saver, number)
                    return
                self._beat(Phase.STEP)
                self._batch = batch = feed.batch(self.cursor.step)
                out = self.step(batch)
                self.cursor = self.cursor.advanced(len(batch), batch.tokens)
                step = self.cursor.step
                self._unread.append((step, out))
                if self.world.first:
                    self._trail.take(batch.ids)
                if self.world.heartbeat is not None:
                    self.world.heartbeat.finished()
                spike = None
                logging, saving = due(step, train.log_every, train.steps), due(step, every, train.steps)
                snapping = self._snapshots is not None and not saving and due(step, memory_every, 0)
                if logging or saving or snapping or len(self._unread) >= _MOST_UNREAD:
                    spike = self._judge()
                if logging:
                    self._log(out)
                yield out
                self._guard.refuse_lost(step)
                if spike is not None:
                    self._roll_back(spike, feed, saver)
                    continue
                if saving or due(step, self.recipe.guard.digest_every, 0):
                    self._compare_replicas()
                if due(step, train.eval_every, train.steps):
                    self._evaluate()
                if saving:
                    self._save(saver)
                elif snapping:
                    self._snapshot()
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
        roles = {name: dataclasses.replace(role, name=name) for name, role in roles.items()}
        self._exit_code = ExitCode.DONE
        with contextlib.ExitStack() as stack:
            self._signals = stack.enter_context(StopSignals())
            self._open_strategies(roles, stack)
            self._signals.hold()
            self._open_run(stack)
            self._open_memory(stack)
            self.train_source, feed = self._feed("train", stack)
            self.eval_source, self._eval_feed = (
                self._feed("eval", stack) if recipe.train.eval_every != 0 else (None, None)
            )
            assert self.run is not None and feed is not None, "opened above"
            self._unsaved = {
                name for name, role in roles.items() if role.optimizer is None and role.checkpoint == "trainable"
            }  # unless they have buffers
            for number, (name, role) in enumerate(roles.items()):
                seed = recipe.train.seed if number == 0 else mix(recipe.train.seed, number)
                self.engines[name] = self._strategy_of(role).bind(role, seed)
                optimizer = role.optimizer if isinstance(role.optimizer, OptimizerRecipe) else recipe.optimizer
                self._rates[name] = (optimizer.lr, optimizer.clip)
            self._ledger = Ledger(self.run.folder)
            stack.callback(self._give_back)
            self._restore()
            self._unread: list[tuple[int, StepOut]] = []
            feed.skip(self._guard.skipped)
            self._begin_ledger()
            if world.heartbeat is not None:
                world.heartbeat.began(self.cursor.step)
            self._began, self._began_at = time.monotonic(), self.cursor
            self._event("start", strategy=recipe.strategy.name, world_size=self._num_ranks, threads=world.threads)
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
        self._strategies: dict[str, Strategy] = {name: kind(recipes[name]) for name, kind in classes.items()}
        frameworks = {strategy.framework for strategy in self._strategies.values()}
        if len(frameworks) > 1:
            raise UserError(
                f"the roles' strategies need {' and '.join(sorted(frameworks))} in one process; use one framework"
            )

    def _open_strategies(self, roles: dict[str, Role], stack: contextlib.ExitStack) -> None:
        for strategy in self._strategies.values():
            strategy.report = self._reported
            stack.callback(strategy.close)
            strategy.open(self.world)
        self._control = self._strategy_of(next(iter(roles.values())))

    @property
    def _num_ranks(self) -> int:
        return self._control.num_ranks(self.world)

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

    def _open_memory(self, stack: contextlib.ExitStack) -> None:
        """Where this rank's snapshots go, if it takes any."""
        self._snapshots: Snapshots | None = None
        if self.recipe.checkpoint.memory_every is None:
            return
        world = self.world
        if world.memory_fd is None:
            if world.first:
                print(f"note: no snapshots in memory: they need our agent, not {world.starter}", flush=True)
            return
        self._snapshots = Snapshots(world.memory_fd, writer=world.rank, writers=world.size, nonce=self._nonce)
        stack.enter_context(contextlib.closing(self._snapshots))

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
            elsewhere=self._control.elsewhere,
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
                "world_size": self._num_ranks,
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
        name, step = "a resize" if number == RESIZE else signal.Signals(number).name, self.cursor.step
        if self.recipe.checkpoint.every == 0:
            self._exit_code = 128 + number  # as a shell counts
        else:
            if step != self._saved_step:
                self._save(saver)
            saver.wait()
            self._exit_code = ExitCode.PREEMPTED
        self._event("leave" if number == RESIZE else "preempt", signal=name, exit_code=int(self._exit_code))
        if self.world.first:
            saved = "saved" if self._exit_code == ExitCode.PREEMPTED else "not saved (checkpoint.every is 0)"
            hint = f"; to go on: unitrain resume {shlex.quote(str(self.run.folder))}"  # our agent says it itself
            self._say(f"stopped by {name} at step {step}, {saved}{'' if self.world.starter == 'agent' else hint}")

    def _beat(self, phase: Phase) -> None:
        self.world.beat(phase, self.cursor.step)

    def _save(self, saver: Saver) -> None:
        assert self.run is not None, "opened before"
        self._beat(Phase.SAVING)
        self._saved_step = self.cursor.step
        saver.save(self.cursor.step, self._shards(), self._state())

    def _snapshot(self) -> None:
        """Copy what a killed rank would lose into memory that outlives it."""
        assert self._snapshots is not None, "called only where it is"
        self._beat(Phase.SAVING)
        try:
            self._snapshots.save(self.cursor.step, self._shards(), self._state())
        except CheckpointError as error:  # costs a snapshot and not the run
            print(f"warning: {error}", flush=True)
            return
        if self.world.first and self.world.heartbeat is not None:
            self.world.heartbeat.saved(self.cursor.step)

    def _shards(self) -> dict[str, Iterator[Shard]]:
        return {name: engine.shards() for name, engine in self.engines.items()}

    def _state(self) -> dict[str, Any]:
        """What a checkpoint holds beside the tensors."""
        assert self.run is not None, "opened before"
        cursor = self.cursor
        return {
            "cursor": {"step": cursor.step, "samples": cursor.samples, "tokens": cursor.tokens},
            "identity": self._identity(),
            "run": self.run.id,
            "extra": self.extra,
            "guard": self._guard.state(),
            "ledger": self._trail.close(cursor.step),
        }

    def _saved(self, report: SaveReport) -> None:
        """Called when a save has ended, from the thread that wrote it."""
        facts = {"step": report.step, "bytes": report.bytes, "seconds": round(report.seconds, 4)}
        if report.ok:
            if self.world.first:
                if self.world.heartbeat is not None:
                    self.world.heartbeat.saved(report.step)
                for taken in self._trail.durable(report.step):
                    self._ledger.append("steps", **taken)
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
        self.cursor, self._saved_step, self._from = Cursor(), 0, None
        self._guard.restore({})
        if self._replay is not None:
            self._replay_from(self._replay)
            return
        folder = snapshot = ""
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
            snapshot = self._newest_snapshot(after=0 if newest.reader is None else newest.reader.step)
            if newest.reader is None and newest.passed_over and not snapshot:
                # Starting from scratch here would lose the run's work without a word.
                raise CheckpointDamaged(
                    f"no checkpoint in {root} is sound: {newest.passed_over[0].reason}; mend one, or move them away "
                    "to start from the beginning"
                )
            folder = newest.reader.folder if newest.reader is not None else ""
        folder, _, snapshot = self._control.share(f"{folder}\n{snapshot}").partition("\n")
        if snapshot:
            self._load(snapshot)
            self._from = folder or None  # what is still there tomorrow
            folder = snapshot
        elif not folder:
            if self.world.first and self.run.metrics():
                # An attempt that ended before its first checkpoint: its steps come again.
                self.run.rewind(0)
                self._say(f"there is no checkpoint in {root}: training starts over")
        else:
            self._load(folder)
        self._take_decisions()
        if folder and self.world.first:
            self.run.rewind(self.cursor.step)
            done = "; nothing is left to do" if self.cursor.step >= self.recipe.train.steps else ""
            self._say(f"resumed at step {self.cursor.step} of {self.recipe.train.steps} from {folder}{done}")

    def _load(self, folder: str) -> None:
        """Become what the run was at that checkpoint, or that snapshot."""
        reader = self._snapshot_reader(folder) or CheckpointReader(folder)
        state = _checked_state(reader.state, folder)
        self._refuse_other_run(folder, state["identity"])
        for name, engine in self.engines.items():
            if name not in self._unsaved or name in reader.roles:
                engine.load(reader.role(name)).require_all(f"the checkpoint {folder}")
        self.cursor = Cursor(**state["cursor"])
        self._saved_step, self._from = self.cursor.step, folder
        self.extra = state["extra"]
        try:
            self._guard.restore(state.get("guard", {}))
            if self.world.first and self._replay is None:
                self._ledger.recover(state.get("ledger", []))
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise CheckpointDamaged(
                f"the guard's state in {folder} is none ({error}); go on from another checkpoint"
            ) from error

    def _newest_snapshot(self, *, after: int) -> str:
        """The newest sound snapshot of a later step, by name; empty where there is none."""
        if self._snapshots is None or self.world.memory_fd is None:
            return ""
        for whole in whole_snapshots(self.world.memory_fd):
            if whole.step <= after:
                break
            if self.world.nodes > 1 and whole.name != self.world.snapshot:
                continue  # other nodes lack a part of it
            try:
                CheckpointReader(MemoryFolder(whole)).verify()
            except CheckpointError as error:
                print(f"warning: a snapshot of step {whole.step} was passed over: {error}", flush=True)
                self._event("snapshot_damaged", step=whole.step, error=str(error))
                continue
            return whole.name
        return ""

    def _snapshot_reader(self, name: str) -> CheckpointReader | None:
        """Of the snapshot of that name; None where the name is that of a folder."""
        fd = self.world.memory_fd
        wholes = [] if fd is None or self._snapshots is None else whole_snapshots(fd)
        return next((CheckpointReader(MemoryFolder(whole)) for whole in wholes if whole.name == name), None)

    def _take_decisions(self) -> None:
        """Rollbacks after the checkpoint that this attempt goes on from hold for it too."""
        known = [[*line["skip"], line["number"]] for line in self._ledger.rollbacks()] if self.world.first else []
        for begin, end, number in json.loads(self._control.share(json.dumps(known))):
            self._guard.skip((begin, end), number)

    def _begin_ledger(self) -> None:
        """Which samples this attempt will take, and a fresh record of those that it has."""
        self._trail = Trail(self.cursor.step, self._nonce)
        if self.world.first and self.train_source is not None and self._replay is None:
            self._ledger.append(
                "begin",
                attempt=self._nonce,
                step=self.cursor.step,
                strategy=self.recipe.strategy.name,
                world_size=self._num_ranks,
                seed=self.recipe.train.seed,
                global_batch=self.recipe.train.global_batch,
                size=len(self.train_source),
                skipped=[list(window) for window in self._guard.skipped],
            )

    def _give_back(self) -> None:
        lease, self._lease = self._lease, None
        if lease is not None:
            lease.close()

    def _take_over(self, root: str) -> None:
        """Refuse to work beside another job, and keep an earlier attempt of this one from publishing.

        Before the newest checkpoint is looked for. The disk may be full, which costs a checkpoint and not the run.
        """
        if self.recipe.checkpoint.every == 0:
            return
        assert self.run is not None, "opened before"
        world = self.world
        holder = Holder.here(run=self.run.id, nonce=self._nonce, pid=world.supervisor, group=world.group)
        try:
            self._lease = self._lease or take_lease(root, holder)
        except RootHeld:
            raise
        except CheckpointError as error:
            print(f"warning: {error}", flush=True)
        try:
            take_over(root, self._nonce)
        except CheckpointError as error:
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

    # Whether training itself is in order.

    def _judge(self) -> Spike | None:
        """Read what the updates since the last look gave; the first loss spike among them, agreed by all ranks."""
        readings = [Reading(step, *out.verdict()) for step, out in self._unread]
        self._unread = []
        lost, spike = self._guard.take(readings)
        for total, step in enumerate(lost, start=self._guard.lost - len(lost) + 1):
            self._event("step_lost", step=step, total=total)
        if self.recipe.guard.spike is None:
            return None
        agreed = json.loads(self._control.share(json.dumps(spike)))
        return None if agreed is None else Spike(*agreed)

    def _roll_back(self, spike: Spike, feed: Feed, saver: Saver) -> None:
        """Go on from the newest checkpoint, which is from before the spike, without the samples of the spike."""
        assert self.run is not None, "opened before"
        guard, batch = self._guard, self.recipe.train.global_batch
        guard.refuse_spike(spike)
        self._beat(Phase.SAVING)
        with contextlib.suppress(CheckpointError):  # it has been reported
            saver.wait()
        self._control.barrier()  # rank 0 may still publish
        begin = int(positions(spike.step - 1, batch, guard.skipped)[0])
        end = int(positions(spike.last_step - 1, batch, guard.skipped)[-1]) + 1
        number = guard.rollbacks + 1
        if self._snapshots is not None:
            self._snapshots.forget()  # they may be from within the spike
        found = open_newest(self.run.checkpoints(self.recipe), verify="full").reader if self.world.first else None
        folder = self._control.share(found.folder if found is not None else "")
        if not folder:
            raise Diverged(
                f"the loss of step {spike.step} is {spike.loss:.4g}, above {spike.limit:.4g}, and there is no sound "
                "checkpoint to roll back to"
            )
        facts = {"to": CheckpointReader(folder).step, "skip": [begin, end], "number": number}
        if self.world.first:  # first of all: whoever resumes from that checkpoint must decide the same
            self._ledger.append("rollback", attempt=self._nonce, step=spike.step, **facts)
        self._event(
            "rollback",
            step=spike.step,
            last=spike.last_step,
            loss=spike.loss,
            median=spike.median,
            limit=spike.limit,
            **facts,
        )
        known = guard.skipped
        self._load(folder)
        for window in (*known, (begin, end)):
            guard.skip(window, number)
        feed.skip(guard.skipped)
        self._trail = Trail(self.cursor.step, self._nonce)
        self._unread = []
        self._agreement.ask_soon()
        self._began, self._began_at = time.monotonic(), self.cursor
        if self.world.first:
            self.run.rewind(self.cursor.step)
            self._say(
                f"rollback {number}: the loss of step {spike.step} is {spike.loss:.4g}, above {spike.limit:.4g}; on "
                f"from step {self.cursor.step}, without the samples of steps {spike.step} to {spike.last_step}"
            )

    def _compare_replicas(self) -> None:
        """Raise ReplicasDiffer, on all ranks, where ranks that should hold the same weights do not."""
        if self.recipe.guard.digest_every and self._num_ranks > 1:
            compared = {name: engine.replicas() for name, engine in self.engines.items()}
            for name, replicas in compared.items():
                refuse_differing(name, self.cursor.step, replicas)
            if self.world.first and not self._looked and not any(compared.values()):
                print(f"note: guard.digest_every finds no replicas on {self.recipe.strategy.name}", flush=True)
            self._looked = True

    # What is known of a failure, and how a step is replayed.

    @final
    def failure_account(self) -> dict[str, Any]:
        """Where the run stands, for the record of a failure: JSON values."""
        batch = self._batch
        ids = [] if batch is None or len(batch) > _MOST_IDS else batch.ids.tolist()
        return {
            "step": self.cursor.step if batch is None else batch.step + 1,
            "finished_step": self.cursor.step,
            "sample_ids": ids,
            "seed": self.recipe.train.seed,
            "skipped": [list(window) for window in self._guard.skipped],
            "rollbacks": self._guard.rollbacks,
            "strategy": self.recipe.strategy.name,
            "world_size": self.world.size,
            "run": None if self.run is None else str(self.run.folder),
            "checkpoints": None if self.run is None else self.run.checkpoints(self.recipe),
            "from": self._from,
        }

    @final
    def repeat_steps(self, plan: Replay) -> Iterator[int]:
        """Train as the plan says, keeping nothing; the number of each step that went through."""
        self._replay = plan
        for _ in self.steps():
            yield self.cursor.step

    def _replay_from(self, plan: Replay) -> None:
        if plan.checkpoint is not None:
            self._load(plan.checkpoint)
        for window in plan.skipped:
            self._guard.skip(window, plan.rollbacks)

    # What a person sees.

    def _log(self, out: StepOut) -> None:
        """One line of metrics. The loop waits for the device here and in `_judge`, and in no step between them."""
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
            "skipped": self._guard.lost,
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

    def _reported(self, event: str, line: str, **facts: Any) -> None:
        """What a strategy has done by itself."""
        self._event(event, **facts)
        self._say(line, {"event": event, **facts})

    def _event(self, event: str, **facts: Any) -> None:
        if self.world.first and self.run is not None:
            self.run.event(event, **{"step": self.cursor.step, **facts})


_TWINS: dict[str, Trainer] = {}  # of the Trainers of other processes, by the token of each


def twins() -> Mapping[str, Trainer]:
    """What in this process stands for Trainers of others."""
    return _TWINS


def _twin(token: str, kind: Callable[..., Trainer], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Trainer:
    """The Trainer of this process that stands for another one's, made as that was."""
    if token not in _TWINS:
        _TWINS[token] = kind(*args, **kwargs)
    return _TWINS[token]


def _checked_state(state: dict[str, Any], folder: str) -> dict[str, Any]:
    """What `_save` keeps beside the tensors. Raises CheckpointDamaged where another hand wrote something else."""
    if (
        not all(isinstance(state.get(key), dict) for key in ("cursor", "identity", "extra"))
        or set(cursor := state["cursor"]) != {"step", "samples", "tokens"}
        or not all(type(count) is int and count >= 0 for count in cursor.values())
    ):
        raise CheckpointDamaged(f"the state in {folder} is none of a Trainer; go on from another checkpoint")
    return state
