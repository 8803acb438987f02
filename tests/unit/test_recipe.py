"""Recipe files: what is read, what is refused and in which words, and what is written back."""

from __future__ import annotations

import math
import runpy
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from unitrain.errors import MissingExtra, RecipeError, Refused, UnknownName, UserError
from unitrain.recipe import ModelRecipe, OptimizerRecipe, Recipe, StrategyRecipe, TrainRecipe
from unitrain.recipe_file import build, load_recipe, recipe_from_text, refuse_problems, to_dict, to_yaml
from unitrain.strategy import Problem

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parents[2]

FULL = """\
name: gpt-tiny
trainer: unitrain.tasks:LanguageModel
model: {name: gpt, size: tiny}
data: {name: text, path: python-stdlib, seq_len: 128}
optimizer: {name: adamw, lr: 1e-3, betas: [0.9, 0.95], eps: 1e-8, weight_decay: 0.1, clip: 1.0}
schedule: {name: cosine, warmup_steps: 20}
train: {steps: 300, global_batch: 32, micro_batch: null, precision: fp32, seed: 0, log_every: 10, eval_every: 100}
strategy: {name: fsdp2, options: {}}
launcher: {name: local, nodes: 1, nproc: 2, options: {}}
checkpoint: {every: 100, keep: 3, async: true}
"""

CUSTOM = "trainer: my.module:Mine\n"  # its model and data are its own business


def test_a_recipe_becomes_frozen_dataclasses():
    recipe = recipe_from_text(FULL)
    assert recipe.optimizer == OptimizerRecipe(lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, clip=1.0)
    assert isinstance(recipe.optimizer.lr, float)
    assert recipe.train.micro_batch is None
    assert recipe.model == ModelRecipe(name="gpt", options={"size": "tiny"})
    assert recipe.checkpoint.asynchronous is True
    assert recipe.train == TrainRecipe(steps=300, eval_every=100)
    with pytest.raises(TypeError, match="does not support item assignment"):
        recipe.model.options["size"] = "small"  # type: ignore[index]


def test_only_the_trainer_must_be_given():
    assert recipe_from_text(CUSTOM) == Recipe(trainer="my.module:Mine")


@pytest.mark.parametrize("spelling", ["1e-4", "1E-4", "1.0e-4", "0.0001", "1_0e-5", ".0001"])
def test_every_spelling_of_a_number_is_a_number(spelling):
    assert recipe_from_text(f"{CUSTOM}optimizer: {{lr: {spelling}}}").optimizer.lr == pytest.approx(1e-4, rel=1e-15)


def test_a_whole_number_stands_for_a_number():
    lr = recipe_from_text(f"{CUSTOM}optimizer: {{lr: 1, clip: 2}}").optimizer
    assert (lr.lr, lr.clip) == (1.0, 2.0)
    assert isinstance(lr.clip, float)


def test_a_trainer_of_ones_own_gets_any_model_and_data():
    text = f"{CUSTOM}model: {{name: mine, depth: [1, {{a: null}}]}}\ndata: {{root: /data}}"
    recipe = recipe_from_text(text)
    assert recipe.model.options == {"depth": [1, {"a": None}]}
    assert (recipe.data.name, dict(recipe.data.options)) == ("", {"root": "/data"})


# Mistakes: the text, the overrides, and the whole message.
MISTAKES: list[tuple[str, list[str], str]] = [
    # keys
    (
        f"{CUSTOM}optimzer:\n  lr: 1\n",
        [],
        "gpt.yaml:2: no key 'optimzer.lr', did you mean 'optimizer.lr'?",
    ),
    (
        f"{CUSTOM}optimzer: {{lr: 1, clip: 2}}",
        [],
        "gpt.yaml:2: no key 'optimzer', did you mean 'optimizer'?",
    ),
    (
        f"{CUSTOM}train:\n  steps: 3\n  global_bach: 32\n",
        [],
        "gpt.yaml:4: no key 'train.global_bach', did you mean 'train.global_batch'?",
    ),
    (f"{CUSTOM}lr: 1e-3", [], "gpt.yaml:2: no key 'lr', did you mean 'optimizer.lr'?"),
    (f"{CUSTOM}train.steps: 3", [], "gpt.yaml:2: no key 'train.steps'; write it as a group: `train: {steps: ...}`"),
    (
        f"{CUSTOM}zzz: 1",
        [],
        "gpt.yaml:2: no key 'zzz'; a recipe has the keys name, trainer, model, data, optimizer, schedule, train, "
        "strategy, launcher, code, checkpoint, recovery, guard, rl",
    ),
    (
        f"{CUSTOM}checkpoint: {{asynchronous: true}}",
        [],
        "gpt.yaml:2: no key 'checkpoint.asynchronous'; checkpoint has the keys every, keep, async, memory_every, path",
    ),
    (
        f"{CUSTOM}launcher: {{\n nproc: 2,\n time: 1}}",
        [],
        "gpt.yaml:4: no key 'launcher.time'; launcher has the keys name, nodes, nproc, options",
    ),
    (
        "name: x",
        [],
        "gpt.yaml: no key 'trainer'; it must be given: `module:Class` or `path/to/file.py:Class`, a subclass of "
        "unitrain.Trainer",
    ),
    # types
    (f"{CUSTOM}train:\n  steps: abc", [], "gpt.yaml:3: train.steps is 'abc' (str); it must be a whole number"),
    (f"{CUSTOM}train: {{steps: 1.5}}", [], "gpt.yaml:2: train.steps is 1.5 (float); it must be a whole number"),
    (f"{CUSTOM}train: {{steps: true}}", [], "gpt.yaml:2: train.steps is true (bool); it must be a whole number"),
    (f"{CUSTOM}train: {{steps: null}}", [], "gpt.yaml:2: train.steps is null; it must be a whole number"),
    (f"{CUSTOM}train:\n  steps:\n", [], "gpt.yaml:3: train.steps is null; it must be a whole number"),
    (f"{CUSTOM}train: {{steps: [1]}}", [], "gpt.yaml:2: train.steps is [1] (list); it must be a whole number"),
    (
        f"{CUSTOM}train: {{steps: {{a: 1}}}}",
        [],
        "gpt.yaml:2: train.steps is a group of keys; it must be a whole number",
    ),
    (f"{CUSTOM}train: 3", [], "gpt.yaml:2: train is 3 (int); it must be a group of keys"),
    (f"{CUSTOM}train:", [], "gpt.yaml:2: train is null; it must be a group of keys"),
    (f"{CUSTOM}train: [steps]", [], "gpt.yaml:2: train is ['steps'] (list); it must be a group of keys"),
    (f"{CUSTOM}model: gpt", [], "gpt.yaml:2: model is 'gpt' (str); it must be a group of keys"),
    (f"{CUSTOM}model: {{name: 3}}", [], "gpt.yaml:2: model.name is 3 (int); it must be text"),
    (f"{CUSTOM}name: 2026", [], "gpt.yaml:2: name is 2026 (int); it must be text"),
    (f"{CUSTOM}name: on", [], "gpt.yaml:2: name is true (bool); it must be text"),
    (
        f"{CUSTOM}train: {{micro_batch: many}}",
        [],
        "gpt.yaml:2: train.micro_batch is 'many' (str); it must be a whole number or null",
    ),
    (f"{CUSTOM}optimizer: {{lr: fast}}", [], "gpt.yaml:2: optimizer.lr is 'fast' (str); it must be a number"),
    (f"{CUSTOM}optimizer: {{lr: true}}", [], "gpt.yaml:2: optimizer.lr is true (bool); it must be a number"),
    (f"{CUSTOM}optimizer: {{lr: .nan}}", [], "gpt.yaml:2: optimizer.lr is nan; it must be a finite number"),
    (f"{CUSTOM}optimizer: {{clip: .inf}}", [], "gpt.yaml:2: optimizer.clip is inf; it must be a finite number"),
    (
        f"{CUSTOM}optimizer: {{lr: {'9' * 400}}}",
        [],
        "gpt.yaml:2: optimizer.lr is inf; it must be a finite number",
    ),
    (
        f"{CUSTOM}optimizer: {{betas: 0.9}}",
        [],
        "gpt.yaml:2: optimizer.betas is 0.9 (float); it must be a list of 2 numbers",
    ),
    (
        f"{CUSTOM}optimizer:\n  betas: [0.9]",
        [],
        "gpt.yaml:3: optimizer.betas is [0.9] (list); it must be a list of 2 numbers",
    ),
    (
        f"{CUSTOM}optimizer:\n  betas:\n  - 0.9\n  - high\n",
        [],
        "gpt.yaml:5: optimizer.betas[1] is 'high' (str); it must be a number",
    ),
    (f"{CUSTOM}checkpoint: {{async: 1}}", [], "gpt.yaml:2: checkpoint.async is 1 (int); it must be true or false"),
    (f"{CUSTOM}strategy: {{options: 3}}", [], "gpt.yaml:2: strategy.options is 3 (int); it must be a group of keys"),
    # values
    (f"{CUSTOM}\n\ntrain:\n  global_batch: 0", [], "gpt.yaml:5: train.global_batch is 0; it must be at least 1"),
    (
        f"{CUSTOM}optimizer: {{\n  lr: 1,\n  betas: [0.9, 1.0]}}",
        [],
        "gpt.yaml:4: optimizer.betas[1] is 1.0; it must be at least 0 and below 1",
    ),
    (
        f"{CUSTOM}schedule: {{name: cosin}}",
        [],
        "gpt.yaml:2: schedule.name is 'cosin'; it must be one of constant, linear, cosine, wsd",
    ),
    (f"{CUSTOM}name: a/b", [], "gpt.yaml:2: name is 'a/b'; use at most 63 letters, digits, '.', '_' and '-'"),
    (f"{CUSTOM}name: ''", [], "gpt.yaml:2: name is ''; use at most 63 letters, digits, '.', '_' and '-'"),
    (f"{CUSTOM}name: .git", [], "gpt.yaml:2: name is '.git'; it must start with a letter or a digit"),
    (
        "trainer: Mine",
        [],
        "gpt.yaml:1: trainer is 'Mine'; write module:Class or path/to/file.py:Class",
    ),
    # models and data
    (
        "trainer: unitrain.tasks:LanguageModel\nmodel: {name: gtp}",
        [],
        "no model named 'gtp', did you mean 'gpt'?; known: convnet, gpt, hf, mlp",
    ),
    (
        "trainer: unitrain.tasks:Classification\nmodel: {name: mlp}\ndata: {name: digit}",
        [],
        "no data source named 'digit', did you mean 'digits'?; known: arrays, datasets, digits, records, text, tokens",
    ),
    (
        "trainer: unitrain.tasks:LanguageModel",
        [],
        "gpt.yaml: no key 'model.name'; unitrain.tasks:LanguageModel needs one of gpt, mlp, convnet, hf",
    ),
    (
        "trainer: unitrain.tasks:LanguageModel\nmodel:\n  name: gpt\n  layer: 3",
        [],
        "gpt.yaml:4: no key 'model.layer', did you mean 'model.layers'?",
    ),
    (
        f"{CUSTOM}model: {{name: gpt,\n layers: few}}",
        [],
        "gpt.yaml:3: model.layers is 'few' (str); it must be a whole number or null",
    ),
    (f"{CUSTOM}model: {{name: gpt, options: {{layers: 1}}}}", [], "gpt.yaml:2: no key 'model.options.layers'; "),
    (
        f"{CUSTOM}data: {{name: text}}",
        [],
        "gpt.yaml:2: no key 'data.path'; it must be given: a file, a folder, a glob, `python-stdlib` (12 MB of "
        "source code that every Python has), or a list of these",
    ),
    (
        f"{CUSTOM}data:\n  name: text\n  path: [a, 3]",
        [],
        "gpt.yaml:4: data.path[1] is 3 (int); it must be text",
    ),
    (
        f"{CUSTOM}data: {{name: text, path: 3}}",
        [],
        "gpt.yaml:2: data.path is 3 (int); it must be text or a list of texts",
    ),
    # the command line
    (CUSTOM, ["optimzer.lr=1"], "on the command line: no key 'optimzer.lr', did you mean 'optimizer.lr'?"),
    (CUSTOM, ["train.steps=abc"], "on the command line: train.steps is 'abc' (str); it must be a whole number"),
    (CUSTOM, ["train.steps=0", "train.seed=-1"], "on the command line: train.seed is -1; it must be at least 0"),
    (CUSTOM, ["train.steps"], "on the command line: 'train.steps' is not key=value, such as train.steps=200"),
    (CUSTOM, ["=3"], "on the command line: '=3' is not key=value, such as train.steps=200"),
    (CUSTOM, ["train..steps=3"], "on the command line: 'train..steps=3' is not key=value, such as train.steps=200"),
    (
        f"{CUSTOM}train: {{steps: 3}}",
        ["train.steps.x=3"],
        "on the command line: train.steps is 3, which has no key 'x'",
    ),
    (CUSTOM, ["train={steps: [}"], "on the command line: this is not YAML: "),
    (CUSTOM, ["train={steps: 1, steps: 2}"], "on the command line: this is not YAML: found duplicate key steps"),
    (
        "trainer: unitrain.tasks:LanguageModel\nmodel: {name: gpt,\n size: tiny}",
        ["model.name=mlp"],
        "gpt.yaml:3: no key 'model.size'; model has the keys in_features, hidden, num_classes, dropout",
    ),
    # references
    (
        f"{CUSTOM}train: {{steps: '${{train.stepz}}'}}",
        [],
        "gpt.yaml:2: train.steps refers to ${train.stepz}, and the recipe has no such key",
    ),
    (
        f"{CUSTOM}train:\n  steps: ${{train.seed}}\n  seed: ${{train.steps}}",
        [],
        "gpt.yaml:3: train.steps refers to itself, by ${train.seed}",
    ),
    (
        f"{CUSTOM}train: {{steps: '${{oc.env:STEPS}}'}}",
        [],
        "gpt.yaml:2: '${oc.env:STEPS}' is refused: recipes read neither the environment nor run code; only "
        "${group.key}, another key of the recipe, can stand here",
    ),
    # YAML
    ("", [], "gpt.yaml is empty; a recipe needs at least the key 'trainer'"),
    ("# nothing\n", [], "gpt.yaml is empty; a recipe needs at least the key 'trainer'"),
    ("- a\n- b", [], "gpt.yaml:1: this is a list; a recipe is groups of keys such as `train:`"),
    ("hello", [], "gpt.yaml:1: this is 'hello' (str); a recipe is groups of keys such as `train:`"),
    ("42", [], "gpt.yaml:1: this is '42' (int); a recipe is groups of keys such as `train:`"),
    (f"{CUSTOM}train: {{steps: 1", [], "gpt.yaml:3: this is not YAML: "),
    (f"{CUSTOM}train: a: b", [], "gpt.yaml:2: this is not YAML: mapping values are not allowed in this context"),
    (f"{CUSTOM}\ttrain: 1", [], "gpt.yaml:2: this is not YAML: "),
    (f"{CUSTOM}---\n{CUSTOM}", [], "gpt.yaml:2: this is not YAML: but found another document"),
    (
        f"{CUSTOM}train:\n  steps: 1\n  seed: 2\n  steps: 3",
        [],
        "gpt.yaml:5: the key 'train.steps' was given before, in line 3",
    ),
    (f"{CUSTOM}3: x", [], "gpt.yaml:2: a key must be a word; '3' (int) stands here"),
    (f"{CUSTOM}1e3: x", [], "gpt.yaml: a key must be a word; 1000.0 stands somewhere"),
    (f"{CUSTOM}? [a, b]\n: x", [], "gpt.yaml:2: a key must be a word; a list stands here"),
    (
        f"{CUSTOM}launcher: {{options: {{time: 2:00:00}}}}",
        [],
        "gpt.yaml:2: YAML reads 2:00:00 as the number 7200; put it in quotes",
    ),
    (
        f"{CUSTOM}launcher: {{options: {{mode: 0755}}}}",
        [],
        "gpt.yaml:2: YAML reads 0755 as the number 493; put it in quotes",
    ),
]


@pytest.mark.parametrize(("text", "overrides", "message"), MISTAKES, ids=[f"{n:02}" for n in range(len(MISTAKES))])
def test_a_mistake_is_told_with_its_place_and_its_remedy(text, overrides, message):
    with pytest.raises(UserError) as caught:
        recipe_from_text(text, "gpt.yaml", overrides)
    assert caught.value.exit_code == 78
    told = str(caught.value)
    # the words of the YAML library, and a list of all model options, are not ours to fix here
    assert told.startswith(message) if message.endswith(": ") or message.endswith("; ") else told == message


HOSTILE: dict[str, tuple[str, str]] = {
    "a Python object": (
        "a: !!python/object/apply:os.system [touch hacked]",
        r"the tag !!python/object/apply:os.system is refused",
    ),
    "a Python name": ("a: !!python/name:os.system", r"the tag \S+ is refused"),
    "a local tag": ("a: !mine 3", r"the tag !mine is refused"),
    "binary": ("a: !!binary aGVsbG8=", r"the tag !!binary is refused"),
    "a set": ("a: !!set {x, y}", r"the tag !!set is refused"),
    "a resolver": ("a: ${oc.env:HOME}", r"'\$\{oc.env:HOME\}' is refused"),
    "a nested resolver": ("a: ${oc.${b}:HOME}", r"is refused: recipes read neither"),
    "a resolver in a list": ("a: [1, 'x ${oc.decode:1}']", r"is refused: recipes read neither"),
    "a resolver as a key": ("${oc.env:HOME}: 1", r"is refused: recipes read neither"),
    "an escaped reference": (r"a: '\${oc.env:HOME}'", r"is refused: recipes read neither"),
    "an open reference": ("a: ${", r"'\$\{' is refused"),
    "a relative resolver": ("a: ${.b:c}", r"is refused: recipes read neither"),
    "a thousand braces": ("a: " + "${" * 5000, r"is refused: recipes read neither"),
    "deep lists": ("a: " + "[" * 100_000, r"groups are nested deeper than 32"),
    "deep groups": ("a: " + "{a: " * 100, r"groups are nested deeper than 32"),
    "deep blocks": ("".join(" " * n + "a:\n" for n in range(100)), r"groups are nested deeper than 32"),
    "many aliases": ("a: &a 1\nb: [" + "*a, " * 101 + "]", r"more than 100 aliases"),
    "a billion laughs": (
        "a: &a [x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"{n}: &{n} [{', '.join(['*' + p] * 9)}]\n" for p, n in zip("abcdefg", "bcdefgh", strict=True)),
        r"more than 10000 values",
    ),
    "a list that holds itself": ("a: &a [*a]", r"hold themselves|recursive"),
    "a group that holds itself": ("a: &a {b: *a}", r"hold themselves|recursive"),
    "a merge of itself": ("a: &a {<<: *a}", r"hold themselves|recursive|not YAML"),
    "a billion references": (
        "m0: xxxxxxxxxxxxxxxxxxxx\n" + "".join(f"m{n + 1}: {f'${{model.m{n}}}' * 20}\n" for n in range(9)),
        r"grows beyond 1 MiB",
    ),
    "a billion references to nothing": (
        "m0: ''\n" + "".join(f"m{n + 1}: {f'${{model.m{n}}}' * 99}\n" for n in range(9)),
        r"grows beyond 1 MiB",
    ),
    "a billion references to groups": (
        "m0: {}\n" + "".join(f"m{n + 1}: [" + f"'${{model.m{n}}}', " * 99 + "]\n" for n in range(9)),
        r"grows beyond 1 MiB",
    ),
    "a long chain of references": (
        "".join(f"m{n}: ${{model.m{n + 1}}}\n" for n in range(2000)) + "m2000: 1",
        r"through more than 32 others",
    ),
    "a huge number": ("a: " + "9" * 5000, r"not YAML: Exceeds the limit"),
    "a crowd": ("a: [" + "x, " * 20_000 + "]", r"more than 10000 values"),
    "a huge file": ("a: " + "x" * (1 << 20), r"larger than 1 MiB"),
    "control characters": ("a: \x00", r"not YAML"),
    "half a surrogate": ("a: \ud800", r"not YAML"),
    "an undefined alias": ("a: *b", r"not YAML: found undefined alias"),
    "a directive": ("%YAML 3.0\n---\na: 1", r"not YAML"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_yaml_is_refused_as_a_bad_recipe(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, message = HOSTILE[case]
    with pytest.raises(RecipeError, match=message):
        recipe_from_text(text if case == "deep blocks" else f"{CUSTOM}model:\n{textwrap.indent(text, '  ')}")
    assert not list(tmp_path.iterdir())


def test_hostile_values_on_the_command_line_are_refused_too():
    for value in ("${oc.env:HOME}", "!!python/name:os.system", "[" * 1000, "- 1\n2", "2:00:00", "\ud800"):
        with pytest.raises(RecipeError, match="on the command line"):
            recipe_from_text(CUSTOM, overrides=[f"strategy.options.x={value}"])


def test_overrides_take_the_place_of_values_and_are_typed_as_yaml():
    recipe = recipe_from_text(
        FULL,
        overrides=[
            "train.steps=50",
            "optimizer.lr=3e-4",
            "optimizer.betas=[0.8, 0.9]",
            "optimizer.clip=null",
            "checkpoint.async=false",
            "strategy.options.deep.er=x=y",
            "train.steps=60",
            "model.size=small",
        ],
    )
    assert (recipe.train.steps, recipe.optimizer.lr, recipe.optimizer.betas) == (60, 3e-4, (0.8, 0.9))
    assert recipe.optimizer.clip is None
    assert recipe.checkpoint.asynchronous is False
    assert recipe.strategy.options == {"deep": {"er": "x=y"}}
    assert recipe.model.options == {"size": "small"}
    assert recipe.train.global_batch == 32


def test_an_override_of_a_group_leaves_nothing_of_it():
    recipe = recipe_from_text(FULL, overrides=["model={name: mlp, hidden: [8]}"])
    assert recipe.model == ModelRecipe(name="mlp", options={"hidden": [8]})


def test_a_flag_is_weaker_than_an_override_and_drops_the_old_backends_options(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(f"{CUSTOM}strategy: {{name: fsdp2, options: {{shard_size: 2}}}}\nlauncher: {{nproc: 2}}")
    assert load_recipe(path, strategy="fsdp2").strategy.options == {"shard_size": 2}
    assert dict(load_recipe(path, strategy="ddp").strategy.options) == {}
    assert load_recipe(path, ["strategy.options.a=1"], strategy="ddp").strategy.options == {"a": 1}
    assert load_recipe(path, ["launcher.nproc=5"], nproc=3, nodes=4, launcher="torchrun").launcher.nproc == 5
    assert load_recipe(path, nproc=3, nodes=4).launcher.nodes == 4


def test_a_reference_is_the_value_of_another_key_or_its_default():
    text = f"{CUSTOM}data: {{len: 64, names: [a, b]}}\nmodel: {{width: '${{data.len}}', names: '${{data.names}}', "
    recipe = recipe_from_text(text + "seed: '${train.seed}', tag: 'w${model.width}-${optimizer.name}'}")
    assert recipe.model.options == {"width": 64, "names": ["a", "b"], "seed": 0, "tag": "w64-adamw"}


def test_a_reference_follows_overrides():
    text = f"{CUSTOM}train: {{steps: 100, eval_every: '${{train.steps}}'}}"
    assert recipe_from_text(text, overrides=["train.steps=7"]).train.eval_every == 7
    assert recipe_from_text(CUSTOM, overrides=["train.steps=8", "train.seed=${train.steps}"]).train.seed == 8


def test_anchors_and_merges_work_and_keep_their_lines():
    text = f"{CUSTOM}model: &m\n  a: 1\n  b: 2\ndata:\n  <<: *m\n  b: 3\n"
    assert recipe_from_text(text).data.options == {"a": 1, "b": 3}


def test_the_written_recipe_reads_back_equal():
    recipe = recipe_from_text(FULL, overrides=["strategy.options={a: [1, {b: null}], c: '1e3', d: 'yes'}"])
    assert recipe_from_text(to_yaml(recipe)) == recipe
    assert "  betas: [0.9, 0.95]\n" in to_yaml(recipe)
    assert "  async: true\n" in to_yaml(recipe)
    assert to_dict(recipe)["model"] == {"name": "gpt", "size": "tiny"}
    assert recipe_from_text(to_yaml(Recipe(trainer="a:B"))) == Recipe(trainer="a:B")


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8")).filter(lambda text: "${" not in text),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(codec="ascii", categories=["L"]), min_size=1), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=40, deadline=None)
@given(plain, st.floats(min_value=0, allow_infinity=False, allow_nan=False))
def test_any_plain_value_survives_writing_and_reading(value, lr):
    recipe = Recipe(trainer="a:B", optimizer=OptimizerRecipe(lr=lr), model=ModelRecipe(name="m", options={"x": value}))
    assert recipe_from_text(to_yaml(recipe)) == recipe


ODD_WORDS = [
    "1e3", "1e-4", "yes", "null", "~", "0x10", "1_000", ".inf", "-.5", "2:00:00", "010", "+1", "1.", "nan", "???",
    "", " a", "a: b", "#", "- a", "é\n1e3", "1e3\n", "a\tb", "\x7f",
    "\x85", "a\x85b", "0\x85\n", "\u2028", "a\u2029 b", "\ufeffx",
]  # fmt: skip


@pytest.mark.parametrize("word", ODD_WORDS)
def test_a_word_that_looks_like_something_else_stays_a_word(word):
    recipe = Recipe(trainer="a:B", strategy=StrategyRecipe(options={"x": word, word: [word]}))
    assert recipe_from_text(to_yaml(recipe)) == recipe


def test_a_trainers_file_is_found_here_or_beside_the_recipe(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path)
    path = Path("sub/r.yaml")
    path.write_text("trainer: code/mine.py:Mine")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(caught.value) == (
        f"sub/r.yaml:1: trainer is 'code/mine.py:Mine', and there is no file 'code/mine.py' in {tmp_path}, "
        "nor beside the recipe in sub"
    )
    (tmp_path / "sub/code").mkdir()
    (tmp_path / "sub/code/mine.py").touch()
    assert load_recipe(path).trainer == f"{tmp_path}/sub/code/mine.py:Mine"
    (tmp_path / "code").mkdir()
    (tmp_path / "code/mine.py").touch()
    assert load_recipe(path).trainer == f"{tmp_path}/code/mine.py:Mine"


def test_a_file_that_cannot_be_read_is_told_with_what_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("recipes").mkdir()
    Path("recipes/gpt_tiny.yaml").write_text(FULL)
    Path("recipes/latin.yaml").write_bytes(b"name: x\ntrainer: \xe9:a\n")
    Path("recipes/bom.yaml").write_bytes(b"\xef\xbb\xbf" + FULL.encode())
    Path("recipes/big.yaml").write_bytes(b"#" * (1 << 21))
    assert load_recipe("recipes/bom.yaml").name == "gpt-tiny"
    for name, message in {
        "recipes/gpt_tinny.yaml": "no recipe file 'recipes/gpt_tinny.yaml', did you mean 'recipes/gpt_tiny.yaml'?",
        "recipes/zzzzzzzzzzzz": "no recipe file 'recipes/zzzzzzzzzzzz'; in recipes there are "
        "big.yaml, bom.yaml, gpt_tiny.yaml, latin.yaml",
        "none/x.yaml": "no recipe file 'none/x.yaml'",
        "recipes": "recipes is a folder, not a recipe file; in recipes there are "
        "big.yaml, bom.yaml, gpt_tiny.yaml, latin.yaml",
        "recipes/latin.yaml": "recipes/latin.yaml:2: byte 0xe9 is not UTF-8 text; save it as UTF-8",
        "recipes/big.yaml": "recipes/big.yaml is larger than 1 MiB; a recipe is a page of settings",
        "recipes/bom.yaml/x": "recipe file 'recipes/bom.yaml/x' cannot be read: Not a directory",
    }.items():
        with pytest.raises(RecipeError) as caught:
            load_recipe(name)
        assert str(caught.value) == message


def test_every_problem_is_listed_with_its_alternative():
    refuse_problems([])
    with pytest.raises(Refused, match=r"^a is bad; use b$"):
        refuse_problems([Problem("a is bad", "use b")])
    with pytest.raises(Refused) as caught:
        refuse_problems([Problem("a is bad", "use b"), Problem("c is bad", "use d")])
    assert str(caught.value) == "the recipe cannot run as it is:\n  - a is bad; use b\n  - c is bad; use d"


def test_what_is_not_installed_is_told_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        MissingExtra, match=r"data source 'digits' needs scikit-learn: pip install 'unitrain\[digits\]'"
    ):
        recipe_from_text(f"{CUSTOM}data: {{name: digits}}")


def test_unknown_names_carry_what_is_known():
    with pytest.raises(UnknownName, match="known: convnet, gpt, hf, mlp"):
        recipe_from_text("trainer: unitrain.tasks:Classification\nmodel: {name: resnet}\ndata: {name: digits}")


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of some third party."""

    many: tuple[int, ...] = ()
    mode: Literal["a", "b"] = "a"
    table: dict[str, int] = field(default_factory=dict)
    anything: Any = None
    inner: Inner | None = None


@dataclass(frozen=True, kw_only=True)
class Inner:
    x: int = 0


def test_a_class_of_ones_own_is_built_from_plain_values():
    values = {"many": [1, 2], "mode": "b", "table": {"k": 1}, "anything": {"a": [1]}, "inner": {"x": 3}}
    assert build(Options, values) == Options(
        many=(1, 2), mode="b", table={"k": 1}, anything={"a": [1]}, inner=Inner(x=3)
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"many": [1, "x"]}, "data.many[1] is 'x' (str); it must be a whole number"),
        ({"many": 1}, "data.many is 1 (int); it must be a list of whole numbers"),
        ({"mode": "c"}, "data.mode is 'c' (str); it must be one of a, b"),
        ({"table": {"k": "v"}}, "data.table.k is 'v' (str); it must be a whole number"),
        ({"inner": {"y": 3}}, "no key 'data.inner.y'; data.inner has the keys x"),
        ({"inner": 3}, "data.inner is 3 (int); it must be a group of keys or null"),
    ],
)
def test_a_class_of_ones_own_is_checked_the_same_way(values, message):
    with pytest.raises(RecipeError) as caught:
        build(Options, values, "data")
    assert str(caught.value) == message


def test_numbers_stay_finite():
    with pytest.raises(RecipeError, match="finite"):
        build(OptimizerRecipe, {"lr": math.inf}, "optimizer")


def test_the_reference_is_current():
    written = (ROOT / "docs/recipe.md").read_text(encoding="utf-8")
    assert written == runpy.run_path(str(ROOT / "docs/generate.py"))["recipe_reference"](), (
        "run python docs/generate.py"
    )


def test_every_example_in_the_reference_is_a_recipe():
    text = (ROOT / "docs/recipe.md").read_text(encoding="utf-8")
    example = text.partition("```yaml\n")[2].partition("```")[0]
    assert yaml.safe_load(example)["name"] == "gpt-tiny"
    recipe_from_text(example)
