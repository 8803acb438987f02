"""Writes the generated pages: `python docs/generate.py`.

docs/recipe.md comes from the dataclasses that define a recipe, docs/features.md from the table that the tests check.
"""

from __future__ import annotations

import dataclasses
import json
import runpy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_type_hints

from unitrain import registry
from unitrain.recipe import Recipe, StrategyRecipe, TrainRecipe
from unitrain.recipe_file import NAMED
from unitrain.rl.recipe import RL
from unitrain.schema import join, keys_of, phrase
from unitrain.strategy import Cluster
from unitrain.tasks.named import SUFFIXES

ROOT = Path(__file__).parents[1]

INTRODUCTION = """# Recipe reference

A recipe is one YAML file that says all there is to a run. Every key but `trainer` has a default; `null` stands for
"none" or "as the last column says". A key that is not listed here is an error, with its line and the nearest key.

```yaml
name: gpt-tiny
trainer: unitrain.tasks:LanguageModel
model: {name: gpt, size: tiny}
data: {name: text, path: python-stdlib, seq_len: 128}
optimizer: {name: adamw, lr: 1e-3, betas: [0.9, 0.95], weight_decay: 0.1, clip: 1.0}
train: {steps: 300, global_batch: 32}
strategy: {name: fsdp2}
launcher: {name: local, nproc: 2}
```

- On the command line, `key=value` takes the place of the file's value: `unitrain launch recipe.yaml train.steps=50
  'optimizer.betas=[0.9, 0.99]'`. The value is assigned whole: `'model={name: mlp}'` leaves nothing of the file's model.
- `--strategy`, `--launcher`, `--nproc` and `--nodes` set `strategy.name`, `launcher.name`, `launcher.nproc` and
  `launcher.nodes`. Another strategy or launcher than the file's starts without the file's `options` for the old one.
- `${group.key}` stands for the value of another key. Nothing else can be looked up: recipes read neither the
  environment nor run code.
- `unitrain launch recipe.yaml --dry-run` prints the recipe with every default written out.
- Relative paths start in the folder where `unitrain launch` runs; a trainer's file may also stand beside the recipe.
"""


RL_KEYS = """What a trainer has as defaults of its own: [rl.md](rl.md#trainers).
"""


def recipe_reference() -> str:
    """The text of docs/recipe.md."""
    hints = get_type_hints(Recipe)
    groups = {key: hints[key] for key in keys_of(Recipe) if dataclasses.is_dataclass(hints[key])}
    parts = [INTRODUCTION, "## Top level\n", _table(Recipe, "", leave_out=groups)]
    for group, kind in groups.items():
        about = keys_of(Recipe)[group].metadata["help"]
        # "options" of a model or source are the keys beside its name, and no key of that name
        leave_out = ("options",) if group in NAMED else ()
        parts += [f"## `{group}`: {about}\n", _table(kind, group, leave_out=leave_out)]
        if group in NAMED:
            parts += _built_in(group)
    parts += ["## `rl`: keys of the trainers of unitrain.rl\n", RL_KEYS, *_groups_of(RL, "rl")]
    return "\n".join(parts)


def _groups_of(kind: Any, where: str) -> Iterator[str]:
    """The keys of a dataclass, then those of the groups in it."""
    hints = get_type_hints(kind)
    groups = {
        key: hints[field.name] for key, field in keys_of(kind).items() if dataclasses.is_dataclass(hints[field.name])
    }
    yield _table(kind, where, leave_out=groups)
    for key, inner in groups.items():
        yield f"`{where}.{key}`: {keys_of(kind)[key].metadata['help']}\n"
        yield from _groups_of(inner, f"{where}.{key}")


def _built_in(group: str) -> Iterator[str]:
    """The options of each model or source that comes with unitrain."""
    yield (
        "All other keys of this group belong to the model or source of that name; for a name that is not below, your "
        "Trainer gets them as they are.\n"
    )
    for name, entry in registry.entries(NAMED[group]).items():
        if entry.path.startswith("unitrain."):
            yield f"### `{group}: {{name: {name}}}`\n\n{entry.summary[0].upper()}{entry.summary[1:]}.\n"
            yield _table(registry.resolve(entry.path), group)


def _table(kind: Any, where: str, leave_out: Any = ()) -> str:
    hints = get_type_hints(kind)
    rows = ["| key | value | default | meaning |", "|---|---|---|---|"]
    for key, field in keys_of(kind).items():
        if key not in leave_out:
            about = field.metadata.get("help", "").replace("|", "\\|")
            rows.append(f"| `{join(where, key)}` | {phrase(hints[field.name])} | {_default(field)} | {about} |")
    return "\n".join(rows) + "\n"


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    elif field.default is dataclasses.MISSING:
        return "required"
    else:
        value = field.default
    return f"`{json.dumps(dict(value) if isinstance(value, Mapping) else value)}`"


FEATURES = """# Features and strategies

Every row is a small run of `tests/integration/test_feature_matrix.py`. "yes": two ranks learn what one process learns,
within {tight:.0e} relative in fp32 ({band:.0e} in bf16 and fp16), and resumed from the middle they learn it to the
last bit. A number: the strategy refuses, before the run or before the first step that shows the need, and its message
ends as below the table.

Strategies that cut parameters (`fsdp2`, `zero3`) gather each block on all ranks at once: whether a block runs may
depend on the step, but not on the rows of a rank.
"""


def features_table() -> str:
    """The text of docs/features.md."""
    found = runpy.run_path(str(ROOT / "tests" / "integration" / "features.py"))
    strategies, refused = found["strategies"](), found["REFUSED"]
    notes: list[str] = []
    rows = []
    for name, feature in found["FEATURES"].items():
        cells = []
        for strategy in strategies:
            refusal = refused.get((name, strategy))
            if refusal is not None and refusal.says not in notes:
                notes.append(refusal.says)
            cells.append("yes" if refusal is None else str(notes.index(refusal.says) + 1))
        rows.append(f"| {feature.about} | {' | '.join(cells)} |")
    head = [f"| feature | {' | '.join(f'`{name}`' for name in strategies)} |", "|---" * (len(strategies) + 1) + "|"]
    numbered = [f"{number}. \u2026 {says}" for number, says in enumerate(notes, start=1)]
    introduction = FEATURES.format(tight=found["TIGHT"], band=found["BAND"])
    return "\n".join([introduction, *head, *rows, "", *numbered]) + "\n"


FRAMEWORKS = """
## Frameworks

What the strategies of each framework train. One recipe gives one curve in all of them, within 1e-4 relative in fp32,
and checkpoints go from each to each: [frameworks.md](frameworks.md).
"""
# framework -> the strategy that is asked what it refuses
ASKED = {"torch": "ddp", "jax": "jax", "tensorflow": "tensorflow"}
OWN = {
    "torch": "`torch.nn.Module`, Keras 3",
    "jax": "`flax.nnx.Module`, a pair of functions `(init, apply)`, Keras 3",
    "tensorflow": "Keras 3, `tf.Module`",
}


def frameworks_table() -> str:
    """The second part of docs/features.md."""
    rows = {}
    for name, entry in registry.MODELS.items():
        modules = registry.resolve(entry.path).modules
        rows[f"`model: {{name: {name}}}`"] = ["yes" if framework in modules else "" for framework in ASKED]
    rows["a model of your own"] = [OWN[framework] for framework in ASKED]
    tasks = ROOT / "unitrain" / "tasks"
    for path in sorted(tasks.glob("*_torch.py")):
        task = path.stem.removesuffix("_torch")
        kind = "".join(word.capitalize() for word in task.split("_"))
        there = ["yes" if (tasks / f"{task}_{SUFFIXES[framework]}.py").exists() else "" for framework in ASKED]
        rows[f"`trainer: unitrain.tasks:{kind}`"] = there
    for precision in ("fp32", "bf16", "fp16"):
        rows[f"`train.precision: {precision}`"] = [_answer(ASKED[framework], precision) for framework in ASKED]
    strategies = [
        ", ".join(f"`{name}`" for name, entry in registry.STRATEGIES.items() if entry.framework == framework)
        for framework in ASKED
    ]
    head = [f"| | {' | '.join(ASKED)} |", "|---" * (len(ASKED) + 1) + "|", f"| strategies | {' | '.join(strategies)} |"]
    return "\n".join([FRAMEWORKS, *head, *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items())]) + "\n"


def _answer(strategy: str, precision: str) -> str:
    """Whether a strategy trains in that precision, as it says itself."""
    recipe = Recipe(trainer="a:B", train=TrainRecipe(precision=precision), strategy=StrategyRecipe(name=strategy))
    problems = registry.resolve(registry.STRATEGIES[strategy].problems)(recipe, Cluster(nodes=1, nproc=2))
    return f"refused: {problems[0].instead}" if problems else "yes"


PAGES = {"recipe.md": recipe_reference, "features.md": lambda: features_table() + frameworks_table()}

if __name__ == "__main__":
    for name, text in PAGES.items():
        path = Path(__file__).with_name(name)
        path.write_text(text(), encoding="utf-8")
        print(f"wrote {path}")
