"""Hugging Face libraries read local files only: whoever imports one of them calls this first."""

from __future__ import annotations

import os
import sys


def go_offline() -> None:
    """Keep huggingface_hub, transformers and datasets of this process, and of its children, off the network."""
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")
    # It reads the variable once, when it is imported; somebody may have done that before.
    constants = sys.modules.get("huggingface_hub.constants")
    if constants is not None:
        constants.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]  # a module of another package
