"""`python -m unitrain.build NAME`: builds and installs what a backend needs and no wheel brings."""

from __future__ import annotations

import importlib
import sys

from ..errors import ExitCode, UnitrainError

BUILDS = {"deepspeed": "unitrain.build.deepspeed", "horovod": "unitrain.build.horovod"}


def main(arguments: list[str]) -> int:
    """Run one build; its own options follow its name."""
    if not arguments or arguments[0] not in BUILDS:
        print(f"usage: python -m unitrain.build {{{','.join(BUILDS)}}} [--help]", file=sys.stderr)
        return ExitCode.BAD_RECIPE
    name, *rest = arguments
    try:
        code: int = importlib.import_module(BUILDS[name]).main(rest)
        return code
    except UnitrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
