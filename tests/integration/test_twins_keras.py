"""The Keras twins of the built-in models: the same names, first values, logits and gradients as in torch."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from unitrain import registry
from unitrain.models.config import GPT

pytestmark = pytest.mark.skipif(importlib.util.find_spec("tensorflow") is None, reason="TensorFlow is not installed")

SCRIPT = Path(__file__).with_name("twins_keras.py")
_spec = importlib.util.spec_from_file_location("twins_keras", SCRIPT)
assert _spec is not None and _spec.loader is not None
twins: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(twins)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """Keras's side of all cases, from one process."""
    file = tmp_path_factory.mktemp("twins") / "found.npz"
    quiet = ["env", "TF_CPP_MIN_LOG_LEVEL=3", "CUDA_VISIBLE_DEVICES=-1", "KERAS_BACKEND=jax"]  # ours must win
    done = subprocess.run([*quiet, sys.executable, SCRIPT, file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with np.load(file) as arrays:
        return {name.replace("|", "/"): arrays[name] for name in arrays.files}


@pytest.fixture(params=twins.CONFIGS)
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def part(found: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}


def torch_twin(config: Any) -> Any:
    with torch.device("meta"):
        model = registry.resolve(config.modules["torch"])(config)
    model = model.to_empty(device="cpu")
    for name, tensor in model.named_parameters():
        tensor.data.copy_(torch.from_numpy(config.initial(name, tuple(tensor.shape), twins.SEED)))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.reset_running_stats()
    return model


def trained_twin(config: Any) -> Any:
    model = torch_twin(config)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.ndim == 1:
            tensor.data.add_(torch.from_numpy(twins.noise(name, tuple(tensor.shape))))
    return model


def test_twins_have_the_same_tensors_and_the_same_first_values(case: str, found: dict[str, np.ndarray]) -> None:
    model = torch_twin(twins.CONFIGS[case])
    for kind, tensors in (("param", model.named_parameters()), ("buffer", model.named_buffers())):
        expected = {name: tensor.detach().numpy() for name, tensor in tensors}
        ours = part(found, f"{case}/{kind}/")
        assert {name: value.shape for name, value in ours.items()} == {n: v.shape for n, v in expected.items()}
        for name, value in ours.items():
            np.testing.assert_array_equal(value, expected[name], name)


@pytest.mark.parametrize("mode", ["evaluation", "training"])
def test_twins_give_the_same_logits_loss_and_gradients(case: str, mode: str, found: dict[str, np.ndarray]) -> None:
    config = twins.CONFIGS[case]
    model = trained_twin(config).train(mode == "training")
    seen: list[Any] = []
    model.register_forward_hook(lambda module, args, logits: seen.append(logits.detach().numpy()))
    batch = {name: torch.from_numpy(value) for name, value in twins.sample(config).items()}
    loss = twins.task(config, "torch").loss(None, model, batch)
    loss.sum.backward()
    ours = part(found, f"{case}/{mode}/")
    np.testing.assert_allclose(ours["logits"], seen[0], atol=1e-5, rtol=1e-5)
    assert float(ours["loss"]) == pytest.approx(float(loss.sum.detach()), rel=1e-6)
    assert float(ours["weight"]) == pytest.approx(float(loss.weight), rel=1e-6)
    for name, pair in loss.metrics.items():
        assert ours[f"metric/{name}"].tolist() == [float(pair[0]), float(pair[1])]
    grads = part(ours, "grad/")
    assert grads.keys() == {name for name, _ in model.named_parameters()}
    for name, param in model.named_parameters():
        grad = param.grad.numpy()
        assert np.linalg.norm(grads[name] - grad) <= 1e-5 * np.linalg.norm(grad), name
    # Batch norms have counted the batch, in training.
    for name, buffer in model.named_buffers():
        np.testing.assert_allclose(ours[f"buffer/{name}"], buffer.numpy(), rtol=1e-5, err_msg=name)


def test_the_likeliest_tokens_are_those_that_torch_finds(found: dict[str, np.ndarray]) -> None:
    for case, config in twins.CONFIGS.items():
        if isinstance(config, GPT):
            model = trained_twin(config)
            for window in twins.WINDOWS:
                generate = twins.task(config, "torch").generate
                expected = generate(model, twins.PROMPT, twins.NUM_TOKENS, 0.0, window=window)
                assert found[f"{case}/generated/{window}"].tolist() == expected
