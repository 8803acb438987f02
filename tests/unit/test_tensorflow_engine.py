"""The TensorFlow engine on one rank: what a step computes, what it refuses, and what it keeps from step to step."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from unitrain.batch import Batch, MicroBatch
from unitrain.errors import Refused, UserError
from unitrain.recipe import OptimizerRecipe, Recipe, StrategyRecipe, TrainRecipe
from unitrain.strategy import HyperParameters, Loss, Role, TensorInfo
from unitrain.world import World

if importlib.util.find_spec("tensorflow") is None:
    pytest.skip("TensorFlow is not installed", allow_module_level=True)

from unitrain.strategies.tensorflow import TensorFlow  # isort: skip  # before TensorFlow is imported
import keras
import tensorflow as tf

HP = HyperParameters(1e-2, None)
DRAW = np.random.default_rng(3)
X = DRAW.standard_normal((12, 4)).astype(np.float32)
Y = DRAW.standard_normal((12, 2)).astype(np.float32)


class Linear(tf.Module):  # type: ignore[misc]  # TensorFlow has no types
    def __init__(self) -> None:
        super().__init__()
        self.layers = [tf.Variable(tf.random.normal([4, 3])), tf.Variable(tf.random.normal([3, 2]))]
        self.bias = tf.Variable(tf.zeros([2]))
        self.unused = tf.Variable(tf.ones([5]))
        self.calls = tf.Variable(0, trainable=False)

    def __call__(self, x: Any, training: bool = False) -> Any:
        if training:
            self.calls.assign_add(1)
        return tf.tanh(x @ self.layers[0]) @ self.layers[1] + self.bias


def squares(model: Any, batch: Mapping[str, Any]) -> Loss:
    return Loss(tf.reduce_sum(tf.square(model(batch["x"]) - batch["y"])), len(batch["x"]))


def recipe(precision: str = "fp32", **options: Any) -> Recipe:
    return Recipe(
        trainer="a:B",
        train=TrainRecipe(global_batch=12, precision=precision),
        strategy=StrategyRecipe(name="tensorflow", options=options),
    )


def bind(
    model: Any = Linear, loss: Any = squares, optimizer: Any = None, *, precision: str = "fp32", seed: int = 0
) -> Any:
    strategy = TensorFlow(recipe(precision))
    strategy.open(World())
    optimizer = OptimizerRecipe(lr=1e-2, weight_decay=0.1) if optimizer is None else optimizer
    return strategy.bind(Role(model=model, losses={"loss": loss}, optimizer=optimizer), seed)


def batch(*rows: int, step: int = 0, filler: Sequence[int] = (), x: NDArray[np.float32] = X) -> Batch:
    """The twelve rows in micro-batches of these sizes, and then fillers."""
    ends = [0, *itertools.accumulate(rows)]
    parts = [slice(begin, end) for begin, end in itertools.pairwise(ends)]
    micros = [
        MicroBatch(
            {"x": tf.constant(x[part]), "y": tf.constant(Y[part])}, part.stop - part.start, 77 * step + part.start
        )
        for part in parts
    ]
    micros += [
        MicroBatch({"x": tf.constant(X[:size]), "y": tf.constant(Y[:size])}, size, 1, filler=True) for size in filler
    ]
    return Batch(step, np.arange(12), lambda: micros)


class Memory:
    """A checkpoint in memory."""

    def __init__(self, engine: Any) -> None:
        self.values = {(shard.kind, shard.name): shard.data.copy() for shard in engine.shards()}
        self.tensors = {pair: TensorInfo(str(data.dtype), data.shape) for pair, data in self.values.items()}

    def read(self, kind: str, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> NDArray[Any]:
        return self.values[kind, name]


@pytest.fixture
def others() -> Iterator[None]:
    """Keras's own choice of precision, whatever a test sets."""
    before = keras.config.dtype_policy()
    yield
    keras.config.set_dtype_policy(before)


def test_micro_batches_of_any_sizes_give_the_step_of_one_and_fillers_weigh_nothing() -> None:
    outcomes = []
    for made in (batch(12), batch(3, 3, 3, 3), batch(5, 5, 2), batch(2, 2, 4, 4), batch(4, 4, 4, filler=[4, 2])):
        engine = bind()
        out = engine.update(made, HP).read()
        outcomes.append((out, Memory(engine).values))
    (first, state), *rest = outcomes
    assert first["weight"] == 12 and first["applied"] == 1
    for out, values in rest:
        assert out == pytest.approx(first, rel=1e-5)
        for pair, value in values.items():
            if pair != ("buffer", "calls"):
                np.testing.assert_allclose(value, state[pair], rtol=1e-4, atol=1e-6, err_msg=str(pair))


@pytest.mark.parametrize(
    "optimizer",
    [
        OptimizerRecipe(lr=1e-2, weight_decay=0.1, betas=(0.9, 0.999)),
        OptimizerRecipe(lr=1e-2, weight_decay=0.3, decay="matrices", betas=(0.8, 0.95), eps=1e-3),
        OptimizerRecipe(name="sgd", lr=1e-2, momentum=0.9, weight_decay=0.1),
        OptimizerRecipe(name="sgd", lr=1e-2),
    ],
    ids=lambda optimizer: f"{optimizer.name}-{optimizer.decay}-{optimizer.momentum}",
)
def test_updates_are_those_of_torch(optimizer: OptimizerRecipe) -> None:
    torch: Any = pytest.importorskip("torch")
    engine = bind(optimizer=optimizer)
    begin = {name: value for (kind, name), value in Memory(engine).values.items() if kind == "param"}
    params = {name: torch.tensor(value, requires_grad=True) for name, value in begin.items()}
    moved = [param for name, param in params.items() if name != "unused"]
    groups = [
        {"params": [p], "weight_decay": optimizer.weight_decay if optimizer.decay == "all" or p.ndim > 1 else 0.0}
        for p in moved
    ]
    if optimizer.name == "adamw":
        theirs = torch.optim.AdamW(groups, lr=1e-2, betas=optimizer.betas, eps=optimizer.eps)
    else:
        theirs = torch.optim.SGD(groups, lr=1e-2, momentum=optimizer.momentum)
    for step in range(8):
        rate = 1e-2 * (1 + step % 3)
        out = engine.update(batch(12), HyperParameters(rate, 1.5)).read()
        hidden = torch.tanh(torch.tensor(X) @ params["layers.0"]) @ params["layers.1"] + params["bias"]
        loss = (hidden - torch.tensor(Y)).square().sum() / 12
        theirs.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(moved, 1.5)
        for group in theirs.param_groups:
            group["lr"] = rate
        theirs.step()
        assert out["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert out["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    ours = Memory(engine).values
    for name, param in params.items():
        np.testing.assert_allclose(ours["param", name], param.detach().numpy(), rtol=1e-4, atol=1e-6, err_msg=name)
    assert np.array_equal(ours["param", "unused"], begin["unused"]), "what the loss does not reach neither decays"
    if optimizer.name == "adamw":
        assert ours["adamw.step", "bias"] == 8 and ours["adamw.step", "unused"] == 0
        assert {kind for kind, _ in ours} == {"param", "buffer", "adamw.m", "adamw.v", "adamw.step"}


def test_no_step_is_traced_after_the_first() -> None:
    traces = []

    def loss(model: Any, found: Mapping[str, Any]) -> Loss:
        traces.append(1)
        return squares(model, found)

    engine = bind(loss=loss)
    engine.update(batch(4, 4, 2, 2), HyperParameters(1e-2, 1.0))
    first = len(traces)
    for step in range(1, 4):
        engine.update(batch(4, 4, 2, 2, step=step), HyperParameters(1e-2 / step, None if step == 2 else 1.0 / step))
    assert len(traces) == first


def test_a_non_finite_gradient_changes_nothing_but_is_told() -> None:
    engine = bind()
    engine.update(batch(12), HP)
    before = Memory(engine).values
    broken = X.copy()
    broken[5, 1] = np.inf
    out = engine.update(batch(6, 6, x=broken), HP).read()
    assert out["applied"] == 0 and not np.isfinite(out["grad_norm"])
    after = Memory(engine).values
    assert all(np.array_equal(value, after[pair]) for pair, value in before.items() if pair != ("buffer", "calls"))
    assert engine.update(batch(12), HP).read()["applied"] == 1


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (lambda model, found: model(found["x"]), "returned a SymbolicTensor of shape (12, 2); return a scalar tensor"),
        (lambda model, found: 3.0, "returned a float; return a scalar tensor"),
        (lambda model, found: Loss(tf.reduce_sum(model(found["x"])), found["x"]), "a weight of shape (12, 4)"),
        (
            lambda model, found: Loss(tf.reduce_sum(model(found["x"])), 1, {"loss": (1, 1)}),
            "a metric named 'loss', which every step has already",
        ),
        (
            lambda model, found: Loss(tf.reduce_sum(model(found["x"])), 1, {"right": 1}),
            "the metric 'right' as a int; return the pair",
        ),
        (lambda model, found: tf.reduce_sum(found["x"]), "a loss that no trainable parameter leads to"),
    ],
)
def test_a_loss_that_is_none_is_explained(returned: Any, said: str) -> None:
    with pytest.raises(UserError) as caught:
        bind(loss=returned).update(batch(12), HP)
    assert said in str(caught.value)


def test_a_plain_scalar_is_the_mean_of_its_rows_and_python_in_a_loss_is_converted() -> None:
    def mean(model: Any, found: Mapping[str, Any]) -> Any:
        errors = tf.square(model(found["x"]) - found["y"])
        if tf.reduce_sum(errors) > 1e9:  # a tensor, which only AutoGraph can ask
            errors = errors * 0.0
        return tf.reduce_sum(errors) / len(errors)

    ours, theirs = bind(loss=mean), bind()
    assert ours.update(batch(5, 7), HP).read() == pytest.approx(theirs.update(batch(12), HP).read(), rel=1e-5)


def test_models_run_in_training_in_updates_alone() -> None:
    engine = bind()
    engine.evaluate([batch(12)])
    assert engine.call(lambda model: int(model.calls.numpy())) == 0
    engine.update(batch(6, 6), HP)
    assert engine.call(lambda model: (model(X[:2]), int(model.calls.numpy()))[1]) == 2


class Tables(tf.Module):  # type: ignore[misc]  # TensorFlow has no types
    """Its gradient comes as IndexedSlices."""

    def __init__(self) -> None:
        super().__init__()
        self.table = tf.Variable(tf.random.normal([9, 2]))

    def __call__(self, x: Any) -> Any:
        return tf.gather(self.table, tf.cast(tf.abs(x[:, 0]) * 4, tf.int32) % 9)


def test_a_sparse_gradient_counts_as_the_dense_one_it_stands_for() -> None:
    engine = bind(Tables)
    out = engine.update(batch(4, 4, 4), HP).read()
    assert out["applied"] == 1
    assert engine.optimizer.m[0].numpy().any()


def keras_model() -> Any:
    layers = [
        keras.Input((4,)),
        keras.layers.Dense(8, activation="relu", name="hidden"),
        keras.layers.BatchNormalization(name="norm"),
        keras.layers.Dropout(0.5, name="drop"),
        keras.layers.Dense(2, name="out"),
    ]
    return keras.Sequential(layers, name="small")


def test_a_keras_model_goes_on_from_a_checkpoint_bit_for_bit() -> None:
    whole, first = bind(keras_model), bind(keras_model)
    losses = [whole.update(batch(6, 6, step=step), HP).read() for step in range(6)]
    for step in range(3):
        first.update(batch(6, 6, step=step), HP)
    saved = Memory(first)
    assert ("buffer", "norm/moving_mean") in saved.values
    assert not any("seed" in name for _, name in saved.values)
    resumed = bind(keras_model, seed=1)
    resumed.load(saved).require_all("it")
    assert [resumed.update(batch(6, 6, step=step), HP).read() for step in range(3, 6)] == losses[3:]
    assert losses[4] != losses[5]


@pytest.mark.parametrize(
    ("make", "model"),
    [
        (lambda: keras.optimizers.RMSprop(1e-2, momentum=0.9, centered=True), keras_model),
        (lambda: keras.optimizers.Nadam(1e-2), Linear),
        (lambda: keras.optimizers.Adafactor(1e-2), Linear),
        (lambda: keras.optimizers.Lion(1e-3, weight_decay=0.1, use_ema=True), Linear),
    ],
    ids=["rmsprop", "nadam", "adafactor", "lion"],
)
def test_an_optimizer_of_keras_goes_on_from_a_checkpoint_bit_for_bit(make: Any, model: Any) -> None:
    def engine(seed: int = 0) -> Any:
        return bind(model, optimizer=lambda variables: make(), seed=seed)

    whole, first = engine(), engine()
    losses = [whole.update(batch(12, step=step), HP).read() for step in range(6)]
    for step in range(3):
        first.update(batch(12, step=step), HP)
    resumed = engine(seed=1)
    resumed.load(Memory(first)).require_all("it")
    assert [resumed.update(batch(12, step=step), HP).read() for step in range(3, 6)] == losses[3:]


def test_an_optimizer_of_keras_follows_the_schedule_and_does_what_it_does_alone() -> None:
    engine = bind(optimizer=lambda variables: keras.optimizers.SGD(2e-2))
    before = Memory(engine).values["param", "bias"]
    alone = bind(optimizer=OptimizerRecipe(name="sgd", lr=1e-2))
    engine.update(batch(12), HyperParameters(5e-4))  # half of the recipe's 1e-3, so half of 2e-2
    alone.update(batch(12), HyperParameters(1e-2))
    after = Memory(engine).values["param", "bias"]
    assert not np.array_equal(before, after)
    np.testing.assert_allclose(after, Memory(alone).values["param", "bias"], rtol=1e-6)


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        (lambda variables: "adam", "made a str"),
        (
            lambda variables: keras.optimizers.SGD(keras.optimizers.schedules.CosineDecay(1e-2, 10)),
            "a learning rate schedule of its own",
        ),
    ],
)
def test_what_is_no_optimizer_for_us_is_explained(factory: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        bind(optimizer=factory)


def test_bf16_computes_in_bf16_and_keeps_fp32(others: None) -> None:
    found = []

    def loss(model: Any, arrays: Mapping[str, Any]) -> Loss:
        output = model(arrays["x"])
        found.append(output.dtype)
        return Loss(tf.reduce_sum(tf.square(tf.cast(output, tf.float32) - arrays["y"])), len(output))

    engine = bind(keras_model, loss, precision="bf16")
    assert engine.update(batch(12), HP).read()["applied"] == 1
    assert set(found) == {tf.bfloat16}
    assert {value.dtype.name for value in Memory(engine).values.values()} == {"float32"}
    assert keras.config.dtype_policy().name == "float32"


def test_bf16_is_refused_to_a_module_that_knows_nothing_of_it() -> None:
    with pytest.raises(Refused, match="compute_dtype"):
        bind(precision="bf16")


def test_what_is_no_model_is_explained() -> None:
    for model, said in (
        (lambda: 3, "returned a int"),
        (tf.Module, "without variables"),
        (lambda: keras.Sequential([keras.layers.Dense(2)]), "without weights"),
    ):
        with pytest.raises(UserError, match=said):
            bind(model)


def test_a_seed_gives_the_same_weights_twice_and_leaves_other_draws_alone() -> None:
    np.random.seed(5)
    state = np.random.get_state()[1].copy()
    one, two, other = (Memory(bind(seed=seed)).values["param", "layers.0"] for seed in (1, 1, 2))
    assert np.array_equal(one, two) and not np.array_equal(one, other)
    assert np.array_equal(np.random.get_state()[1], state)


def test_frozen_variables_stay_and_are_kept() -> None:
    def model() -> Any:
        made = keras_model()
        made.get_layer("hidden").trainable = False
        return made

    engine = bind(model)
    before = Memory(engine).values
    engine.update(batch(12), HP)
    after = Memory(engine).values
    assert np.array_equal(before["buffer", "hidden/kernel"], after["buffer", "hidden/kernel"])
    assert not np.array_equal(before["param", "out/kernel"], after["param", "out/kernel"])
