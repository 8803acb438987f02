"""The JAX engine on one device: what a step computes, what it refuses, and what reaches a checkpoint."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest

from unitrain.batch import Batch, MicroBatch
from unitrain.errors import DataError, UserError
from unitrain.recipe import OptimizerRecipe, Recipe, StrategyRecipe, TrainRecipe
from unitrain.strategy import HyperParameters, Loss, Role
from unitrain.world import World

if importlib.util.find_spec("flax") is None:
    pytest.skip("JAX and Flax are not installed", allow_module_level=True)

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from unitrain.strategies._jax_engine import JaxEngine
from unitrain.strategies.jax import Jax

HP, ADAMW = HyperParameters(1e-2, None), OptimizerRecipe(lr=1e-2)
DRAW = np.random.default_rng(3)
ROWS = {
    "x": DRAW.standard_normal((12, 4)).astype(np.float32),
    "y": DRAW.standard_normal((12, 2)).astype(np.float32),
}
Rows = Mapping[str, Any]


class Net(nnx.Module):
    """Two layers, dropout, a running mean, an array that is no variable, and a parameter that nothing uses."""

    def __init__(self, rate: float = 0.0) -> None:
        rngs = nnx.Rngs(5)
        self.first = nnx.Linear(4, 3, rngs=rngs)
        self.last = nnx.Linear(3, 2, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.unused = nnx.Param(jnp.ones(5))
        self.mean = nnx.BatchStat(jnp.zeros(4))
        self.scale = jnp.full((), 2.0)

    def __call__(self, x: jax.Array) -> jax.Array:
        self.mean[...] = 0.5 * self.mean[...] + 0.5 * x.mean(axis=0)
        out: jax.Array = self.last(self.dropout(jnp.tanh(self.first(x)))) * self.scale
        return out


def squares(model: Any, rows: Rows) -> Loss:
    return Loss(jnp.square(model(rows["x"]) - rows["y"]).sum(), len(rows["x"]))


Bind = Callable[..., JaxEngine]


@pytest.fixture
def bind() -> Iterator[Bind]:
    opened: list[Jax] = []

    def make(
        model: Any = Net,
        loss: Any = squares,
        optimizer: Any = ADAMW,
        precision: str = "fp32",
        **options: Any,
    ) -> JaxEngine:
        recipe = Recipe(
            trainer="a:B",
            optimizer=ADAMW,
            train=TrainRecipe(global_batch=12, precision=precision),
            strategy=StrategyRecipe(name="jax", options=options),
        )
        strategy = Jax(recipe)
        strategy.open(World())
        opened.append(strategy)
        return strategy.bind(Role(model=model, losses={"loss": loss}, optimizer=optimizer), 0)

    yield make
    for strategy in opened:
        strategy.close()


def batch(*sizes: int, step: int = 0, rows: Rows = ROWS) -> Batch:
    """The twelve rows in micro-batches of those sizes; a negative size is of a filler."""
    micros, begin = [], 0
    for number, size in enumerate(sizes or (12,)):
        chosen = {name: array[begin : begin + abs(size)] for name, array in rows.items()}
        micros.append(MicroBatch(chosen, abs(size), 1000 * step + number, filler=size < 0))
        begin += max(size, 0)
    return Batch(step, np.arange(12), lambda: micros)


def state(engine: JaxEngine) -> dict[tuple[str, str], Any]:
    return {(shard.kind, shard.name): np.array(shard.data) for shard in engine.shards()}


def test_micro_batches_and_fillers_change_nothing(bind: Bind) -> None:
    whole, cut = bind(), bind()
    for step in range(3):
        once = whole.update(batch(step=step), HP).read()
        assert cut.update(batch(5, 5, -5, 2, step=step), HP).read() == pytest.approx(once, rel=1e-5)
    for pair, value in state(whole).items():
        if pair != ("buffer", "mean"):  # which follows the micro-batches
            np.testing.assert_allclose(value, state(cut)[pair], rtol=1e-4, atol=1e-6, err_msg=str(pair))


def test_a_checkpoint_has_params_buffers_and_moments_and_nothing_else(bind: Bind) -> None:
    engine = bind()
    engine.update(batch(), HP)
    params = {"first.kernel", "first.bias", "last.kernel", "last.bias", "unused"}
    wanted = {(kind, name) for kind in ("param", "adamw.m", "adamw.v", "adamw.step") for name in params}
    found = state(engine)
    assert set(found) == wanted | {("buffer", "mean")}
    np.testing.assert_allclose(found["buffer", "mean"], 0.5 * ROWS["x"].mean(axis=0), rtol=1e-5)
    assert found["adamw.step", "unused"] == 1


def test_evaluation_and_calls_change_nothing_and_are_in_evaluation_mode(bind: Bind) -> None:
    engine = bind(lambda: Net(rate=0.9))
    before = state(engine)
    (amount, weight), again = engine.evaluate([batch(6, 6)])["loss"], engine.evaluate([batch()])["loss"]
    assert weight == 12
    assert again[0] == pytest.approx(amount, rel=1e-5), "dropout is off"
    assert engine.call(lambda model, x: (model.dropout.deterministic, model(x).shape), ROWS["x"]) == (True, (12, 2))
    assert all(value.tobytes() == before[pair].tobytes() for pair, value in state(engine).items())


def test_dropout_follows_the_key_of_the_micro_batch(bind: Bind) -> None:
    losses = []
    for step in (1, 2, 1):
        losses.append(bind(lambda: Net(rate=0.5)).update(batch(6, 6, step=step), HP).read()["loss"])
    assert losses[0] == losses[2] != losses[1]


def test_a_non_finite_gradient_changes_nothing(bind: Bind) -> None:
    engine = bind()
    engine.update(batch(), HP)
    before = state(engine)
    poisoned = ROWS | {"x": np.where(np.arange(12)[:, None] == 7, np.inf, ROWS["x"]).astype(np.float32)}
    assert engine.update(batch(4, 4, 4, rows=poisoned), HP).read()["applied"] == 0
    assert all(value.tobytes() == before[pair].tobytes() for pair, value in state(engine).items())


def test_bf16_computes_in_bf16_and_keeps_fp32(bind: Bind) -> None:
    seen = []

    def loss(model: Any, rows: Rows) -> Loss:
        seen.append(model.first.kernel[...].dtype)
        return squares(model, rows)

    engine, exact = bind(loss=loss, precision="bf16"), bind()
    found, wanted = engine.update(batch(), HP).read()["loss"], exact.update(batch(), HP).read()["loss"]
    assert set(seen) == {jnp.dtype(jnp.bfloat16)}
    assert found != wanted
    assert found == pytest.approx(wanted, rel=2e-2)
    assert {value.dtype for value in state(engine).values()} == {np.dtype(np.float32)}


def test_recomputing_changes_no_loss(bind: Bind) -> None:
    curves = []
    for remat in (False, True):
        engine = bind(remat=remat)
        curves.append([engine.update(batch(6, 6, step=step), HP).read()["loss"] for step in range(4)])
    assert curves[0] == pytest.approx(curves[1], rel=1e-6)


def test_the_schedule_scales_an_optimizer_of_optax(bind: Bind) -> None:
    full, half = (bind(optimizer=lambda params: optax.sgd(1e-2)) for _ in range(2))
    before = state(full)
    full.update(batch(), HyperParameters(1e-2, None))
    half.update(batch(), HyperParameters(5e-3, None))
    for pair, value in before.items():
        if pair[0] == "param":
            np.testing.assert_allclose(state(full)[pair] - value, 2 * (state(half)[pair] - value), atol=1e-6)


def test_the_same_program_serves_every_rate_and_clip(bind: Bind) -> None:
    traced = []

    def loss(model: Any, rows: Rows) -> Loss:
        traced.append(1)
        return squares(model, rows)

    engine = bind(loss=loss)
    engine.update(batch(), HP).read()
    times = len(traced)
    for rate, clip in ((1e-3, 0.1), (2e-3, None), (0.0, 1.0)):
        engine.update(batch(), HyperParameters(rate, clip)).read()
    assert len(traced) == times


def test_flax_linen_variables_are_trained_in_part(bind: Bind) -> None:
    values = {"params": {"w": jnp.ones((4, 2))}, "stats": {"n": jnp.zeros(2)}}
    engine = bind(pair_of(values))
    engine.update(batch(), HP)
    assert {pair for pair in state(engine) if pair[0] in ("param", "buffer")} == {
        ("param", "params.w"),
        ("buffer", "stats.n"),
    }


def pair_of(values: Any) -> Callable[[], Any]:
    def apply(values: Any, x: jax.Array) -> Any:
        return x @ values["params"]["w"] + values["stats"]["n"]

    return lambda: (lambda key: values, apply)


@pytest.mark.parametrize(
    ("loss", "told"),
    [
        (lambda model, rows: model(rows["x"]), r"returned a jax.Array of shape \(5, 2\); return a scalar array"),
        (lambda model, rows: 3.0, "returned a float; return a scalar array"),
        (lambda model, rows: Loss(3.0, 1), "returned a Loss; return a scalar array"),
        (lambda model, rows: Loss(model(rows["x"]).sum(), rows["x"][0]), r"returned a weight of shape \(4,\)"),
        (lambda model, rows: Loss(model(rows["x"]).sum(), "many"), "returned a weight, a str; return a scalar"),
        (lambda model, rows: Loss(model(rows["x"]).sum(), 1, {"loss": (1, 1)}), "a metric named 'loss', which every"),
        (lambda model, rows: Loss(model(rows["x"]).sum(), 1, {"a": 1}), r"the metric 'a' as a int; return the pair"),
        (
            lambda model, rows: Loss(model(rows["x"]).sum(), 1, {"a": (rows["x"], 1)}),
            "returned a sum of the metric 'a'",
        ),
        (lambda model, rows: jnp.square(rows["x"]).mean(), "returned a loss that no trainable parameter leads to"),
    ],
)
def test_a_loss_that_cannot_be_used_is_refused_in_one_sentence(bind: Bind, loss: Any, told: str) -> None:
    with pytest.raises(UserError, match=told):
        bind(loss=loss).update(batch(5, 5, 2), HP)


def test_models_and_optimizers_that_cannot_be_used_are_refused(bind: Bind) -> None:
    with pytest.raises(UserError, match="build_model returned a dict; the jax strategy needs"):
        bind(model=dict)
    with pytest.raises(UserError, match="returned a str; the jax strategy needs an optax"):
        bind(optimizer=lambda params: "adam")
    with pytest.raises(UserError, match="no trainable parameter; use optimizer: None"):
        bind(model=lambda: nnx.Dropout(0.1))
    with pytest.raises(UserError, match="the role has no loss 'other'; it has loss"):
        bind().update(batch(), HP, loss="other")
    with pytest.raises(UserError, match="this role has no optimizer"):
        bind(optimizer=None).update(batch(), HP)


def test_numbers_that_32_bits_cannot_hold_are_refused(bind: Bind) -> None:
    large = ROWS | {"id": np.arange(12) + 2**31}
    with pytest.raises(DataError, match="'id' holds 2147483659, which JAX cannot hold in 32 bits"):
        bind().update(batch(rows=large), HP)
