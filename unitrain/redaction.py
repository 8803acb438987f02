"""What of an environment, a recipe or a text may be kept in a record that people send to each other: no secrets."""

from __future__ import annotations

import re
from collections.abc import Mapping

_KEPT = re.compile(
    r"(RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|GROUP_RANK|GROUP_WORLD_SIZE|MASTER_ADDR|MASTER_PORT|LANG|LC_ALL|TZ|"
    r"PATH|LD_LIBRARY_PATH|LD_PRELOAD|VIRTUAL_ENV|CONDA_PREFIX|PYTHON\w*|"
    r"(OMP|MKL|OPENBLAS|CUDA|NVIDIA|NCCL|GLOO|UCX|TORCH|TORCHELASTIC|PYTORCH|XLA|JAX|TF|KERAS|DS|HOROVOD|SLURM|OMPI|"
    r"UNITRAIN|HF|TRANSFORMERS|TOKENIZERS|ROCR|HIP|HSA|RCCL)_\w+)"
)
_SECRET = re.compile(r"KEY|TOKEN(?!IZER)|SECRET|PASS|PWD|CREDENTIAL|AUTH|COOKIE|SESSION|PRIVATE|SIGNATURE|_SAS\b", re.I)
_SECRET_KEY = r"[\w.-]*(?:api_?key|access_?key|private_?key|token|secret|passw(?:or)?d|passphrase|credentials?|auth)"
_SETTING = re.compile(
    rf"(?P<key>(?<![\w.-]){_SECRET_KEY}[\"']?\s*[:=]\s*)(?!null\b|\[redacted)(?P<value>[^\s,}}\]]+)", re.I
)
_USER_IN_URL = re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)")
_LEAST_LETTERS = 6  # a shorter value is a word that may stand anywhere


def kept_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that tell how a run was set up, by an allow-list; none whose name speaks of a secret."""
    return {
        name: redacted(value, environ)
        for name, value in sorted(environ.items())
        if _KEPT.fullmatch(name) and not _SECRET.search(name)
    }


def speaks_of_secrets(name: str) -> bool:
    """True for the name of a variable whose value nobody else may see."""
    return _SECRET.search(name) is not None


def redacted(text: str, environ: Mapping[str, str]) -> str:
    """The text without the values of secret variables, of settings with such names, and without users in URLs."""
    values = [(value, name) for name, value in environ.items() if _SECRET.search(name) and len(value) >= _LEAST_LETTERS]
    for value, name in sorted(values, reverse=True, key=lambda pair: len(pair[0])):
        if not value.startswith("/"):  # a path to a secret is none
            text = text.replace(value, f"[redacted {name}]")
    text = _USER_IN_URL.sub("[redacted]", text)
    return _SETTING.sub(lambda found: f"{found['key']}[redacted]", text)
