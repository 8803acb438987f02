"""Ranks under torchrun, torch's elastic agent: one on this node, and yours to start on every other."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from unitrain.agent.job import FILE, job_text
from unitrain.agent.local_job import (
    cancel_job,
    job_log,
    job_status,
    start_job,
    wait_for,
    wait_until_ended,
    was_cancelled,
)
from unitrain.agent.logs import new_attempt
from unitrain.errors import ExitCode
from unitrain.launcher import Job, JobStatus, Launcher, Rendered
from unitrain.recipe import Recipe
from unitrain.strategy import Problem

