"""One optimizer step in JAX as one compiled program, and an engine around it: the whole update, traced once.

Parameters and moments are given away (donated) to the step that replaces them; what it found stays on the devices
until somebody reads it.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

from unitrain.batch import Batch
from unitrain.errors import UserError
from unitrain.models.layout import SAME
from unitrain.recipe import Recipe
from unitrain.strategies import _jax_state
from unitrain.strategies._jax_batch import Group, Grouping
from unitrain.strategies._jax_mesh import DeviceMesh, local_boxes
from unitrain.strategies._jax_model import Definition, Variable
from unitrain.strategies._jax_optimizer import Optimizer, State, make_optimizer
from unitrain.strategies._jax_passes import Passes, traced_values
from unitrain.strategies._jax_ranks import Ranks
from unitrain.strategies._jax_state import Place
from unitrain.strategy import Engine, HyperParameters, LoadReport, Metrics, Role, Shard, ShardReader, StepOut

_AHEAD = 8  # batches that an evaluation sends to the devices before it looks at the first one's sums


class JaxStepOut(StepOut):
    """What one update left on the devices; the same on all of them."""

    def __init__(self, found: Mapping[str, Array], metrics: Mapping[str, Array], ranks: Ranks) -> None:
        self._found, self._metrics, self._ranks = found, metrics, ranks

    @property
    def loss(self) -> Array:
        """Mean loss over the global batch, a scalar on this rank's first device."""
        return self._found["loss"].addressable_data(0)

    def read(self) -> dict[str, float]:
        """See StepOut. No collective: what there was to sum, the step has summed."""
        with self._ranks.noticing_losses():
            values = {name: float(_local(value)) for name, value in self._found.items()}
            pairs = {name: _local(value).tolist() for name, value in self._metrics.items()}
        values.update({name: amount / weight for name, (amount, weight) in pairs.items() if weight})
        return values


class JaxEngine(Engine):
    """One model and its optimizer, cut over a mesh of devices."""

    def __init__(
        self,
        definition: Definition,
        role: Role,
        seed: int,
        recipe: Recipe,
        mesh: DeviceMesh,
        ranks: Ranks,
        peers: list[JaxEngine],
    ) -> None:
        self.definition, self.role, self.mesh, self.ranks = definition, role, mesh, ranks
        self._peers = peers  # all engines of the run, whose models a loss may reach
        variables = definition.variables
        self.axes = [
            mesh.axes_of(variable.shape, variable.tensor_axis) if variable.kind == "param" else ()
            for variable in variables
        ]
        self.shardings = [mesh.sharding(axes) for axes in self.axes]
        self.passes = Passes(
            definition,
            self.axes,
            mesh,
            role.losses,
            precision=recipe.train.precision,
            remat=bool(recipe.strategy.options.get("remat")),
        )
        self.grouping = Grouping(mesh, random=definition.random)
        self.values = self._first_values(seed)
        self.trained = self.passes.trained
        if role.optimizer is not None and not self.trained:
            raise UserError("a role has an optimizer but its model has no trainable parameter; use optimizer: None")
        self.moments: State = None
        self.optimizer = self._make_optimizer(recipe)
        self._programs: dict[Any, Callable[..., Any]] = {}

    @property
    def model(self) -> Any:
        """The native model in training mode, with the values of now; a loss of any role sees those of its step."""
        values = traced_values(self.passes)
        return self.definition.model(self.values if values is None else values, training=True)

    def update(self, batch: Batch, hp: HyperParameters, loss: str = "loss") -> JaxStepOut:
        """See Engine."""
        if self.optimizer is None:
            raise UserError("this role has no optimizer, so it cannot be updated; give Role(optimizer=...)")
        groups = self.grouping.groups(batch.micro())
        numbers = np.array([hp.lr, np.inf if hp.clip is None else hp.clip], np.float32)
        with self.ranks.noticing_losses():
            (self.values, self.moments), found, metrics = self._program(self._step, loss, donated=(0,))(
                (self.values, self.moments), groups, self._others(), numbers
            )
        return JaxStepOut(found, metrics, self.ranks)

    def _step(
        self,
        loss: str,
        state: tuple[list[Array], State],
        groups: Sequence[Group],
        others: list[list[Array]],
        numbers: Array,
    ) -> Any:
        """The update as a pure function: what `unitrain.strategy` defines, in the same order."""
        assert self.optimizer is not None, "checked by update"
        values, moments = state
        lr, clip = numbers[0], numbers[1]
        sums = self.passes.train(loss, values, groups, dict(zip(self._other_passes(), others, strict=True)))
        inverse = 1.0 / sums.totals[1]
        squares = [jnp.sum(jnp.square(grad.astype(jnp.float32))) for grad in sums.grads]
        norm = jnp.sqrt(jnp.sum(jnp.stack(squares))) * inverse
        skip = ~jnp.isfinite(norm)
        factor = jnp.minimum(clip / (norm + 1e-6), 1.0) * inverse
        grads = [grad * factor for grad in sums.grads]
        trained = [values[number] for number in self.trained]
        # A parameter that the loss does not depend on stays as it is, moments and count too.
        skips = [skip if reached else jnp.bool_(True) for reached in self.passes.reached[loss]]
        moved, moments = self.optimizer.apply(trained, grads, moments, lr, skips)
        new = list(values)
        for number, value in zip(self.trained, moved, strict=True):
            new[number] = value
        for number, value in zip(self.passes.buffers, sums.buffers, strict=True):
            new[number] = jnp.where(skip, values[number], value)
        values_of_step = {
            "loss": sums.totals[0] * inverse,
            "weight": sums.totals[1],
            "grad_norm": norm,
            "applied": 1.0 - skip,
        }
        return (new, moments), values_of_step, sums.metrics

    def evaluate(self, batches: Iterable[Batch], loss: str = "loss") -> Metrics:
        """See Engine."""
        sums: dict[str, NDArray[np.float64]] = {"loss": np.zeros(2)}
        waiting: deque[dict[str, Array]] = deque()

        def take() -> None:
            for name, value in waiting.popleft().items():
                sums[name] = sums.get(name, np.zeros(2)) + _local(value)

        program = self._program(self._measure, loss)
        with self.ranks.noticing_losses():
            for batch in batches:
                waiting.append(program(self.values, self.grouping.groups(batch.micro()), self._others()))
                if len(waiting) > _AHEAD:
                    take()
            while waiting:
                take()
        return {name: (float(value[0]), float(value[1])) for name, value in sums.items()}

    def _measure(
        self, loss: str, values: list[Array], groups: Sequence[Group], others: list[list[Array]]
    ) -> dict[str, Array]:
        totals, metrics = self.passes.measure(
            loss, values, groups, dict(zip(self._other_passes(), others, strict=True))
        )
        return {"loss": totals, **metrics}

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """See Engine. The function gets the whole model on this rank's first device, as ordinary arrays."""
        with self.ranks.noticing_losses(), jax.default_device(self.mesh.local[0]):
            whole = self._program(self._whole, None)(self.values)
            model = self.definition.model([value.addressable_data(0) for value in whole], training=False)
            return function(model, *args)

    def _whole(self, _: None, values: list[Array]) -> list[Array]:
        """Every variable in the precision of the run."""
        compute = self.passes.compute
        return [
            value.astype(compute)
            if compute is not None and variable.kind == "param" and jnp.issubdtype(variable.dtype, jnp.floating)
            else value
            for variable, value in zip(self.definition.variables, values, strict=True)
        ]

    def shards(self, kinds: Collection[str] | None = None) -> Iterator[Shard]:
        """See Engine."""
        places = [place for place in self._places() if kinds is None or place.kind in kinds]
        with self.ranks.noticing_losses():
            yield from _jax_state.write(places, local_boxes, first=self.ranks.rank == 0)

    def load(self, reader: ShardReader, kinds: Collection[str] | None = None) -> LoadReport:
        """See Engine."""
        return _jax_state.load(list(self._places()), reader, kinds)

    def digest(self) -> dict[str, int]:
        """See Engine."""
        first = self.ranks.rank == 0
        with self.ranks.noticing_losses():
            mine = {
                place.name: _jax_state.digest_of(place, local_boxes, first=first)
                for place in self._places()
                if place.kind in ("param", "buffer")
            }
        parts = self.ranks.gather(mine)
        return {name: sum(part[name] for part in parts) % 2**64 for name in mine}

    def replicas(self) -> dict[str, list[int]]:
        """See Engine."""
        with self.ranks.noticing_losses():
            found = {f"{place.kind} {place.name}": _jax_state.replica_digest_of(place) for place in self._places()}
        mine = {name: digest for name, digest in found.items() if digest is not None and not name.startswith("buffer ")}
        parts = self.ranks.gather(mine)
        return {name: [part[name] for part in parts] for name in mine}

    def _places(self) -> Iterator[Place]:
        """Every tensor of the state that a checkpoint holds."""

        def put_value(number: int, array: Array) -> None:
            self.values[number] = array

        def put_moment(leaf: int, array: Array) -> None:
            leaves, tree = jax.tree.flatten(self.moments)
            self.moments = jax.tree.unflatten(tree, [*leaves[:leaf], array, *leaves[leaf + 1 :]])

        for number, variable in enumerate(self.definition.variables):
            kept = self.role.checkpoint == "all" or variable.kind != "param" or variable.trained
            if variable.kind != "constant" and kept:
                put = functools.partial(put_value, number)
                yield Place(variable.kind, variable.name, self.values[number], variable.turn, put)
        if self.optimizer is None:
            return
        leaves = jax.tree.leaves(self.moments)
        for slot in self.optimizer.slots():
            turn = SAME if slot.param is None else self.definition.variables[self.trained[slot.param]].turn
            put = functools.partial(put_moment, slot.leaf)
            yield Place(slot.kind, slot.name, leaves[slot.leaf], turn, put, slot.element)

    def _program(
        self, function: Callable[..., Any], loss: str | None, *, donated: tuple[int, ...] = ()
    ) -> Callable[..., Any]:
        """The function compiled for a loss, and for the models that there are by now."""
        if loss is not None and loss not in self.role.losses:
            raise UserError(f"the role has no loss {loss!r}; it has {', '.join(self.role.losses) or 'none'}")
        key = (function.__name__, loss, len(self._peers))
        if key not in self._programs:
            everywhere = self.mesh.replicated
            out: Any = everywhere
            if function == self._step:
                out = ((self.shardings, self._moment_shardings), everywhere, everywhere)
            self._programs[key] = jax.jit(functools.partial(function, loss), donate_argnums=donated, out_shardings=out)
        return self._programs[key]

    def _others(self) -> list[list[Array]]:
        return [engine.values for engine in self._peers if engine is not self]

    def _other_passes(self) -> list[Passes]:
        return [engine.passes for engine in self._peers if engine is not self]

    def _make_optimizer(self, recipe: Recipe) -> Optimizer | None:
        """What moves the parameters, and its state, born as they are cut."""
        if self.role.optimizer is None:
            return None
        params = [self.values[number] for number in self.trained]
        variables: list[Variable] = [self.definition.variables[number] for number in self.trained]
        shapes = [jax.ShapeDtypeStruct(variable.shape, variable.dtype) for variable in variables]
        optimizer = make_optimizer(self.role.optimizer, variables, shapes, recipe.optimizer.lr)
        leaves, tree = jax.tree.flatten(jax.eval_shape(optimizer.state, shapes))
        found = [self.mesh.replicated] * len(leaves)
        for slot in optimizer.slots():
            if slot.param is not None:
                found[slot.leaf] = self.shardings[self.trained[slot.param]]
        self._moment_shardings = jax.tree.unflatten(tree, found)
        self.moments = jax.jit(optimizer.state, out_shardings=self._moment_shardings)(params)
        return optimizer

    def _first_values(self, seed: int) -> list[Array]:
        """Values of the role's `initial` for parameters; what else there is, the model makes itself."""
        variables, initial = self.definition.variables, self.role.initial
        by_model = [number for number, variable in enumerate(variables) if initial is None or variable.kind != "param"]
        made = dict(zip(by_model, self.definition.first_values(by_model) if by_model else [], strict=True))
        found = []
        for number, (variable, sharding) in enumerate(zip(variables, self.shardings, strict=True)):
            if number in made:
                whole = np.asarray(made.pop(number))
            else:
                assert initial is not None, "else the model has made it"
                canonical = initial(variable.name, variable.turn.canonical_shape(variable.shape), seed)
                whole = variable.turn.to_native(canonical, variable.shape).astype(variable.dtype)
            found.append(_jax_state.from_parts(variable.shape, sharding, whole.__getitem__))
        return found


def _local(array: Array) -> NDArray[Any]:
    """What every device holds all of."""
    return np.asarray(array.addressable_data(0))
