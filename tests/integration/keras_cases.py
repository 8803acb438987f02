"""What Keras models become on one backend: python keras_cases.py BACKEND; prints JSON that test_keras.py compares."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from unitrain.errors import UserError
from unitrain.keras_backend import build_any, settle_keras


def everything() -> Any:
    """A model with one of each kind of initializer, and layers that make variables in unusual ways."""
    import keras
    from keras import initializers, layers

    tokens = keras.Input((12,), dtype="int32")
    x = layers.Embedding(30, 16)(tokens)
    x = layers.MultiHeadAttention(2, 8)(x, x)
    x = layers.Dropout(0.5)(x)
    x = layers.BatchNormalization()(x)
    x = layers.Bidirectional(layers.LSTM(6, return_sequences=True))(x)
    x = layers.Conv1D(7, 3, kernel_initializer=initializers.TruncatedNormal(stddev=0.3))(x)
    x = layers.SeparableConv1D(8, 3, depthwise_initializer="he_uniform", pointwise_initializer="lecun_normal")(x)
    x = layers.Flatten()(x)
    x = layers.Dense(9, kernel_initializer=initializers.RandomNormal(mean=1.0))(x)
    x = layers.Dense(9, kernel_initializer=initializers.Orthogonal(gain=2.0), name="square")(x)
    x = layers.Dense(4, kernel_initializer=initializers.Orthogonal(), name="tall")(x)
    x = layers.Dense(8, kernel_initializer=initializers.Identity(), bias_initializer=initializers.Constant(0.5))(x)
    seeded = [layers.Dense(3, kernel_initializer=initializers.GlorotUniform(seed=5), name=n)(x) for n in ("a", "b")]
    return keras.Model(tokens, layers.Concatenate()(seeded))


def nested() -> Any:
    """A model written as a class, whose layers are named by Keras."""
    import keras

    class Part(keras.layers.Layer):
        def build(self, input_shape: Any) -> None:
            self.inner = [keras.layers.Dense(4), keras.layers.Dense(4)]
            for layer in self.inner:
                layer.build(input_shape)

        def call(self, x: Any) -> Any:
            return self.inner[1](self.inner[0](x))

    class Whole(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.parts = [Part(), Part()]
            self.frozen = keras.layers.Dense(4, trainable=False)
            self.build((None, 4))

        def build(self, input_shape: Any) -> None:
            for part in (*self.parts, self.frozen):
                part.build(input_shape)

        def call(self, x: Any) -> Any:
            return self.frozen(self.parts[1](self.parts[0](x)))

    return Whole()


def unbuilt() -> Any:
    import keras

    return keras.Sequential([keras.layers.Dense(3)])


def alike() -> Any:
    """Two layers that are built in a constructor, where no path leads to them yet."""
    import keras

    class Part(keras.layers.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.inner = keras.layers.Dense(4, name="inner")
            self.inner.build((None, 4))

        def call(self, x: Any) -> Any:
            return self.inner(x)

    return keras.Sequential([keras.Input((4,)), Part(), Part()])


def late() -> Any:
    """A layer that makes variables when it is first called."""
    import keras

    class Late(keras.layers.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.built = True
            self.dense = None

        def call(self, x: Any) -> Any:
            if self.dense is None:
                self.dense = keras.layers.Dense(3)
            return self.dense(x)

    class Whole(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.late = keras.layers.Dense(4), Late()
            self.first.build((None, 4))
            self.built = True

        def call(self, x: Any) -> Any:
            return self.late(self.first(x))

    return Whole()


def refusal(function: Callable[[], Any]) -> str:
    try:
        function()
    except UserError as error:
        return str(error)
    return "none"


def main(backend: str) -> None:
    settle_keras(backend)
    from unitrain.models.state_keras import state_of

    found: dict[str, Any] = {}
    for name, make in (("everything", everything), ("nested", nested)):
        make()  # models made before must not change the names
        model = build_any(make, backend, 7)
        state = state_of(model)
        values = {key: np.asarray(variable) for key, variable in (state.params | state.buffers).items()}
        found[name] = {
            "params": list(state.params),
            "buffers": list(state.buffers),
            "seeds": len(state.seeds),
            "bits": {key: hashlib.sha256(value.tobytes()).hexdigest()[:12] for key, value in values.items()},
            "moments": {key: [float(value.mean()), float(value.std())] for key, value in values.items()},
        }
        if name == "everything":
            x = np.arange(24, dtype=np.int32).reshape(2, 12)
            found["quiet"] = np.asarray(_plain(model(x))).tolist()
            model.training = True
            found["explicit"] = np.asarray(_plain(model(x, training=False))).tolist()
            found["training"] = np.asarray(_plain(model(x))).tolist()
            other = state_of(build_any(everything, backend, 8))
            found["other seed"] = hashlib.sha256(np.asarray(other.params["square/kernel"]).tobytes()).hexdigest()[:12]
    other_framework = "jax" if backend == "torch" else "torch"
    found["refusals"] = {
        "unbuilt": refusal(lambda: build_any(unbuilt, backend, 0)),
        "alike": refusal(lambda: build_any(alike, backend, 0)),
        "late": refusal(lambda: build_any(late, backend, 0)(np.ones((1, 4), dtype=np.float32))),
        "backend": refusal(lambda: build_any(nested, other_framework, 0)),
    }
    print(json.dumps(found))


def _plain(tensor: Any) -> Any:
    return tensor.detach() if hasattr(tensor, "detach") else tensor


if __name__ == "__main__":
    main(sys.argv[1])
