"""How many bytes of training state does a rank hold? Every strategy against the formulas of the ZeRO paper.

    python benchmarks/memory.py [--strategies NAMES] [--ranks N ...] [--json FILE] [--markdown FILE]

Counts the storages behind parameters, gradients and optimizer state, each once, on every rank, at the moment of an
update when all gradients are there. Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter
Models" (2020), figure 1, in fp32: 4 bytes a parameter, 4 its gradient, 8 AdamW's moments. Exits with 1 where two ranks
are further than 2 % from the formula. No other load on the machine can move these figures.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ranks import read_case, run_ranks, write_found
from report import Machine, facts_in_words, table, write

from unitrain import World, registry
from unitrain.errors import MissingExtra, Refused
from unitrain.recipe import LauncherRecipe, OptimizerRecipe, Recipe, StrategyRecipe, TrainRecipe
from unitrain.recipe_file import refuse_problems
from unitrain.strategy import Cluster

HERE = Path(__file__).parent
ROLES = ("parameters", "gradients", "optimizer")
PLACES = ("device", "host")
GOAL, JUDGED_RANKS = 0.02, 2
SECONDS = 300
SEQUENCE, ROWS = 16, 12


class Formula(NamedTuple):
    """Bytes a parameter on a rank of N: (parameters, gradients, optimizer) on the device and in host memory."""

    device: Callable[[int], tuple[float, float, float]]
    host: Callable[[int], tuple[float, float, float]] = lambda n: (0, 0, 0)


REPLICATED = Formula(lambda n: (4, 4, 8))
ZERO1 = Formula(lambda n: (4, 4, 8 / n))
ZERO2 = Formula(lambda n: (4, 4 / n, 8 / n))
ZERO3 = Formula(lambda n: (4 / n, 4 / n, 8 / n))
FORMULAS: Mapping[str, Formula] = {
    "single": REPLICATED,
    "ddp": REPLICATED,
    "horovod": REPLICATED,
    "accelerate": REPLICATED,  # without a config of one's own it is DDP
    "zero1": ZERO1,
    "zero2": ZERO2,
    "zero3": ZERO3,
    "fsdp2": ZERO3,
    # Ren et al., "ZeRO-Offload" (2021): the device's weights have masters on the host.
    "zero2_offload": Formula(lambda n: (4, 0, 0), lambda n: (0, 4 / n, 12 / n)),
    "zero3_offload": Formula(lambda n: (0, 0, 0), lambda n: (4 / n, 4 / n, 8 / n)),
}


def main() -> int:
    """Measure every strategy on every number of ranks, print the table; 1 where the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategies", nargs="+", choices=tuple(FORMULAS), default=tuple(FORMULAS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    known = parser.parse_args()

    machine, rows, not_measured = Machine(), [], []
    for strategy in known.strategies:
        for ranks in known.ranks:
            if strategy == "single" and ranks > 1:
                continue
            if reason := _why_not(strategy, ranks):
                not_measured.append(f"{strategy} on {ranks}: {reason}")
            else:
                rows.append(run_case(strategy, ranks))
    facts = machine.facts()
    missed = [problem for row in rows for problem in problems(row)]
    left_out = "".join(f"- not measured: {line}\n" for line in not_measured)
    text = (
        f"{facts_in_words(facts)}- model: GPT of {rows[0]['num_parameters']:,} parameters, fp32, AdamW; the rank that "
        f"holds most\n{left_out}\nBytes a parameter on one rank, measured:\n\n{_table(rows)}\n{_verdict(missed)}"
    )
    print(text, end="")
    if known.json:
        write(known.json, {"facts": facts, "rows": rows, "not_measured": not_measured, "missed": missed})
    if known.markdown:
        write(known.markdown, f"# Memory of a rank, CPU\n\n{text}")
    return 1 if missed else 0


def run_case(strategy: str, ranks: int) -> dict[str, Any]:
    """One row, from ranks that our own agent starts."""
    case = {"strategy": strategy, "ranks": ranks}
    found = run_ranks("memory:measure", case, strategy=strategy, ranks=ranks, timeout_seconds=SECONDS)
    return {**case, **max(found, key=lambda held: sum(held["device"] + held["host"]))}


def measure(arguments: list[str]) -> int:
    """One rank's part: two updates, and what is alive in the second one."""
    folder = Path(arguments[0])
    case, world = read_case(folder), World.from_environment()
    recipe = _recipe(case["strategy"], case["ranks"])
    strategy = registry.load("strategies", case["strategy"])(recipe)
    strategy.open(world)
    found = _measured(strategy, recipe, world)
    write_found(folder, world.rank, found)
    strategy.barrier()
    strategy.close()
    return 0


def _measured(strategy: Any, recipe: Recipe, world: World) -> dict[str, Any]:
    from torch.nn import functional

    from unitrain import HyperParameters, Loss, Role
    from unitrain.models.config import GPT
    from unitrain.models.gpt_torch import GPTModule

    def loss(model: Any, batch: Any) -> Loss:
        logits = model(batch["tokens"][:, :-1]).flatten(0, 1)
        targets = batch["tokens"][:, 1:].flatten()
        return Loss(functional.cross_entropy(logits, targets, reduction="sum"), len(targets))

    config = GPT(layers=5, width=320, heads=4, ffn=896, vocab_size=256)
    role = Role(
        model=lambda: GPTModule(config), losses={"loss": loss}, optimizer=recipe.optimizer, initial=config.initial
    )
    engine = strategy.bind(role, 0)
    feed = _feed(world, strategy, micro_batch=None)
    hp = HyperParameters(1e-3, 1.0)
    engine.update(feed.batch(0), hp).read()
    probe = Probe(engine)
    engine.update(feed.batch(1), hp).read()
    count = config.num_parameters()
    found = {
        "num_parameters": count,
        "device": [probe.held["device"][role] / count for role in ROLES],
        "host": [probe.held["host"][role] / count for role in ROLES],
        "other": probe.other / count,
    }
    accumulating = _feed(world, strategy, micro_batch=-(-ROWS // world.size // 2))
    engine.update(accumulating.batch(2), hp).read()
    accumulating.close()
    feed.close()
    return {**found, "between": probe.between / count}


def _feed(world: World, strategy: Any, micro_batch: int | None) -> Any:
    import numpy as np

    from unitrain import ArraySource
    from unitrain.data.feed import Feed

    tokens = np.random.default_rng(0).integers(0, 256, (64, SEQUENCE + 1))
    return Feed(
        ArraySource(tokens=tokens),
        seed=0,
        global_batch=ROWS,
        micro_batch=micro_batch,
        rank=world.rank,
        size=world.size,
        place=strategy.place,
    )


class Probe:
    """Looks at an engine within its updates: before the second micro-batch, and when all gradients are reduced."""

    def __init__(self, engine: Any) -> None:
        self.held: dict[str, dict[str, int]] = {}
        self.other, self.between = 0, 0  # bytes
        self.micros = 0
        apply, seed = engine._apply, engine._seed

        def counted_apply(*args: Any) -> Any:
            self.micros = 0
            self.held = count(state_of(engine))
            self.other = alive(engine) - sum(sum(roles.values()) for roles in self.held.values())
            return apply(*args)

        def counted_seed(*args: Any) -> Any:
            self.micros += 1
            if self.micros == 2:
                lasting = count(item for item in state_of(engine) if item.role != "gradients")
                self.between = alive(engine) - sum(sum(roles.values()) for roles in lasting.values())
            return seed(*args)

        engine._apply, engine._seed = counted_apply, counted_seed


class Item(NamedTuple):
    """A tensor of the training state on this rank."""

    role: str
    place: str  # device | host
    tensor: Any


def count(items: Iterable[Item]) -> dict[str, dict[str, int]]:
    """Place -> role -> bytes of the storages behind the tensors, each once."""
    seen: set[int] = set()
    found = {place: dict.fromkeys(ROLES, 0) for place in PLACES}
    for role, place, tensor in items:
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            found[place][role] += storage.nbytes()
    return found


def alive(engine: Any) -> int:
    """Bytes of the storages of all tensors that Python knows of, those of the state among them."""
    import torch
    from torch.distributed.tensor import DTensor

    state = [item.tensor for item in state_of(engine)]
    known = [found for found in gc.get_objects() if issubclass(type(found), torch.Tensor)]
    storages = {}
    for tensor in (*state, *(found.to_local() if isinstance(found, DTensor) else found for found in known)):
        if tensor.device.type != "meta" and tensor.layout == torch.strided:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


def state_of(engine: Any) -> Iterable[Item]:
    """Everything that an engine must hold to go on; by the kind of the engine."""
    return _deepspeed_state(engine) if hasattr(engine, "partitions") else _torch_state(engine)


def _torch_state(engine: Any) -> Iterable[Item]:
    """Of the engine that the torch strategies share."""
    local = engine.sharing.local
    for param in engine.model.parameters():
        yield Item("parameters", "device", local(param.detach()))
        if param.grad is not None:
            yield Item("gradients", "device", local(param.grad))
    for slot in engine.optimizer.slots():
        yield Item("optimizer", "device", local(slot.tensor))


def _deepspeed_state(engine: Any) -> Iterable[Item]:
    """Of a DeepSpeed engine: partitions, gradients where each stage keeps them, masters and moments."""
    import torch

    zero = engine.zero
    optimizer_place = (
        "host" if getattr(zero, "cpu_offload", False) or getattr(zero, "offload_optimizer", False) else "device"
    )
    param_place = "host" if getattr(zero, "offload_param", False) else "device"
    for param in engine.model.parameters():
        if hasattr(param, "ds_tensor"):
            yield Item("parameters", param_place, param.ds_tensor)
        yield Item("parameters", "device", param.detach())
        if param.grad is not None:
            yield Item("gradients", "device", param.grad)
        if getattr(param, "grad_accum", None) is not None:
            yield Item("gradients", "device", param.grad_accum)
    for name in ("averaged_gradients", "all_grad_tensors"):
        for tensors in (getattr(zero, name, None) or {}).values():
            for tensor in tensors or ():
                if tensor is not None:
                    yield Item("gradients", optimizer_place, tensor)
    if hasattr(zero, "grad_partitions_flat_buffer"):
        yield Item("gradients", optimizer_place, zero.grad_partitions_flat_buffer)
    for group in engine.partitions.groups():
        yield Item("optimizer", optimizer_place, group.master.detach())
        if group.master.grad is not None:
            yield Item("gradients", optimizer_place, group.master.grad)
        for value in group.state.values():
            if isinstance(value, torch.Tensor):
                yield Item("optimizer", optimizer_place, value)


def _recipe(strategy: str, ranks: int) -> Recipe:
    return Recipe(
        trainer="memory:none",
        optimizer=OptimizerRecipe(lr=1e-3, clip=1.0),
        train=TrainRecipe(global_batch=ROWS),
        strategy=StrategyRecipe(name=strategy),
        launcher=LauncherRecipe(nproc=ranks),
    )


def _why_not(strategy: str, ranks: int) -> str:
    """What keeps a strategy from being measured here; empty where nothing does."""
    try:
        entry = registry.entry("strategies", strategy)
        refused = registry.resolve(entry.problems)(_recipe(strategy, ranks), Cluster(nodes=1, nproc=ranks))
        refuse_problems(refused)
    except (MissingExtra, Refused) as error:
        return str(error)
    return ""


def problems(row: Mapping[str, Any]) -> list[str]:
    """Which goals a row misses."""
    if row["ranks"] != JUDGED_RANKS:
        return []
    found = []
    whole = sum(sum(_formula(row, place)) for place in PLACES)
    for place in PLACES:
        measured, formula = sum(row[place]), sum(_formula(row, place))
        if abs(measured - formula) > GOAL * whole:
            found.append(
                f"{row['strategy']} on {row['ranks']}: {measured:.2f} bytes in {place} memory, not {formula:.2f}"
            )
    return found


def _formula(row: Mapping[str, Any], place: str) -> tuple[float, float, float]:
    formula = FORMULAS[row["strategy"]]
    return (formula.device if place == "device" else formula.host)(row["ranks"])


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    head = ["strategy", "ranks", "memory", *ROLES, "sum", "formula", "ratio", "other", "between"]
    cells = []
    for row in rows:
        for place in PLACES:
            formula, measured = sum(_formula(row, place)), row[place]
            if formula or sum(measured):
                ratio = f"{sum(measured) / formula:.3f}" if formula else "-"
                figures = [f"{value:.2f}" for value in (*measured, sum(measured), formula)]
                rest = [f"{row['other']:.2f}", f"{row['between']:.2f}"] if place == "device" else ["", ""]
                cells.append([row["strategy"], str(row["ranks"]), place, *figures, ratio, *rest])
    return table(head, cells)


def _verdict(missed: Sequence[str]) -> str:
    if not missed:
        return f"Goal met: within {GOAL:.0%} of the formula on {JUDGED_RANKS} ranks.\n"
    return "Goal missed:\n" + "".join(f"- {problem}\n" for problem in missed)


if __name__ == "__main__":
    sys.exit(main())
