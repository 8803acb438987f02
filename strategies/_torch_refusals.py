"""What the torch strategies refuse, and what to use instead. Imports no framework, so that a launch can ask at once."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from unitrain.errors import did_you_mean
from unitrain.recipe import Recipe
from unitrain.strategy import Cluster, Problem

COMMON = ("activation_checkpointing", "compile")
# Keywords of torch.nn.parallel.DistributedDataParallel that a recipe can write down; a test compares them.
DDP = (
    "batched_grad_copy",
    "bucket_cap_mb",
    "bucket_cap_mb_list",
    "check_reduction",
    "find_unused_parameters",
    "forward_sync_buffers",
    "gradient_as_bucket_view",
    "init_sync",
    "skip_all_reduce_unused_params",
    "static_graph",
)
FSDP2 = ("cpu_offload", "param_dtype", "reduce_dtype", "reshard_after_forward", "shard_size")
DTYPES = ("fp32", "bf16", "fp16")


def single(recipe: Recipe, cluster: Cluster) -> list[Problem]:
    """Problems of strategy `single`."""
    found = list(_unknown_options(recipe, COMMON))
    if cluster.ranks > 1:
        found.append(
            Problem(
                f"strategy 'single' trains in one process, but {cluster.ranks} ranks were asked for",
                "use --nproc 1, or --strategy ddp or fsdp2",
            )
        )
    return found


def ddp(recipe: Recipe, cluster: Cluster) -> list[Problem]:
    """Problems of strategy `ddp`."""
    return list(_unknown_options(recipe, (*COMMON, *DDP)))


def fsdp2(recipe: Recipe, cluster: Cluster) -> list[Problem]:
    """Problems of strategy `fsdp2`."""
    found = list(_unknown_options(recipe, (*COMMON, *FSDP2)))
    options = recipe.strategy.options
    size = options.get("shard_size")
    if size is not None and (not isinstance(size, int) or size < 1 or cluster.ranks % size):
        found.append(
            Problem(
                f"strategy.options.shard_size is {size!r}, which does not divide {cluster.ranks} ranks into groups",
                "use a divisor of the number of ranks, or leave it out to shard over all of them",
            )
        )
    for name in ("param_dtype", "reduce_dtype"):
        if options.get(name) not in (None, *DTYPES):
            found.append(Problem(f"strategy.options.{name} is {options[name]!r}", f"use one of {', '.join(DTYPES)}"))
    return found


def _unknown_options(recipe: Recipe, known: Collection[str]) -> Iterator[Problem]:
    for name in recipe.strategy.options:
        if name not in known:
            what = f"strategy {recipe.strategy.name!r} has no option {name!r}{did_you_mean(name, known)}"
            yield Problem(what, f"known: {', '.join(sorted(known))}")
