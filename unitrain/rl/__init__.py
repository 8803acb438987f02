"""Reinforcement learning from rewards and preferences: the mathematics and the small data structures.

Names are imported on first use, so that `import unitrain.rl` needs no framework.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .advantages import Advantages as Advantages
    from .advantages import Episodes as Episodes
    from .buffer import Buffer as Buffer
    from .buffer import Group as Group
    from .kl import KL as KL
    from .kl import KLControl as KLControl
    from .policy_torch import GRPO as GRPO
    from .policy_torch import PPO as PPO
    from .policy_torch import RLOO as RLOO
    from .policy_torch import PolicyGradient as PolicyGradient
    from .policy_torch import ReinforcePP as ReinforcePP
    from .preference_torch import DPO as DPO
    from .preference_torch import KTO as KTO
    from .prompts import Request as Request
    from .registry import ADVANTAGES as ADVANTAGES
    from .registry import POLICY_LOSSES as POLICY_LOSSES
    from .registry import PREFERENCE_LOSSES as PREFERENCE_LOSSES
    from .reward_model_torch import RewardModel as RewardModel
    from .rewards import Reward as Reward
    from .rewards import Rewards as Rewards
    from .samples import Sample as Sample
    from .sampling import Sampling as Sampling
    from .sft_torch import SFT as SFT
    from .task_torch import RLTask as RLTask
    from .trl_torch import TRLDPO as TRLDPO
    from .trl_torch import TRLKTO as TRLKTO
    from .trl_torch import TRLSFT as TRLSFT

_HOME = {
    "DPO": "preference_torch",
    "GRPO": "policy_torch",
    "KTO": "preference_torch",
    "PPO": "policy_torch",
    "PolicyGradient": "policy_torch",
    "RLOO": "policy_torch",
    "RLTask": "task_torch",
    "ReinforcePP": "policy_torch",
    "RewardModel": "reward_model_torch",
    "SFT": "sft_torch",
    "ADVANTAGES": "registry",
    "Advantages": "advantages",
    "Buffer": "buffer",
    "Episodes": "advantages",
    "Group": "buffer",
    "KL": "kl",
    "KLControl": "kl",
    "POLICY_LOSSES": "registry",
    "PREFERENCE_LOSSES": "registry",
    "Request": "prompts",
    "Reward": "rewards",
    "Rewards": "rewards",
    "Sample": "samples",
    "Sampling": "sampling",
    "TRLDPO": "trl_torch",
    "TRLKTO": "trl_torch",
    "TRLSFT": "trl_torch",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'unitrain.rl' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
