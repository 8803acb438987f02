"""Rollout engines for tests; actors import this file by its name."""

from __future__ import annotations

import os
import time
from pathlib import Path

from unitrain.errors import UnitrainError
from unitrain.rl.sampler_torch import TorchSampler


class Slow(TorchSampler):
    """Takes `seconds` for each call, and says in `folder` that it has begun, by a file of its process number."""

    def __init__(self, plan):
        super().__init__(plan)
        self.options = plan.options

    def generate(self, prompts, seeds, sampling):
        """See Sampler."""
        Path(self.options["folder"], str(os.getpid())).touch()
        time.sleep(self.options["seconds"])
        return super().generate(prompts, seeds, sampling)


class Forgetful(TorchSampler):
    """Loads everything but one tensor, and says nothing of it."""

    def load(self, tensors):
        """See Sampler."""
        super().load({name: tensor for name, tensor in tensors.items() if name != "blocks.0.mlp.up.weight"})


class Picky(TorchSampler):
    """Fails on prompts that begin with `token`, by an error or (`dies`) with its process."""

    def __init__(self, plan):
        super().__init__(plan)
        self.options = plan.options

    def generate(self, prompts, seeds, sampling):
        """See Sampler."""
        if any(int(prompt[0]) == self.options["token"] for prompt in prompts):
            if self.options.get("dies"):
                os._exit(3)
            raise UnitrainError("this prompt is not to my taste")
        return super().generate(prompts, seeds, sampling)
