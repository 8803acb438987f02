"""The feature matrix in torch: the models and losses of its features."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from feature_matrix import NUM_TOKENS, EvenRows, Featured, RareRows, TokenRows, WeightlessRows
from torch import Tensor, nn

import unitrain
from unitrain import registry
from unitrain.models.gpt_torch import logits_of
from unitrain.models.hf_config import HF, LoRA
from unitrain.trainer_path import resolve_trainer

GAN: Any = resolve_trainer(f"{Path(__file__).parents[2] / 'examples' / 'gan.py'}:GAN")
Arrays = dict[str, Tensor]
LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": NUM_TOKENS,
    "tie_word_embeddings": True,
}


class Rows(Featured):
    """Weighted least squares by two layers, whose sizes no number of ranks divides."""

    def build_model(self) -> nn.Module:
        """See Trainer."""
        return nn.Sequential(nn.Linear(6, 11), nn.Tanh(), nn.Linear(11, 1))

    def loss(self, model: nn.Module, batch: Arrays) -> Any:
        """See Trainer."""
        errors = (model(batch["x"]) - batch["y"]).square().sum(dim=1)
        return unitrain.Loss((errors * batch["weight"]).sum(), batch["weight"].sum())


class Weightless(WeightlessRows, Rows):
    """See WeightlessRows."""


class ScalarLoss(Rows):
    """No weights."""

    def loss(self, model: nn.Module, batch: Arrays) -> Any:
        """See Trainer."""
        return nn.functional.mse_loss(model(batch["x"]), batch["y"])


class Metrics(Rows):
    """Also counts and averages."""

    def loss(self, model: nn.Module, batch: Arrays) -> Any:
        """See Trainer."""
        found = super().loss(model, batch)
        heavy = batch["weight"].gt(4)
        metrics = {
            "number": (batch["number"].sum(), len(heavy)),
            "heavy_number": ((batch["number"] * heavy).sum(), heavy.sum()),
            "nothing": (0.0, 0),
        }
        return found._replace(metrics=metrics)


class OwnOptimizer(Rows):
    """RMSprop."""

    def roles(self) -> dict[str, unitrain.Role]:
        """See Trainer."""

        def optimizer(params: list[Any]) -> torch.optim.Optimizer:
            return torch.optim.RMSprop(params, lr=1e-2, momentum=0.9, centered=True)

        return {"model": replace(super().roles()["model"], optimizer=optimizer)}


class Frozen(Rows):
    """The first layer and one bias stay as they are."""

    def build_model(self) -> nn.Module:
        """See Trainer."""
        model = nn.Sequential(nn.Linear(6, 11), nn.Tanh(), nn.Linear(11, 7), nn.Tanh(), nn.Linear(7, 1))
        model[0].requires_grad_(False)
        model[2].bias.requires_grad_(False)
        return model


class Scalar(Rows):
    """A factor beside the layers."""

    class Model(nn.Module):
        """The layers, scaled."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(6, 11), nn.Tanh(), nn.Linear(11, 1))
            self.factor = nn.Parameter(torch.tensor(0.5))

        def forward(self, x: Tensor) -> Tensor:
            """(rows, 6) -> (rows, 1)."""
            scaled: Tensor = self.factor * self.layers(x)
            return scaled

    def build_model(self) -> nn.Module:
        """See Trainer."""
        return self.Model()


class Stack(nn.Module):
    """Blocks that strategies cut one by one, between an entrance and an exit."""

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.enter = nn.Linear(6, 7)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(7, 7), nn.Tanh()) for _ in range(3))
        self.leave = nn.Linear(7, 1)
        if tied:
            self.blocks[2][0].weight = self.blocks[0][0].weight
            self.back = nn.Linear(6, 7, bias=False)
            self.back.weight = self.enter.weight

    def forward(self, x: Tensor) -> Tensor:
        """(rows, 6) -> (rows, 1)."""
        hidden = self.enter(x)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        if hasattr(self, "back"):
            hidden = self.back(hidden @ self.back.weight)
        left: Tensor = self.leave(hidden)
        return left


class Blocks(Rows):
    """See Stack."""

    def build_model(self) -> nn.Module:
        """See Trainer."""
        return Stack()


class Tied(Rows):
    """Two blocks share a weight, and so do two layers beside them."""

    def build_model(self) -> nn.Module:
        """See Trainer."""
        return Stack(tied=True)


class Parts(nn.ModuleDict):
    """A base, and a part that some rows lead to."""

    def __init__(self) -> None:
        super().__init__(
            {"base": nn.Sequential(nn.Linear(6, 11), nn.Tanh(), nn.Linear(11, 1)), "rare": nn.Linear(6, 1)}
        )

    def forward(self, x: Tensor, part: Tensor) -> Tensor:
        """(rows, 6), (rows,) -> (rows, 1)."""
        found: Tensor = self["base"](x)
        if part.any():
            found = found + part[:, None] * self["rare"](x)
        return found


class Rare(RareRows, Rows):
    """One rank runs the part in each step."""

    def build_model(self) -> nn.Module:
        """See Trainer."""
        return Parts()

    def loss(self, model: nn.Module, batch: Arrays) -> Any:
        """See Trainer."""
        errors = (model(batch["x"], batch["part"]) - batch["y"]).square().sum(dim=1)
        return unitrain.Loss(errors.sum(), len(errors))


class RareAtOnce(Rare):
    """One rank runs the part in the first step already."""

    def rows(self) -> dict[int, int]:
        """See RareRows."""
        return {0: 5}


class Unused(Rare):
    """All ranks run the part in each other step, and none in those between."""

    def step(self, batch: unitrain.Batch) -> unitrain.StepOut:
        """See Trainer."""
        self.part = self.cursor.step % 2
        return super().step(batch)

    def loss(self, model: nn.Module, batch: Arrays) -> Any:
        """See Trainer."""
        part = torch.full_like(batch["part"], self.part)
        return super().loss(model, {**batch, "part": part})


class Normed(EvenRows, Rows):
    """Batch norm over vectors of which every row has the same ones."""

    class Model(nn.Module):
        """A weighted mean of normalised vectors."""

        def __init__(self) -> None:
            super().__init__()
            self.enter, self.norm, self.leave = nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5), nn.Linear(20, 1)

        def forward(self, x: Tensor) -> Tensor:
            """(rows, 4, 6) -> (rows, 1)."""
            hidden = self.norm(self.enter(x).flatten(0, 1)).view(len(x), -1)
            left: Tensor = self.leave(hidden)
            return left

    def build_model(self) -> nn.Module:
        """See Trainer."""
        return self.Model()

    def finish(self) -> None:
        """See Trainer."""
        self.note(digest=self.engines["model"].digest()["norm.num_batches_tracked"])


class Dropout(Rows):
    """Which values are dropped follows from a micro-batch's place in the global batch."""

    def build_model(self) -> nn.Module:
        """See Trainer."""
        return nn.Sequential(nn.Linear(6, 11), nn.Tanh(), nn.Dropout(0.3), nn.Linear(11, 1))


class Losses(Rows):
    """Squares and distances in turn."""

    def roles(self) -> dict[str, unitrain.Role]:
        """See Trainer."""
        losses = {"loss": self.loss, "distance": self.distance}
        return {"model": replace(super().roles()["model"], losses=losses)}

    def step(self, batch: unitrain.Batch) -> unitrain.StepOut:
        """See Trainer."""
        loss = "distance" if self.cursor.step % 2 else "loss"
        return self.engines["model"].update(batch, self.hp(), loss)

    def distance(self, model: nn.Module, batch: Arrays) -> Any:
        """Mean of distances."""
        return (model(batch["x"]) - batch["y"]).abs().mean()


class Distilled(Rows):
    """The model learns what a frozen one says; that one is also asked by itself."""

    def roles(self) -> dict[str, unitrain.Role]:
        """See Trainer."""
        teacher = unitrain.Role(model=self.build_model, losses={"loss": super().loss})
        return {**super().roles(), "teacher": teacher}

    def loss(self, model: nn.Module, batch: Arrays) -> Any:
        """See Trainer."""
        with torch.no_grad():
            wanted = self.engines["teacher"].model(batch["x"])
        return nn.functional.mse_loss(model(batch["x"]), wanted)

    def finish(self) -> None:
        """See Trainer."""
        assert self._eval_feed is not None, "there is an evaluation split"
        teacher = self.engines["teacher"]
        self.note(said=teacher.call(probe), evaluated=teacher.evaluate(self._eval_feed.sweep())["loss"])


class Adversaries(GAN, Featured):  # type: ignore[misc]  # which was found by its path
    """The example, and what its discriminator learns."""

    def step(self, batch: unitrain.Batch) -> unitrain.StepOut:
        """See Trainer."""
        told = self.engines["discriminator"].update(batch, self.hp("discriminator")).read()["loss"]
        self.extra.setdefault("told", []).append(told)
        return self.engines["generator"].update(batch, self.hp("generator"))

    def finish(self) -> None:
        """See Trainer."""
        self.note(told=self.extra["told"])


class Called(Rows):
    """Asked at the end."""

    def finish(self) -> None:
        """See Trainer."""
        self.note(said=self.engines["model"].call(probe))


class Compiled(Blocks):
    """One block: compiling takes seconds."""

    class Model(nn.Module):
        """A block between two layers."""

        def __init__(self) -> None:
            super().__init__()
            self.enter, self.leave = nn.Linear(6, 7), nn.Linear(7, 1)
            self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(7, 7), nn.Tanh())])

        def forward(self, x: Tensor) -> Tensor:
            """(rows, 6) -> (rows, 1)."""
            left: Tensor = self.leave(self.blocks[0](self.enter(x)))
            return left

    def build_model(self) -> nn.Module:
        """See Trainer."""
        return self.Model()


class Llama(TokenRows):
    """The next token, by a model of transformers."""

    config = HF(config=LLAMA)

    def build_model(self) -> nn.Module:
        """See Trainer."""
        model: nn.Module = registry.resolve("unitrain.models.hf_torch:build")(self.config)
        return model

    def initial(self, name: str, shape: tuple[int, ...], seed: int) -> np.ndarray[Any, Any]:
        """See Role."""
        return self.config.initial(name, shape, seed)

    def loss(self, model: nn.Module, batch: Arrays) -> Any:
        """See Trainer."""
        logits = logits_of(model(batch["tokens"]))
        total = nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch["targets"].flatten(), reduction="sum")
        return unitrain.Loss(total, batch["targets"].numel())


class Adapters(Llama):
    """Adapters alone learn, and are saved."""

    config = HF(config=LLAMA, lora=LoRA(r=2))

    def roles(self) -> dict[str, unitrain.Role]:
        """See Trainer."""
        return {"model": replace(super().roles()["model"], checkpoint="trainable")}


def probe(model: nn.Module) -> list[float]:
    """What a model of rows says of some."""
    x = torch.linspace(-1, 1, 18).reshape(3, 6)
    said: list[float] = model(x).flatten().tolist()
    return said
