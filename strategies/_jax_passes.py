"""Forward and backward passes over a global batch: what each shard of the mesh computes, and what is summed.

Each shard runs the user's loss on its own rows, as a rank does elsewhere (jax.shard_map); a `tensor` axis is left to
XLA. All of this is traced: it runs as part of one compiled step.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from unitrain.strategies._jax_batch import Group
from unitrain.strategies._jax_losses import as_loss, check_leads_to_parameters, pair
from unitrain.strategies._jax_mesh import ROWS, DeviceMesh
from unitrain.strategies._jax_model import Definition
from unitrain.strategy import LossFunction

COMPUTE = {"fp32": None, "bf16": jnp.bfloat16}
_GATHERED = "gathered parameter"


class Sums(NamedTuple):
    """Over all rows of a global batch that count."""

    totals: Array  # [sum of losses, sum of weights]
    metrics: dict[str, Array]  # [sum, weight] each
    grads: list[Array]  # of the sum of losses, by each trained variable, cut as it is
    buffers: list[Array]  # as shard 0 has them after its last rows


class Passes:
    """One model's passes. Lists of values run parallel to the definition's variables."""

    def __init__(
        self,
        definition: Definition,
        axes: Sequence[tuple[str | None, ...]],
        mesh: DeviceMesh,
        losses: Mapping[str, LossFunction],
        *,
        precision: str,
        remat: bool,
    ) -> None:
        self.definition, self.mesh, self.losses = definition, mesh, losses
        self.compute = COMPUTE[precision]
        self.row_axes = tuple(axis for axis in ROWS if getattr(mesh.sizes, axis) > 1)
        self.fsdp_axis = [found.index("fsdp") if "fsdp" in found else None for found in axes]
        variables = definition.variables
        self.trained = [number for number, variable in enumerate(variables) if variable.trained]
        self.buffers = [number for number, variable in enumerate(variables) if variable.kind == "buffer"]
        self.known: set[str] = set()  # losses that have returned what they should
        self.around = _remat(gathers=mesh.sizes.fsdp > 1, asked=remat and not definition.remat_by_model)

    def train(self, loss: str, values: Sequence[Array], groups: Sequence[Group], others: Others) -> Sums:
        """Gradients and sums of one update."""

        def on_shard(values: list[Array], groups: Sequence[Group], others: list[list[Array]], shard: Array) -> Sums:
            reached = _reached(self, others_of, others)
            grads = [jnp.zeros_like(values[number]) for number in self.trained]
            buffers = [values[number] for number in self.buffers]
            measured = []
            for group in groups:
                body = functools.partial(self._one, loss, values, reached)
                (grads, buffers), found = _loop(body, (grads, buffers), group)
                measured.append(found)
            totals, metrics = _summed(measured)
            grads = [self._sum_grad(number, grad) for number, grad in zip(self.trained, grads, strict=True)]
            return Sums(self._sum(totals), self._sum(metrics), grads, self._of_first(buffers, shard))

        others_of = list(others)
        cut = self.specs()
        everywhere: Any = PartitionSpec()
        trained: list[Any] = [cut[number] for number in self.trained]
        out = Sums(everywhere, everywhere, trained, everywhere)
        found: Sums = self._on_shards(on_shard, out, values, groups, others)
        return found

    def measure(
        self, loss: str, values: Sequence[Array], groups: Sequence[Group], others: Others
    ) -> tuple[Array, dict[str, Array]]:
        """([sum of losses, sum of weights], metrics) in evaluation mode."""

        def on_shard(values: list[Array], groups: Sequence[Group], others: list[list[Array]], shard: Array) -> Any:
            del shard
            reached = _reached(self, others_of, others)
            whole = [self._whole(number, value) for number, value in enumerate(values)]

            def one(carry: None, rows: dict[str, Array], facts: Array) -> Any:
                return carry, self._measured(loss, whole, rows, facts, reached, training=False)[:2]

            return self._sum(_summed([_loop(one, None, group)[1] for group in groups]))

        others_of = list(others)
        found: tuple[Array, dict[str, Array]] = self._on_shards(on_shard, PartitionSpec(), values, groups, others)
        return found

    def specs(self) -> list[PartitionSpec]:
        """How each variable is cut among shards; what `tensor` cuts, XLA knows."""
        return [PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, "fsdp") for axis in self.fsdp_axis]

    def _on_shards(
        self,
        function: Callable[..., Any],
        out: Any,
        values: Sequence[Array],
        groups: Sequence[Group],
        others: Others,
    ) -> Any:
        """Run a function of (values, groups, values of others, number of the shard) on every shard."""
        shards = jnp.arange(self.mesh.sizes.shards)
        arguments = (list(values), list(groups), list(others.values()), shards)
        if not self.row_axes:
            return function(*arguments)
        rows = PartitionSpec(self.row_axes)
        specs = (self.specs(), rows, [passes.specs() for passes in others], rows)
        return jax.shard_map(
            function,
            mesh=self.mesh.mesh,
            in_specs=specs,
            out_specs=out,
            axis_names=set(self.row_axes),
            check_vma=False,
        )(*arguments)

    def _one(
        self,
        loss: str,
        values: Sequence[Array],
        reached: Reached,
        carry: tuple[list[Array], list[Array]],
        rows: dict[str, Array],
        facts: Array,
    ) -> Any:
        """Add one round's gradients; its sums are what comes beside."""
        grads, buffers = carry

        def total(trained: Sequence[Array]) -> tuple[Array, Any]:
            own = _replaced(_replaced(values, self.buffers, buffers), self.trained, trained)
            whole = [self._whole(number, value) for number, value in enumerate(own)]
            totals, metrics, after = self._measured(loss, whole, rows, facts, reached, training=True)
            return totals[0], (totals, metrics, after)

        trained = [values[number] for number in self.trained]
        if loss not in self.known:
            check_leads_to_parameters(lambda trained: total(trained)[0], trained, loss)
            self.known.add(loss)
        found, (totals, metrics, after) = jax.grad(self.around(total), has_aux=True)(trained)
        grads = [old + new for old, new in zip(grads, found, strict=True)]
        return (grads, after), (totals, metrics)

    def _measured(
        self, name: str, whole: list[Array], rows: dict[str, Array], facts: Array, reached: Reached, *, training: bool
    ) -> tuple[Array, dict[str, Array], list[Array]]:
        """[sum, weight] of the loss and of each metric on this shard's rows, and the buffers afterwards."""
        with _tracing({**reached, self: whole}):
            function = self.losses[name]
            found, after = self.definition.run(lambda model: function(model, rows), whole, facts[:2], training=training)
        loss = as_loss(found, len(next(iter(rows.values()))), name)
        counts = facts[2].astype(jnp.float32)
        metrics = {key: pair(*value) * counts for key, value in loss.metrics.items()}
        variables = self.definition.variables
        buffers = [jnp.asarray(after[number], variables[number].dtype) for number in self.buffers]
        return pair(loss.sum, loss.weight) * counts, metrics, buffers

    def _whole(self, number: int, value: Array) -> Array:
        """A variable as the model computes with it: all of it, in the precision of the run."""
        variable, axis = self.definition.variables[number], self.fsdp_axis[number]
        cast = self.compute is not None and variable.kind == "param" and jnp.issubdtype(variable.dtype, jnp.floating)
        dtype = self.compute if cast else variable.dtype
        return (
            value.astype(dtype)
            if axis is None
            else checkpoint_name(_gather(value, axis, dtype, value.dtype), _GATHERED)
        )

    def _sum(self, tree: Any) -> Any:
        return jax.lax.psum(tree, self.row_axes) if self.row_axes else tree

    def _sum_grad(self, number: int, grad: Array) -> Array:
        """Over all shards; over `fsdp` a cut one was summed when it was cut."""
        cut = self.fsdp_axis[number] is not None
        axes = tuple(axis for axis in self.row_axes if not (cut and axis == "fsdp"))
        return jax.lax.psum(grad, axes) if axes else grad

    def _of_first(self, buffers: list[Array], shard: Array) -> list[Array]:
        """Shard 0's: running statistics differ by shard, and one set is evaluated and saved."""
        if not self.row_axes or not buffers:
            return buffers
        return [self._sum(jnp.where(shard[0] == 0, buffer, jnp.zeros_like(buffer))) for buffer in buffers]


Others = Mapping[Passes, Sequence[Array]]  # other models of the run that a loss may reach: their values, cut
Reached = Mapping[Passes, list[Array]]  # the same, whole
_TRACED: contextvars.ContextVar[Reached] = contextvars.ContextVar("unitrain_traced", default={})  # noqa: B039 - never changed


def traced_values(passes: Passes) -> list[Array] | None:
    """The values that stand for a model while a loss is traced; None outside of that."""
    return _TRACED.get().get(passes)


@contextlib.contextmanager
def _tracing(reached: Reached) -> Iterator[None]:
    token = _TRACED.set(reached)
    try:
        yield
    finally:
        _TRACED.reset(token)


def _reached(own: Passes, others: Sequence[Passes], values: Sequence[Sequence[Array]]) -> Reached:
    """Whole values of the others. XLA leaves out what the loss does not ask for."""
    del own
    return {
        passes: [passes._whole(number, value) for number, value in enumerate(cut)]
        for passes, cut in zip(others, values, strict=True)
    }


def _loop(body: Callable[..., Any], carry: Any, group: Group) -> tuple[Any, Any]:
    """Run `body(carry, rows, facts) -> (carry, found)` over the rounds of a group; (carry, [found of each])."""
    facts = group.facts[0]  # this shard's
    if len(group.arrays) == 1:
        carry, found = body(carry, group.arrays[0], facts[0])
        return carry, jax.tree.map(lambda leaf: leaf[None], found)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *group.arrays)
    return jax.lax.scan(lambda carry, xs: body(carry, *xs), carry, (stacked, facts))


def _summed(measured: Sequence[tuple[Array, dict[str, Array]]]) -> tuple[Array, dict[str, Array]]:
    """Over rounds and groups; a metric may be missing in some."""
    totals = sum((found.sum(0) for found, _ in measured), jnp.zeros(2))
    metrics: dict[str, Array] = {}
    for _, named in measured:
        for name, found in named.items():
            metrics[name] = metrics.get(name, jnp.zeros(2)) + found.sum(0)
    return totals, metrics


def _replaced(values: Sequence[Array], numbers: Sequence[int], others: Sequence[Array]) -> list[Array]:
    found = list(values)
    for number, value in zip(numbers, others, strict=True):
        found[number] = value
    return found


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather(value: Array, axis: int, dtype: Any, own: Any) -> Array:
    """All shards' parts of a parameter. Sent in the precision of the run; gradients are summed in fp32."""
    del own
    whole: Array = jax.lax.all_gather(value.astype(dtype), "fsdp", axis=axis, tiled=True)
    return whole


def _gather_forward(value: Array, axis: int, dtype: Any, own: Any) -> tuple[Array, None]:
    return _gather(value, axis, dtype, own), None


def _gather_backward(axis: int, dtype: Any, own: Any, _: None, grad: Array) -> tuple[Array]:
    del dtype
    whole = jax.lax.psum_scatter(grad.astype(jnp.float32), "fsdp", scatter_dimension=axis, tiled=True)
    return (whole.astype(own),)


_gather.defvjp(_gather_forward, _gather_backward)


def _remat(*, gathers: bool, asked: bool) -> Callable[[Any], Any]:
    """What the backward pass computes again: gathered parameters always, all but matrix products where asked."""
    if asked:
        return functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
    if gathers:
        policy = jax.checkpoint_policies.save_anything_except_these_names(_GATHERED)
        return functools.partial(jax.checkpoint, policy=policy)
    return lambda function: function
