"""One optimizer step as one graph, evaluation, and calls of the model, in TensorFlow.

A step's micro-batches are the arguments of one `tf.function`; their gradients are added up in it, summed over the
ranks, clipped, checked and applied. It is traced once for each loss and set of shapes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from unitrain.batch import Batch, MicroBatch
from unitrain.errors import UnitrainError, UserError
from unitrain.losses import ArrayKind, as_loss, check_parts
from unitrain.models.state_keras import seed_values
from unitrain.recipe import Recipe
from unitrain.strategies._tensorflow_models import Bound
from unitrain.strategies._tensorflow_optimizer import make_optimizer
from unitrain.strategies._tensorflow_ranks import Ranks
from unitrain.strategies._tensorflow_state import State
from unitrain.strategy import (
    Engine,
    HyperParameters,
    LoadReport,
    LossFunction,
    Metrics,
    Role,
    Shard,
    ShardReader,
    StepOut,
)

Arrays = Mapping[str, Any]
TENSORS = ArrayKind("Tensor", tf.is_tensor)


class TensorFlowStepOut(StepOut):
    """The numbers of one update, in one tensor: loss sum, weight, norm, applied, then each metric's sum and weight."""

    def __init__(self, numbers: Any, metrics: Sequence[str]) -> None:
        self.numbers, self.metrics = numbers, metrics

    @property
    def loss(self) -> Any:
        """Mean loss over the global batch, a device scalar."""
        return self.numbers[0] / self.numbers[1]

    def read(self) -> dict[str, float]:
        """See StepOut."""
        total, weight, norm, applied, *pairs = self.numbers.numpy().tolist()
        values = {
            "loss": total / weight if weight else float("nan"),
            "weight": weight,
            "grad_norm": norm,
            "applied": applied,
        }
        for name, amount, count in zip(self.metrics, pairs[::2], pairs[1::2], strict=True):
            if count:
                values[name] = amount / count
        return values


class TensorFlowEngine(Engine):
    """One model, held whole by every rank, and its optimizer."""

    def __init__(self, bound: Bound, role: Role, ranks: Ranks, recipe: Recipe, *, jit: bool) -> None:
        self.bound, self.model, self.role, self.ranks, self.jit = bound, bound.model, role, ranks, jit
        if role.optimizer is not None and not bound.params:
            raise UserError("a role has an optimizer but its model has no trainable parameter; use optimizer: None")
        self.optimizer = (
            None if role.optimizer is None else make_optimizer(role.optimizer, bound.params, recipe.optimizer.lr)
        )
        self.state = State(bound, self.optimizer, ranks)
        self.passes = {name: Pass(name, function, bound) for name, function in role.losses.items()}
        self._updates = {name: self._graph(self._update, name) for name in role.losses}
        self._measures = {name: self._graph(self._measure, name) for name in role.losses}
        self._broadcast = tf.function(self._shared, autograph=False)
        if ranks.size > 1 and role.initial is None:
            self._share([held.variable for held in bound.params])
        self._share_buffers()

    def update(self, batch: Batch, hp: HyperParameters, loss: str = "loss") -> TensorFlowStepOut:
        """See Engine."""
        if self.role.optimizer is None:
            raise UserError("this role has no optimizer, so it cannot be updated; give Role(optimizer=...)")
        micros = batch.micro()
        rates = np.array([hp.lr, np.inf if hp.clip is None else hp.clip])
        self.bound.train(True)
        with self.ranks.together():
            out = self._updates[loss](
                [micro.arrays for micro in micros],
                np.array([not micro.filler for micro in micros], dtype=np.float32),
                self._seeds(micros),
                rates,
            )
        return TensorFlowStepOut(out, self.passes[loss].metrics)

    def evaluate(self, batches: Iterable[Batch], loss: str = "loss") -> Metrics:
        """See Engine."""
        sums: Any = None
        self._forward_only()
        for batch in batches:
            for micro in batch.micro():
                found = self._measures[loss](micro.arrays, np.float32(not micro.filler), self._seeds([micro])[0])
                sums = found if sums is None else sums + found
        own = [0.0, 0.0] if sums is None else sums.numpy().tolist()
        whole = np.sum(self.ranks.meeting.gather(own), axis=0)  # in fp64: JSON keeps every bit
        pairs = [(float(amount), float(weight)) for amount, weight in whole.reshape(-1, 2)]
        return dict(zip(("loss", *self.passes[loss].metrics), pairs, strict=True))

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """See Engine."""
        self._forward_only()
        return function(self.model, *args)

    def shards(self, kinds: Collection[str] | None = None) -> Iterator[Shard]:
        """See Engine."""
        self._share_buffers()
        yield from self.state.shards(kinds)

    def load(self, reader: ShardReader, kinds: Collection[str] | None = None) -> LoadReport:
        """See Engine."""
        return self.state.load(reader, kinds)

    def digest(self) -> dict[str, int]:
        """See Engine."""
        self._share_buffers()
        return self.state.digest()

    def replicas(self) -> dict[str, list[int]]:
        """See Engine."""
        return self.state.replicas()

    # Graphs.

    def _graph(self, function: Callable[..., Any], loss: str) -> Any:
        """`function(pass, ...)` as a graph; a Python number in its arguments would be traced anew, a tensor is not."""
        return tf.function(lambda *args: function(self.passes[loss], *args), autograph=False)

    def _update(self, passing: Pass, micros: list[Arrays], scales: Any, seeds: Any, rates: Any) -> Any:
        """Gradients, their sum over the ranks, then clip, check and move."""

        def summed(*args: Any) -> Any:
            totals, grads = self._compiled(passing.accumulate)(*args)
            if self.ranks.size == 1:
                return totals, grads
            # Last layers first, whose gradients are there first; a flat tensor is cut up again below.
            flat = [tf.reshape(grad, [-1]) for grad in reversed(grads)]
            *flat, totals = self.ranks.sum([*flat, totals])
            shaped = [tf.reshape(part, grad.shape) for part, grad in zip(reversed(flat), grads, strict=True)]
            return totals, shaped

        totals, grads = self.ranks.run(summed, micros, scales, seeds)
        norm, applied = self._compiled(self._apply, passing)(totals, grads, rates)
        return tf.concat([totals[:2], [norm, applied], totals[2:]], 0)

    def _apply(self, passing: Pass, totals: Any, grads: list[Any], rates: Any) -> tuple[Any, Any]:
        """L2 norm of the gradient of the mean, and 1 where the update was applied, else 0."""
        inverse = 1 / totals[1]
        norm = tf.sqrt(2 * tf.add_n([tf.nn.l2_loss(grad) for grad in grads])) * inverse
        sound = tf.math.is_finite(norm)
        factor = inverse * tf.minimum(1.0, tf.cast(rates[1], tf.float32) / (norm + 1e-6))

        def move() -> Any:
            assert self.optimizer is not None, "checked by update"
            self.optimizer.apply(passing.spread([grad * factor for grad in grads]), rates[0])
            return tf.constant(1.0)

        return norm, tf.cond(sound, move, lambda: tf.constant(0.0))

    def _measure(self, passing: Pass, arrays: Arrays, scale: Any, seeds: Any) -> Any:
        return tf.cast(self.ranks.run(lambda *args: passing.totals(*args)[1], arrays, scale, seeds), tf.float64)

    def _compiled(self, function: Callable[..., Any], *first: Any) -> Callable[..., Any]:
        """The function of tensors, compiled by XLA where the recipe asks for it."""

        def bound(*args: Any) -> Any:
            return function(*first, *args)

        return tf.function(bound, autograph=False, jit_compile=True) if self.jit else bound

    def _seeds(self, micros: Sequence[MicroBatch]) -> NDArray[np.int64]:
        """(micro-batches, generators, 2): randomness is a function of the key; nothing to save."""
        return np.stack([seed_values(micro.key, len(self.bound.seeds)) for micro in micros])

    # What ranks have in common.

    def _forward_only(self) -> None:
        self.bound.train(False)
        self._share_buffers()

    def _share_buffers(self) -> None:
        """Rank 0's buffers everywhere: running statistics differ by rank, and one set is evaluated and saved."""
        self._share([held.variable for held in self.bound.buffers])

    def _share(self, variables: list[tf.Variable]) -> None:
        if self.ranks.size > 1 and variables:
            with self.ranks.together():
                self._broadcast(variables)

    def _shared(self, variables: list[tf.Variable]) -> None:
        self.ranks.run(lambda: self.ranks.broadcast(variables))


class Pass:
    """One loss function of a role, forward and backward, as parts of a graph."""

    def __init__(self, name: str, function: LossFunction, bound: Bound) -> None:
        self.name, self.bound = name, bound
        self.function = _converted(function)
        self.metrics: list[str] = []  # known once it was traced
        self.reached: list[bool] = []  # of each parameter, whether the loss depends on it

    def accumulate(self, micros: list[Arrays], scales: Any, seeds: Any) -> tuple[Any, list[Any]]:
        """Totals, and the gradients of the sum, over all micro-batches: those alike run as one loop of the graph."""
        sums: tuple[Any, list[Any]] | None = None
        for begin, end in _alike(micros):
            if sums is None:
                sums = self.gradients(micros[begin], scales[begin], seeds[begin])
                begin += 1
            if end - begin == 1:
                sums = _added(sums, self.gradients(micros[begin], scales[begin], seeds[begin]))
            elif end > begin:
                sums = self._loop(micros[begin:end], scales[begin:end], seeds[begin:end], sums)
        assert sums is not None, "a batch has a micro-batch"
        return sums

    def _loop(self, micros: list[Arrays], scales: Any, seeds: Any, sums: tuple[Any, list[Any]]) -> Any:
        stacked = {name: tf.stack([micro[name] for micro in micros]) for name in micros[0]}

        def body(number: Any, sums: Any) -> Any:
            arrays = {name: values[number] for name, values in stacked.items()}
            return number + 1, _added(sums, self.gradients(arrays, scales[number], seeds[number]))

        _, sums = tf.while_loop(
            lambda number, _: number < len(micros), body, (tf.constant(0), sums), parallel_iterations=1
        )
        return sums

    def gradients(self, arrays: Arrays, scale: Any, seeds: Any) -> tuple[Any, list[Any]]:
        """Totals of one micro-batch, and the gradient of its sum for each parameter that the loss reaches."""
        variables = [held.variable for held in self.bound.params]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(variables)
            total, totals = self.totals(arrays, scale, seeds)
        grads = tape.gradient(total, variables)
        self.reached = [grad is not None for grad in grads]
        if not any(self.reached):
            raise UserError(
                f"the loss function {self.name!r} returned a loss that no trainable parameter leads to; compute it "
                "from the model's output, without tf.stop_gradient or numpy"
            )
        return totals, [tf.cast(tf.convert_to_tensor(grad), tf.float32) for grad in grads if grad is not None]

    def spread(self, grads: list[Any]) -> list[Any]:
        """Gradients as `gradients` gave them, with None for every parameter that the loss does not reach."""
        given = iter(grads)
        return [next(given) if reached else None for reached in self.reached]

    def totals(self, arrays: Arrays, scale: Any, seeds: Any) -> tuple[Any, Any]:
        """The loss sum, and [sum, weight] of the loss and of each metric, in fp32; all times `scale`."""
        for number, state in enumerate(self.bound.seeds):
            state.assign(tf.cast(seeds[number], state.dtype))
        rows = next(iter(arrays.values())).shape[0]
        loss = as_loss(self.function(self.bound.model, arrays), rows, self.name, TENSORS)
        check_parts(loss, self.name, TENSORS)
        self.metrics = sorted(loss.metrics)
        pairs = [(loss.sum, loss.weight), *(loss.metrics[name] for name in self.metrics)]
        flat = [tf.cast(amount, tf.float32) for pair in pairs for amount in pair]
        return flat[0] * scale, tf.stack(flat) * scale


def _converted(function: LossFunction) -> LossFunction:
    """As the user's own tf.function would run it: `if` and `for` over tensors, and `len` of one, work."""

    def call(model: Any, batch: Arrays) -> Any:
        return function(model, batch)

    converted = tf.autograph.to_graph(call)

    def told(model: Any, batch: Arrays) -> Any:
        try:
            return converted(model, batch)
        except UnitrainError:
            raise
        except Exception as error:
            if not hasattr(error, "ag_error_metadata"):
                raise
            # In the user's own lines, not in those that AutoGraph has written.
            raise error.ag_error_metadata.to_exception(error) from None

    return told


class _Kind(NamedTuple):
    """What micro-batches of one kind have in common: they can be stacked."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]


def _alike(micros: Sequence[Arrays]) -> Iterator[tuple[int, int]]:
    """(begin, end) of runs of micro-batches that can be stacked."""

    def kind(number: int) -> _Kind:
        arrays = micros[number]
        shapes = tuple(tuple(array.shape) for array in arrays.values())
        return _Kind(tuple(arrays), shapes, tuple(array.dtype.name for array in arrays.values()))

    for _, members in itertools.groupby(range(len(micros)), key=kind):
        found = list(members)
        yield found[0], found[-1] + 1


def _added(ours: tuple[Any, list[Any]], theirs: tuple[Any, list[Any]]) -> tuple[Any, list[Any]]:
    return ours[0] + theirs[0], [a + b for a, b in zip(ours[1], theirs[1], strict=True)]
