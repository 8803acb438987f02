"""What the Keras twins of the built-in models give on TensorFlow, in one process: python twins_keras.py FILE.

The file is an npz of arrays by "case/what/name"; test_twins_keras.py compares them with torch's.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import numpy as np

from unitrain.keras_backend import settle_keras
from unitrain.models.config import GPT, MLP, ConvNet

CONFIGS = {
    "gpt": GPT(vocab_size=61, layers=2, width=48, heads=3, ffn=64),
    "gpt, untied": GPT(vocab_size=61, layers=1, width=32, heads=2, ffn=48, tied=False, rope_theta=500.0),
    "mlp": MLP(),
    "linear": MLP(in_features=12, hidden=(), num_classes=3),
    "convnet": ConvNet(),
    "convnet, batch norm": ConvNet(norm="batch", channels=12, depth=2, in_channels=3),
}
SEED, PROMPT, NUM_TOKENS = 3, [3, 1, 4], 12
WINDOWS = (None, 5, 100)


def sample(config: Any) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    if isinstance(config, GPT):
        tokens = random.integers(0, config.vocab_size, (3, 33))
        weight = random.random((3, 32), dtype=np.float32)
        return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weight": weight}
    shape = (config.in_features,) if isinstance(config, MLP) else (config.in_channels, 9, 7)
    x = random.standard_normal((5, *shape)).astype(np.float32)
    return {"x": x, "y": random.integers(0, config.num_classes, 5)}


def task(config: Any, framework: str) -> Any:
    name = "language_model" if isinstance(config, GPT) else "classification"
    return importlib.import_module(f"unitrain.tasks.{name}_{framework}")


def noise(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """What training would have done to norms, biases and statistics, which begin as 0 or 1."""
    return 0.3 * np.random.default_rng(list(name.encode())).random(shape, dtype=np.float32)


def main(file: str) -> None:
    settle_keras("tensorflow")
    import tensorflow as tf

    from unitrain import registry
    from unitrain.keras_backend import build_any
    from unitrain.models.state_keras import named, state_of

    found: dict[str, Any] = {}
    for case, config in CONFIGS.items():
        kind = registry.resolve(config.modules["tensorflow"])
        model = kind(config)  # an earlier model of the kind must not change the names
        model = build_any(lambda kind=kind, config=config: kind(config), "tensorflow", 0)
        state = state_of(model)
        for name, variable in state.params.items():
            turn = named(model, variable).turn
            values = config.initial(name, turn.canonical_shape(variable.shape), SEED)
            variable.assign(turn.to_native(values, variable.shape))

        def canonical(variables: Any, model: Any = model) -> dict[str, np.ndarray]:
            return {name: named(model, v).turn.to_canonical(np.asarray(v)) for name, v in variables.items()}

        found |= {f"{case}/param/{name}": value for name, value in canonical(state.params).items()}
        found |= {f"{case}/buffer/{name}": value for name, value in canonical(state.buffers).items()}
        for name, variable in (state.params | state.buffers).items():
            if len(variable.shape) == 1:
                variable.assign_add(noise(name, tuple(variable.shape)))
        batch = {name: tf.constant(value) for name, value in sample(config).items()}
        if isinstance(config, GPT):
            for window in WINDOWS:
                tokens = task(config, "tf").generate(model, PROMPT, NUM_TOKENS, 0.0, window=window)
                found[f"{case}/generated/{window}"] = np.array(tokens)
        for training in (False, True):
            model.training = training
            logits: list[Any] = []

            @tf.function
            def measured(model: Any = model, config: Any = config, batch: Any = batch) -> Any:
                said: list[Any] = []
                with tf.GradientTape() as tape:
                    loss = task(config, "tf").loss(None, lambda x: said.append(model(x)) or said[0], batch)
                return loss, tape.gradient(loss.sum, [v.value for v in state_of(model).params.values()]), said[0]

            loss, grads, logits = measured()
            mode = f"{case}/training" if training else f"{case}/evaluation"
            found |= {f"{mode}/logits": logits, f"{mode}/loss": loss.sum, f"{mode}/weight": loss.weight}
            found |= {f"{mode}/metric/{name}": np.array(pair) for name, pair in loss.metrics.items()}
            for (name, variable), grad in zip(state.params.items(), grads, strict=True):
                grad = tf.convert_to_tensor(grad).numpy()
                found[f"{mode}/grad/{name}"] = named(model, variable).turn.to_canonical(grad)
            found |= {f"{mode}/buffer/{name}": value for name, value in canonical(state.buffers).items()}
    np.savez(file, **{name.replace("/", "|"): np.asarray(value) for name, value in found.items()})


if __name__ == "__main__":
    main(sys.argv[1])
