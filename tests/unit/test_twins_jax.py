"""The NNX twins of the built-in models: the same names, first values, logits and gradients as in torch."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

jax = pytest.importorskip("jax")
nnx = pytest.importorskip("flax.nnx")

from unitrain import registry  # noqa: E402  # behind the skip
from unitrain.models.config import GPT, MLP, ConvNet  # noqa: E402

GPT_CONFIG = GPT(vocab_size=61, layers=2, width=48, heads=3, ffn=64)
CONFIGS = {
    "gpt": GPT_CONFIG,
    "gpt, untied": GPT(vocab_size=61, layers=1, width=32, heads=2, ffn=48, tied=False, rope_theta=500.0),
    "mlp": MLP(),
    "linear": MLP(in_features=12, hidden=(), num_classes=3),
    "convnet": ConvNet(),
    "convnet, batch norm": ConvNet(norm="batch", channels=12, depth=2, in_channels=3),
}


def sample(config: Any) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    if isinstance(config, GPT):
        tokens = random.integers(0, config.vocab_size, (3, 33))
        return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
    shape = (config.in_features,) if isinstance(config, MLP) else (config.in_channels, 9, 7)
    x = random.standard_normal((5, *shape)).astype(np.float32)
    return {"x": x, "y": random.integers(0, config.num_classes, 5)}


def task(config: Any, framework: str) -> Any:
    name = "language_model" if isinstance(config, GPT) else "classification"
    return importlib.import_module(f"unitrain.tasks.{name}_{framework}")


class Variable(NamedTuple):
    """Of an NNX model, under its canonical name."""

    native: Any
    turn: Any


def variables(model: Any, kind: Any = nnx.Variable) -> dict[str, Variable]:
    found = {}
    for path, variable in nnx.to_flat_state(nnx.state(model, kind)):
        name, turn = model.layout.of(".".join(map(str, path)))
        assert name not in found, f"two variables are {name}"
        found[name] = Variable(variable, turn)
    return found


def canonical(model: Any, kind: Any = nnx.Variable) -> dict[str, np.ndarray]:
    return {name: v.turn.to_canonical(np.asarray(v.native[...])) for name, v in variables(model, kind).items()}


def torch_twin(config: Any, seed: int = 3) -> Any:
    with torch.device("meta"):
        model = registry.resolve(config.modules["torch"])(config)
    model = model.to_empty(device="cpu")
    for name, tensor in model.named_parameters():
        tensor.data.copy_(torch.from_numpy(config.initial(name, tuple(tensor.shape), seed)))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.reset_running_stats()
    return model


def jax_twin(config: Any, seed: int = 3) -> Any:
    """As a strategy makes it: no parameter is ever drawn by NNX, the rest is what the model says."""
    kind = registry.resolve(config.modules["jax"])
    model = nnx.eval_shape(lambda: kind(config))
    nnx.update(model, jax.jit(lambda: nnx.state(kind(config), nnx.Not(nnx.Param)))())
    for name, (variable, turn) in variables(model, nnx.Param).items():
        shape = turn.canonical_shape(variable.shape)
        variable.set_value(jax.numpy.asarray(turn.to_native(config.initial(name, shape, seed), variable.shape)))
    return model


def noisy(ours: Any, theirs: Any) -> None:
    """Give both what training would have given them: norms, biases and statistics that are neither 0 nor 1."""
    random = np.random.default_rng(1)
    tensors = dict(theirs.named_parameters()) | dict(theirs.named_buffers())
    for name, (variable, turn) in variables(ours).items():
        tensor = tensors[name]
        if tensor.dtype == torch.float32 and tensor.ndim == 1:
            tensor.data.add_(torch.from_numpy(0.3 * random.random(tensor.shape, dtype=np.float32)))
            variable[...] = jax.numpy.asarray(turn.to_native(tensor.detach().numpy(), variable.shape))


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS)
def config(request: pytest.FixtureRequest) -> Any:
    return request.param


def test_twins_have_the_same_tensors_and_the_same_first_values(config: Any) -> None:
    theirs, ours = torch_twin(config), jax_twin(config)
    params = {name: value.detach().numpy() for name, value in theirs.named_parameters()}
    buffers = {name: value.numpy() for name, value in theirs.named_buffers()}
    for kind, expected in ((nnx.Param, params), (nnx.Not(nnx.Param), buffers)):
        found = canonical(ours, kind)
        assert {name: value.shape for name, value in found.items()} == {n: v.shape for n, v in expected.items()}
        for name, value in found.items():
            np.testing.assert_array_equal(value, expected[name], name)


def test_a_twin_can_be_built_without_memory(config: Any) -> None:
    abstract = nnx.eval_shape(lambda: registry.resolve(config.modules["jax"])(config))
    values = [variable.get_value() for variable in jax.tree.leaves(nnx.state(abstract), is_leaf=_is_variable)]
    assert values and all(isinstance(value, jax.ShapeDtypeStruct) for value in values)


def _is_variable(found: Any) -> bool:
    return isinstance(found, nnx.Variable)


@pytest.mark.parametrize("training", [True, False])
def test_twins_give_the_same_logits_loss_and_gradients(config: Any, training: bool) -> None:
    theirs, ours, batch = torch_twin(config), jax_twin(config), sample(config)
    noisy(ours, theirs)
    theirs.train(training)
    (ours.train if training else ours.eval)()
    seen: list[Any] = []
    theirs.register_forward_hook(lambda module, args, logits: seen.append(logits.detach().numpy()))
    expected = task(config, "torch").loss(None, theirs, {k: torch.from_numpy(v) for k, v in batch.items()})
    expected.sum.backward()

    @nnx.jit
    @nnx.value_and_grad(has_aux=True)
    def measured(model: Any, batch: Any) -> Any:
        said: list[Any] = []
        found = task(config, "jax").loss(None, lambda x: said.append(model(x)) or said[0], batch)
        return found.sum, (said[0], found.weight, found.metrics)

    (total, (logits, weight, metrics)), grads = measured(ours, batch)
    np.testing.assert_allclose(logits, seen[0], atol=1e-5, rtol=1e-5)
    assert float(total) == pytest.approx(float(expected.sum.detach()), rel=1e-6)
    assert int(weight) == int(expected.weight)
    assert {k: (int(s), int(w)) for k, (s, w) in metrics.items()} == {
        k: (int(s), int(w)) for k, (s, w) in expected.metrics.items()
    }
    turns = {name: turn for name, (_, turn) in variables(ours, nnx.Param).items()}
    found = {}
    for path, variable in nnx.to_flat_state(grads):
        name = ours.layout.of(".".join(map(str, path))).name
        found[name] = turns[name].to_canonical(np.asarray(variable[...]))
    assert found.keys() == {name for name, _ in theirs.named_parameters()}
    for name, param in theirs.named_parameters():
        grad = param.grad.numpy()
        assert np.linalg.norm(found[name] - grad) <= 1e-5 * np.linalg.norm(grad), name
    # Batch norms have counted the batch, in training.
    for name, value in canonical(ours, nnx.Not(nnx.Param)).items():
        np.testing.assert_allclose(value, dict(theirs.named_buffers())[name].numpy(), rtol=1e-5, err_msg=name)


def test_weights_scale_each_token_of_the_loss() -> None:
    batch = {**sample(GPT_CONFIG), "weight": np.random.default_rng(2).random((3, 32), dtype=np.float32)}
    losses = task(GPT_CONFIG, "torch").loss, task(GPT_CONFIG, "jax").loss
    expected = losses[0](None, torch_twin(GPT_CONFIG), {k: torch.from_numpy(v) for k, v in batch.items()})
    found = losses[1](None, jax_twin(GPT_CONFIG), {k: jax.numpy.asarray(v) for k, v in batch.items()})
    assert float(found.sum) == pytest.approx(float(expected.sum.detach()), rel=1e-6)
    assert float(found.weight) == pytest.approx(float(expected.weight), rel=1e-6)


@pytest.mark.parametrize("name", ["gpt", "convnet", "convnet, batch norm"])
def test_recomputed_blocks_give_the_same_gradients(name: str) -> None:
    config = CONFIGS[name]
    batch = {k: jax.numpy.asarray(v) for k, v in sample(config).items()}
    grads, states = [], []
    for remat in (False, True):
        model = jax_twin(config)
        model.remat = remat
        grads.append(nnx.jit(nnx.grad(lambda model: task(config, "jax").loss(None, model, batch).sum))(model))
        states.append(nnx.state(model, nnx.BatchStat))
    for pair in (grads, states):
        jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6), *pair)


@pytest.mark.parametrize(
    "config", [GPT(vocab_size=61, layers=1, width=32, heads=2, ffn=48, dropout=0.4), MLP(dropout=0.4)]
)
def test_dropout_acts_in_training_only_and_anew_each_time(config: Any) -> None:
    model, inputs = jax_twin(config), jax.numpy.asarray(next(iter(sample(config).values())))
    kept = jax_twin(type(config)(**{**config.__dict__, "dropout": 0.0}))
    model.eval()
    np.testing.assert_allclose(model(inputs), kept(inputs), atol=1e-6)
    model.train()
    first, second = model(inputs), model(inputs)
    assert not np.allclose(first, second)
    assert not np.allclose(first, kept(inputs))


def test_attention_with_dropout_keeps_the_mean_of_attention_without() -> None:
    config = GPT(vocab_size=61, layers=1, width=32, heads=2, ffn=48, dropout=0.5)
    attention = jax_twin(config).blocks[0].attention
    x = jax.random.normal(jax.random.key(0), (1, 6, 32))
    found = np.asarray(attention(jax.numpy.repeat(x, 2000, axis=0)))
    attention.eval()
    kept = np.asarray(attention(x))
    np.testing.assert_allclose(found.mean(axis=0), kept[0], atol=0.12 * found.std(axis=0).max())
    assert found.std(axis=0).min() > 0


def test_weights_in_bf16_give_logits_in_bf16_near_those_in_fp32(config: Any) -> None:
    model, inputs = jax_twin(config), jax.numpy.asarray(next(iter(sample(config).values())))
    expected = model(inputs)
    for _, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        variable.set_value(variable[...].astype(jax.numpy.bfloat16))
    found = model(inputs)
    assert found.dtype == jax.numpy.bfloat16
    np.testing.assert_allclose(found.astype(np.float32), expected, atol=0.1 * float(abs(expected).max()))


def test_a_sequence_beyond_the_longest_is_refused() -> None:
    model = jax_twin(GPT(vocab_size=17, layers=1, width=16, heads=2, ffn=24, max_len=4))
    with pytest.raises(ValueError, match=r"5 tokens in a row, but model\.max_len is 4"):
        model(jax.numpy.zeros((1, 5), dtype=int))


def test_images_of_one_channel_may_leave_it_out_of_their_shape() -> None:
    model, images = jax_twin(ConvNet()), jax.random.normal(jax.random.key(0), (2, 8, 8))
    np.testing.assert_array_equal(model(images), model(images[:, None]))


def test_the_likeliest_tokens_are_those_that_torch_finds() -> None:
    from unitrain.models.gpt_torch import generate as torch_generate

    theirs, ours = torch_twin(GPT_CONFIG), jax_twin(GPT_CONFIG)
    generate = task(GPT_CONFIG, "jax").generate
    for window in (None, 5, 100):
        expected = torch_generate(theirs, [3, 1, 4], 12, 0.0, window=window)
        assert generate(ours, [3, 1, 4], 12, 0.0, window=window) == expected
    assert generate(ours, range(20), 3, 0.0, window=8) == torch_generate(theirs, range(20), 3, 0.0, window=8)


def test_generation_follows_its_seed_and_is_compiled_once() -> None:
    ours = jax_twin(GPT_CONFIG)
    generate = task(GPT_CONFIG, "jax").generate
    first = generate(ours, [3, 1, 4], 12, 0.8, seed=3)
    assert first[:3] == [3, 1, 4] and len(first) == 15
    assert first == generate(ours, [3, 1, 4], 12, 0.8, seed=3)
    assert first != generate(ours, [3, 1, 4], 12, 0.8, seed=4)

    fixed = Fixed(np.eye(5)[[1, 2, 3, 4, 0]])
    assert generate(fixed, [3], 12, 0.0, window=4) == [number % 5 for number in range(3, 16)]
    assert Fixed.shapes == [(1, 4)]


def test_drawn_tokens_have_the_chances_that_the_logits_give() -> None:
    chances = np.array([0.5, 0.3, 0.2])
    model, generate = Fixed(2 * np.log([chances] * 3)), task(GPT_CONFIG, "jax").generate
    tokens = generate(model, [0], 3000, 2.0, window=1)
    np.testing.assert_allclose(np.bincount(tokens[1:]) / 3000, chances, atol=0.03)
    # A function without a module around it is as good.
    assert tokens == generate(lambda seen: model(seen), [0], 3000, 2.0, window=1)


class Fixed(nnx.Module):
    """The logits that follow each token; notes the shapes that it was traced for."""

    shapes: list[tuple[int, ...]] = []

    def __init__(self, logits: np.ndarray) -> None:
        self.logits = nnx.Param(jax.numpy.asarray(logits))

    def __call__(self, tokens: Any) -> Any:
        Fixed.shapes.append(tokens.shape)
        return self.logits[...][tokens]
