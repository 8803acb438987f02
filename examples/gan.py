"""Two models with an optimizer each: a generator learns to draw a ring of eight clusters, a discriminator to tell."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

import unitrain

CENTRES = np.exp(2j * np.pi * np.arange(8) / 8).view(np.float64).reshape(8, 2)
SPREAD, NOISE = 0.05, 8


class GAN(unitrain.Trainer):
    """Goodfellow et al., "Generative Adversarial Nets", 2014, with the generator's non-saturating loss."""

    def build_source(self, split):
        if split == "eval":
            return None
        draws = np.random.default_rng(0)
        real = CENTRES[draws.integers(8, size=20000)] + SPREAD * draws.standard_normal((20000, 2))
        # Noise is data too: a sample's noise then does not depend on how many ranks share a batch.
        noise = draws.standard_normal((20000, NOISE))
        return unitrain.ArraySource(real=real.astype(np.float32), noise=noise.astype(np.float32))

    def roles(self):
        slow = self.recipe.optimizer
        fast = replace(slow, lr=2 * slow.lr)
        generator = unitrain.Role(model=lambda: network(NOISE, 2), losses={"loss": self.deceive}, optimizer=slow)
        discriminator = unitrain.Role(model=lambda: network(2, 1), losses={"loss": self.tell}, optimizer=fast)
        return {"generator": generator, "discriminator": discriminator}

    def step(self, batch):
        self.engines["discriminator"].update(batch, self.hp("discriminator"))
        return self.engines["generator"].update(batch, self.hp("generator"))

    def tell(self, discriminator, batch):
        with torch.no_grad():
            drawn = self.engines["generator"].model(batch["noise"])
        return verdict(discriminator(batch["real"]), True) + verdict(discriminator(drawn), False)

    def deceive(self, generator, batch):
        # The gradients that this leaves in the discriminator are dropped by its own next update.
        return verdict(self.engines["discriminator"].model(generator(batch["noise"])), True)

    def on(self, event, **facts):
        if event == "log":
            hits, sharp = self.engines["generator"].call(quality)
            if self.world.first:
                print(f"{hits} of 8 clusters drawn, {sharp:.0%} of the points in one of them", flush=True)


def network(inputs, outputs):
    return nn.Sequential(nn.Linear(inputs, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, outputs))


def verdict(logits, real):
    return nn.functional.binary_cross_entropy_with_logits(logits, torch.full_like(logits, real))


def quality(generator):
    """How many clusters 1000 drawn points hit, and the share of points within three spreads of a centre."""
    noise = torch.randn(1000, NOISE, generator=torch.Generator().manual_seed(1))
    points = generator(noise.to(next(generator.parameters()).device)).float().cpu()
    distance, nearest = torch.cdist(points, torch.from_numpy(CENTRES).float()).min(dim=1)
    inside = distance < 3 * SPREAD
    return int((nearest[inside].bincount(minlength=8) >= 20).sum()), float(inside.float().mean())


if __name__ == "__main__":
    GAN.from_recipe(Path(__file__).with_suffix(".yaml")).fit()
