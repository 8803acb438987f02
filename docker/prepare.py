"""Make the folder of a run whose agents other containers start: `prepare.py RECIPE RUN_DIR --nodes N [key=value ...]`.

What a launcher does before it starts anything. A folder that holds a run already is left as it is, so that the run goes
on from its newest checkpoint.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from unitrain import registry
from unitrain.agent.job import FILE, job_text
from unitrain.errors import UnitrainError
from unitrain.recipe_file import load_recipe
from unitrain.run import Run
from unitrain.submission import job_of


def main() -> int:
    """Write recipe.yaml and job.json; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("recipe", type=Path, metavar="RECIPE")
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--nodes", type=int, required=True, metavar="N")
    parser.add_argument("--nproc", type=int, metavar="N", help="ranks on each node")
    parser.add_argument("--strategy", metavar="NAME")
    known = parser.parse_intermixed_args()  # overrides may stand after options
    if Run.exists(known.run_dir):
        print(f"{known.run_dir} holds a run: it goes on")
        return 0
    try:
        recipe = load_recipe(
            known.recipe, known.overrides, strategy=known.strategy, nproc=known.nproc, nodes=known.nodes
        )
        registry.entry("strategies", recipe.strategy.name)  # refuses what this image cannot run
        run = Run.create(known.run_dir, recipe)
    except UnitrainError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    job = job_of(run, recipe)
    (run.folder / FILE).write_text(job_text(job, "docker"))
    print(f"{run.folder}: {recipe.strategy.name} on {job.nodes} nodes with {job.nproc} ranks each")
    return 0


if __name__ == "__main__":
    sys.exit(main())
