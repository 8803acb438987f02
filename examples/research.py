"""Your model, loss and data set in one file: `python examples/research.py`, under torchrun, or `unitrain launch`."""

from pathlib import Path

import torch
from torch import nn

import unitrain


class Spirals(torch.utils.data.Dataset):
    def __init__(self, split):
        draws = torch.Generator().manual_seed({"train": 0, "eval": 1}[split])
        self.arm = torch.arange(2000) % 2 * 2 - 1  # -1 or 1
        turn = 8 * torch.rand(2000, generator=draws) + 1
        self.point = torch.view_as_real(torch.polar(turn, turn + torch.pi / 2 * self.arm)) / 4

    def __len__(self):
        return len(self.arm)

    def __getitem__(self, number):
        return {"point": self.point[number], "arm": self.arm[number]}


class Mine(unitrain.Trainer):
    def build_model(self):
        return nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))

    def build_source(self, split):
        return unitrain.DatasetSource(Spirals(split))

    def loss(self, model, batch):
        margin = batch["arm"] * model(batch["point"]).squeeze(1)
        focal = nn.functional.softplus(-margin) * torch.sigmoid(-margin) ** 2  # Lin et al., 2017
        return unitrain.Loss(focal.sum(), len(margin), {"accuracy": ((margin > 0).sum(), len(margin))})


if __name__ == "__main__":
    Mine.from_recipe(Path(__file__).with_suffix(".yaml")).fit()
