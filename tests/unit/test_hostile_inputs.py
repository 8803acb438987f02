"""Whatever stands in a file, a folder or a message: it is refused in a sentence, soon, and nothing of it is run.

Families of inputs are generated; CI takes some of each, `make drills` all (more than 1,500).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import pytest

from unitrain.agent import local_job, records
from unitrain.agent.job import FILE, read_job
from unitrain.agent.rank import RankStart
from unitrain.agent.watched import Rank
from unitrain.checkpoint import CheckpointReader, Saver, list_checkpoints, open_newest, take_over
from unitrain.checkpoint.strict import seal, unseal
from unitrain.cli.runs import state_of, summary
from unitrain.errors import UnitrainError
from unitrain.importers.accelerate import read_accelerate
from unitrain.importers.ds_config import read_ds_config
from unitrain.importers.torchrun import import_torchrun
from unitrain.meeting import Meeting
from unitrain.recipe_file import load_recipe
from unitrain.run import Run
from unitrain.strategy import Shard
from unitrain.trainer_path import resolve_trainer
from unitrain.world import World

SECONDS = 10.0  # that any one input may take, on a busy machine
GROWTH_BYTES = 600 << 20  # of the process over a whole family
WORDS = 4100  # letters of a message
CI_SHARE = 6  # of so many inputs, CI tries one

RECIPE = "trainer: unitrain.tasks:Classification\nmodel: {name: mlp, in_features: 64, num_classes: 10}\n"
RECIPE += "data: {name: digits}\ntrain: {steps: 3}\n"
# dtypes, counts and words that no file of ours holds
NUMBERS: list[Any] = [-1, -(1 << 70), 1 << 57, 1 << 200, 1.5, 1e300, True, None, "5", [], {}, [1], "\x00", "NaN"]
NAMES = [
    *("", ".", "..", "/", "../x", "../../../etc/passwd", "/etc/passwd", "//etc/passwd", "a/../b", "~/x", "$HOME/x"),
    *("`touch CANARY`", "$(touch CANARY)", "; touch CANARY", "| touch CANARY", "-rf", "--help", "x\ny", "x\x00y"),
    *("C:\\x", "\\\\host\\x", "x" * 70_000, "\u202etxt", "\ud800", "part-0-0.safetensors/../../../x", "MANIFEST.json"),
    *("part-0-0.safetensors\n", " part-0-0.safetensors", "part-0-0.SAFETENSORS", "part--1-0.safetensors", "fd://3"),
    *("part-0-99999999999999999999.safetensors", "file:///etc/passwd", "http://localhost/x", "part-0-0.pickle", "NUL"),
]
# of these, the ones that are ordinary words
WORDS_TOO = {
    *("MANIFEST.json", "NUL", "part-0-0.pickle", "part-0-0.SAFETENSORS", "part--1-0.safetensors"),
    "part-0-99999999999999999999.safetensors",
}


class Input(NamedTuple):
    """One hostile input: what it is called, and the reading of it. `harmless`: it may also be accepted."""

    name: str
    read: Callable[[], Any]
    harmless: bool = False


class Slow(Exception):
    """The input took too long."""


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """A file that exists if anything of the inputs was run."""
    return tmp_path / "canary"


@pytest.fixture(scope="module", autouse=True)
def _counted() -> Iterator[list[int]]:
    yield counts
    print(f"\nhostile inputs: {sum(counts)} tried, {sum(counts)} refused or harmless, 0 executed", file=sys.stderr)


counts: list[int] = []


def try_all(inputs: Sequence[Input], canary: Path, *, drills: bool) -> None:
    """Each is refused by a UnitrainError of a few sentences, in time, and without being run."""
    chosen = inputs if drills else inputs[:: max(min(CI_SHARE, len(inputs) // 10), 1)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    problems = []
    for found in chosen:
        if problem := _problem(found):
            problems.append(f"{found.name[:200]!r}: {problem}")
        assert not canary.exists(), f"{found.name[:200]!r} was run: {canary.read_text()}"
    assert not problems, f"{len(problems)} of {len(chosen)}:\n" + "\n".join(problems[:40])
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    assert grown < GROWTH_BYTES, f"{grown} bytes of memory were taken"
    counts.append(len(chosen))


def _problem(found: Input) -> str | None:
    def ring(number: int, frame: FrameType | None) -> None:
        raise Slow(f"it takes more than {SECONDS:g} s")

    before = signal.signal(signal.SIGALRM, ring)
    left = signal.setitimer(signal.ITIMER_REAL, SECONDS)[0]
    try:
        found.read()
    except UnitrainError as error:
        said = str(error)
        return None if 10 < len(said) < WORDS and "Traceback" not in said else f"it is refused by {said[:200]!r}"
    except BaseException as error:
        return f"it ends in {type(error).__name__}: {''.join(traceback.format_exception(error)[-4:])[-1500:]}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, max(left - SECONDS, 1) if left else 0)
        signal.signal(signal.SIGALRM, before)
    return None if found.harmless else "it is accepted"


# --- recipes -----------------------------------------------------------------------------------------------------


def tagged(canary: Path) -> list[tuple[str, str]]:
    """YAML that makes objects or runs code under an unsafe loader."""
    touch = f"[touch {canary}]"
    code = f"['open({str(canary)!r}, \"w\")']".replace("'open", '"open').replace("w\")']", 'w\\")"]')
    return [
        ("system", f"!!python/object/apply:os.system {touch}"),
        ("popen", f"!!python/object/apply:subprocess.Popen [[touch, {canary}]]"),
        ("eval", f"!!python/object/apply:builtins.eval {code}"),
        ("new", f"!!python/object/new:os.system {touch}"),
        ("name", "!!python/name:os.system"),
        ("module", "!!python/module:os"),
        ("object", "!!python/object:unitrain.recipe.Recipe {}"),
        ("tuple", "!!python/tuple [1]"),
        ("bytes", "!!python/bytes aGk="),
        ("binary", "!!binary aGk="),
        ("set", "!!set {a}"),
        ("omap", "!!omap [a: 1]"),
        ("own", "!include /etc/passwd"),
        ("env", "!ENV ${HOME}"),
        ("uri", "!<tag:yaml.org,2002:python/object/apply:os.getpid> []"),
        ("verbatim", "!<!x> 1"),
    ]


# of these, what another tool's file may hold: there it is a text, and never looked up
TEXTS_TOO = ("${.name}", "${..x}")


def looked_up(canary: Path) -> list[str]:
    """What OmegaConf and Hydra would look up or run."""
    return [
        *("${oc.env:HOME}", "${env:HOME}", "${oc.env:HOME,x}", "${oc.decode:x}", "${oc.create:{a: 1}}", "${.name}"),
        *(f"${{eval:open('{canary}','w')}}", "${oc.select:name}", "${oc.dict.keys:train}", "${oc.deprecated:x}"),
        *("${now:%Y}", "${hydra:run.dir}", "${${name}}", "${train[steps]}", "${..x}", "${}", "${", "${a b}", "${a:}"),
        *("x${oc.env:HOME}y", "${oc.env:HOME}${name}", "\\${oc.env:HOME}", "${oc.env:\u200bHOME}", "${name", "${a'b}"),
    ]


def recipe_inputs(folder: Path, canary: Path) -> list[Input]:
    """Texts in place of a recipe, and values on the command line."""
    places = [
        *("name: {}", "trainer: {}", "train: {{steps: {}}}", "train: {}", "model: {}", "data: {{name: {}}}"),
        *("optimizer: {{betas: [{}, 0.9]}}", "strategy: {{options: {{x: [[{}]]}}}}", "launcher: {{nproc: {}}}"),
        *("checkpoint: {{path: {}}}", "? {}\n: 1", "recovery: {{hang_seconds: {}}}"),
    ]
    texts: list[tuple[str, str | bytes, bool]] = []
    for tag, text in tagged(canary):
        texts += [(f"tag {tag} at {place}", f"{RECIPE}\n{place.format(text)}\n", False) for place in places]
    for text in looked_up(canary):
        quoted = json.dumps(text)
        texts += [(f"{text} at {place}", f"x_{RECIPE}{place.format(quoted)}\n", False) for place in places]
    for depth in (33, 100, 1000, 20_000, 200_000):
        for opened, closed in (("[", "]"), ("{a: ", "}"), ("- ", ""), ("? ", ""), ("!!seq [", "]")):
            text = f"{RECIPE}strategy: {{options: {{x: {opened * depth}1{closed * depth}}}}}\n"
            texts.append((f"{depth} times {opened}", text, False))
        block = "\n".join(f"{' ' * level}a:" for level in range(min(depth, 1000)))
        texts.append((f"block {depth}", f"{RECIPE}{block}\n", False))
    for width in (2, 9, 50):
        for levels in (4, 9, 30, 99):
            lines = ["a0: &a0 [1, 2]"]
            for level in range(1, levels):
                lines.append(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * width)}]")
            texts.append((f"bomb {width}^{levels}", f"{RECIPE}" + "\n".join(lines) + "\n", False))
            merged = ["a0: &a0 {x: 1}"]
            merged += [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * width)}]}}" for n in range(1, levels)]
            texts.append((f"merge bomb {width}^{levels}", f"{RECIPE}" + "\n".join(merged) + "\n", False))
            references = [f"a{n}: '{''.join([f'${{a{n - 1}}}'] * width)}'" for n in range(1, levels)]
            text = f"{RECIPE}a0: xxxxxxxx\n" + "\n".join(references) + "\n"
            texts.append((f"reference bomb {width}^{levels}", text, False))
    for size in (1 << 20, 8 << 20):
        texts += [
            (f"{size} letters", f"{RECIPE}name: {'x' * size}\n", False),
            (f"a key of {size} letters", f"{RECIPE}{'k' * size}: 1\n", False),
            (f"{size} keys", RECIPE + "".join(f"k{n}: 1\n" for n in range(size // 12)), False),
            (f"a comment of {size} letters", f"#{'x' * size}\n{RECIPE}", False),
        ]
    for key in ("trainer", "train", "data", "model"):
        texts.append((f"{key} twice", f"{RECIPE}{key}: {{}}\n", False))
        texts.append((f"{key} twice, quoted", f'{RECIPE}"{key}": {{}}\n', False))
        texts.append((f"{key} a list", f"{RECIPE.replace(f'{key}:', f'x{key}:', 1)}{key}: [1, 2]\n", False))
    texts += [
        *((f"twice below {key}", f"{RECIPE}{key}: {{a: 1, a: 2}}\n", False) for key in ("strategy", "optimizer")),
        *((f"key {key}", f"{RECIPE}{key}: 1\n", False) for key in ("1", "1.5", "null", "true", "[a]", "{a: 1}", "1e3")),
        *((f"key {key!r}", f"{RECIPE}{json.dumps(key)}: 1\n", False) for key in ("__class__", "__init__", "", "a.b")),
        *((f"digits {n}", f"{RECIPE}train: {{steps: {'9' * n}}}\n", False) for n in (30, 5000, 100_000)),
        *(("itself", f"{RECIPE}{text}\n", False) for text in ("a: &a [*a]", "a: &a {b: *a}", "a: &a {<<: *a}")),
        *((f"refers {text}", f"{RECIPE}a: '{text}'\nb: '${{a}}'\n", False) for text in ("${a}", "${b}", "${no.key}")),
        ("two documents", f"{RECIPE}---\n{RECIPE}", False),
        ("a directive", f"%TAG ! tag:yaml.org,2002:python/\n---\n{RECIPE}x: !name:os.system\n", False),
        ("UTF-16", RECIPE.encode("utf-16"), False),
        ("UTF-32", RECIPE.encode("utf-32"), False),
        *((f"byte {n:#x}", RECIPE.encode() + bytes([n]) + b"\n", False) for n in (0, 1, 7, 8, 0x7F, 0x80, 0xC0, 0xFF)),
        ("empty", "", False),
        ("a word", "hello", False),
        (
            "a pickle",
            b"\x80\x04\x95\x1d\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x8c\x06system\x93\x8c\x02id\x85R.",
            False,
        ),
        *((f"name {name[:30]!r}", f"{RECIPE}name: {json.dumps(name)}\n", name in WORDS_TOO) for name in NAMES),
    ]
    chance = random.Random(5)
    texts += [(f"random {n}", chance.randbytes(chance.randrange(1, 3000)), True) for n in range(100)]
    for number in range(100):
        changed = bytearray(RECIPE.encode())
        for _ in range(chance.randrange(1, 6)):
            changed[chance.randrange(len(changed))] = chance.choice(b"{}[]&*!|>%@`'\"#-:,? \n\t\x00\xffa$")
        texts.append((f"changed {number}", bytes(changed), True))
    inputs = []
    for number, (name, text, harmless) in enumerate(texts):
        path = folder / f"{number}.yaml"
        inputs.append(Input(f"recipe {name}", lambda path=path, text=text: _load(path, text), harmless))
    path = folder / "sound.yaml"
    path.write_text(RECIPE)
    values = [text for _, text in tagged(canary)] + looked_up(canary) + ["[" * 1000, "{a: " * 99, "&a [*a]", "x: y: z"]
    for value in values:
        for key in ("name", "train.steps", "strategy.options.x"):
            inputs.append(Input(f"{key}={value}", lambda key=key, value=value: load_recipe(path, [f"{key}={value}"])))
    return inputs


def _load(path: Path, text: str | bytes) -> None:
    """Read a recipe; files are written as they are needed: some are large."""
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    try:
        load_recipe(path)
    finally:
        path.unlink()


def test_hostile_recipes_are_refused(tmp_path: Path, canary: Path, full_drills: bool) -> None:
    try_all(recipe_inputs(tmp_path, canary), canary, drills=full_drills)


def test_a_trainer_that_is_none_is_not_called(tmp_path: Path, canary: Path, full_drills: bool) -> None:
    paths = ["os:system", "subprocess:Popen", "builtins:eval", "builtins:exec", "pickle:loads", "unitrain:Recipe"]
    paths += (
        [f"os:{name}" for name in NAMES] + [f"{name}:Trainer" for name in NAMES] + [f"{name}.py:X" for name in NAMES]
    )
    inputs = [Input(f"trainer {path[:40]!r}", lambda path=path: resolve_trainer(path)) for path in paths]
    try_all(inputs, canary, drills=full_drills)


# --- checkpoints -------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A sound checkpoint of two halves of a tensor."""
    options: dict[str, Any] = {"nonce": "a", "keep": 3, "asynchronous": False, "producer": {}}
    data = np.arange(40, dtype=np.float64)
    for writer in (1, 0):
        saver = Saver(str(tmp_path / "root"), writer=writer, writers=2, report=lambda report: None, **options)
        half = data[20 * writer : 20 * writer + 20]
        saver.save(1, {"model": [Shard("w", "param", "float64", (40,), (20 * writer,), half)]}, {"at": 1})
    return tmp_path / "root" / "s00000001-a"


def read_all(folder: Path) -> None:
    """Every byte of a checkpoint, as a resume reads it."""
    reader = CheckpointReader(folder)
    for role in reader.roles:
        of_role = reader.role(role)
        for (kind, name), info in of_role.tensors.items():
            of_role.read(kind, name, (0,) * len(info.shape), info.shape)
    assert isinstance(reader.state, dict)


def doctored(folder: Path) -> Iterator[tuple[str, Callable[[dict[str, Any]], Any], bool]]:
    """(name, change of the manifest, harmless): each is sealed again, so that only its meaning is wrong."""
    part = "part-0-0.safetensors"

    def renamed(document: dict[str, Any], name: str) -> None:
        document["files"][name] = document["files"].pop(part)
        for box in document["tensors"][0]["boxes"]:
            box["file"] = name if box["file"] == part else box["file"]

    def deep(document: dict[str, Any], depth: int) -> None:
        document["producer"] = "DEEP" * depth

    for name in NAMES:
        yield f"file {name[:40]!r}", lambda document, name=name: renamed(document, name), False
        yield (
            f"also a file {name[:40]!r}",
            lambda document, name=name: document["files"].update({name: {"size": 1, "sha256": "0" * 64}}),
            False,
        )
        yield f"box in {name[:40]!r}", lambda document, name=name: _box(document).update(file=name), False
        yield f"key {name[:40]!r}", lambda document, name=name: _box(document).update(key=name), False
        for key in ("role", "kind"):
            yield (
                f"{key} {name[:40]!r}",
                lambda document, key=key, name=name: document["tensors"][0].update({key: name}),
                name in WORDS_TOO,
            )
        yield f"dtype {name[:40]!r}", lambda document, name=name: document["tensors"][0].update(dtype=name), False
    for number in NUMBERS:
        shown = repr(number)[:30]
        for place in ("offset", "shape"):
            yield (
                f"{place} [{shown}]",
                lambda document, place=place, number=number: _box(document).update({place: [number]}),
                False,
            )
            yield (
                f"{place} {shown}",
                lambda document, place=place, number=number: _box(document).update({place: number}),
                False,
            )
        for key in ("shape", "boxes", "name", "dtype", "kind"):
            yield (
                f"tensor's {key} {shown}",
                lambda document, key=key, number=number: document["tensors"][0].update({key: number}),
                isinstance(number, str) and key in ("name", "kind"),
            )
        yield f"size {shown}", lambda document, number=number: document["files"][part].update(size=number), False
        yield f"hash {shown}", lambda document, number=number: document["files"][part].update(sha256=number), False
        for key in ("files", "tensors", "producer", "format", "step", "time"):
            may = (key, shown) in {("producer", "{}"), ("tensors", "[]"), ("time", "1.5"), ("step", repr(1 << 56))}
            yield f"{key} {shown}", lambda document, key=key, number=number: document.update({key: number}), may
    for dtype in ("object", "O", "V8", "float31", "pickle", "<f8", "str", "F64", "float8", "datetime64", "int128"):
        yield f"dtype {dtype}", lambda document, dtype=dtype: document["tensors"][0].update(dtype=dtype), False
    for name in ("bool", "int8", "uint8", "float16", "bfloat16", "int32", "float32", "int64", "complex64"):
        yield (
            f"dtype of other bytes {name}",
            lambda document, name=name: document["tensors"][0].update(dtype=name),
            False,
        )
    for dims in (0, 2, 33, 1000):
        yield f"{dims} dimensions", lambda document, dims=dims: document["tensors"][0].update(shape=[1] * dims), False
    yield "overlap", lambda document: document["tensors"][0]["boxes"][1].update(offset=[10]), False
    yield "the same place twice", lambda document: document["tensors"][0]["boxes"].append(_box(document)), False
    yield "gap", lambda document: document["tensors"][0]["boxes"].pop(), False
    yield "out of bounds", lambda document: document["tensors"][0]["boxes"][1].update(offset=[30]), False
    yield "tensor twice", lambda document: document["tensors"].append(document["tensors"][0]), False
    yield "swapped", lambda document: [b.update(file=part) for b in document["tensors"][0]["boxes"]], False
    for key in ("files", "tensors", "producer", "format", "step", "time"):
        yield f"without {key}", lambda document, key=key: document.pop(key), False
    yield "one key too many", lambda document: document.update(x=1), False
    yield "no state", lambda document: document["files"].pop("state.json"), False
    yield "later format", lambda document: document.update(format=2), False
    for depth in (100, 2000, 100_000):
        yield f"nested {depth} deep", lambda document, depth=depth: deep(document, depth), depth == 100


def _box(document: dict[str, Any]) -> dict[str, Any]:
    box: dict[str, Any] = document["tensors"][0]["boxes"][0]
    return box


def _sealed(document: dict[str, Any]) -> bytes:
    """A document with a right checksum; a run of DEEP becomes brackets, which json could not write."""
    body = seal(document)
    if '"DEEP' not in body.decode():
        return body
    depth = document["producer"].count("DEEP")
    text = body[: body.rindex(b',"sha256"')].replace(
        json.dumps("DEEP" * depth).encode(), b'{"a":' * depth + b"1" + b"}" * depth
    )
    return text + b',"sha256":"' + hashlib.sha256(text).hexdigest().encode() + b'"}\n'


def headers() -> list[tuple[str, bytes]]:
    """First bytes of a safetensors file."""

    def header(text: str | bytes) -> bytes:
        data = text if isinstance(text, bytes) else text.encode()
        return len(data).to_bytes(8, "little") + data

    entry = '{"dtype":"F64","shape":[20],"data_offsets":[0,160]}'
    return [
        *((f"claims {n}", n.to_bytes(8, "little")) for n in (1 << 63, (1 << 64) - 1, 100_000_001, 1 << 40, 5000, 0)),
        *((f"deep {n}", header('{"a":' * n + "1" + "}" * n)) for n in (100, 5000, 100_000)),
        ("twice", header(f'{{"t000000":{entry},"t000000":{entry}}}')),
        ("not JSON", header("{")),
        ("not UTF-8", header(b"{\xff}")),
        ("a list", header("[]")),
        ("a number", header("1")),
        *((f"dtype {d}", header(f'{{"t000000":{entry.replace("F64", d)}}}')) for d in ("OBJ", "O", "F8", "f64", "")),
        *(
            (f"shape {s}", header(f'{{"t000000":{entry.replace("[20]", s)}}}'))
            for s in ("[-20]", "[1e9]", "[NaN]", "20", "[2000000000000]", "[true]", "[[20]]", "null", '["20"]', "[]")
        ),
        *(
            (f"place {p}", header(f'{{"t000000":{entry.replace("[0,160]", p)}}}'))
            for p in (
                "[160,0]",
                "[-8,152]",
                "[0]",
                "[0,1e3]",
                "[8,168]",
                "[0,160,1]",
                "[0,99999999999999999999]",
                "null",
                "{}",
                "[null,null]",
            )
        ),
        ("overlap", header(f'{{"t000000":{entry},"t000001":{entry}}}')),
        ("entry a list", header('{"t000000":[]}')),
        ("metadata a bomb", header('{"__metadata__":' + "[" * 9000 + "]" * 9000 + "}")),
    ]


def checkpoint_inputs(saved: Path, folder: Path) -> list[Input]:
    """Checkpoints that somebody else made."""
    manifest = (saved / "MANIFEST.json").read_bytes()
    inputs = []

    def with_manifest(change: Callable[[dict[str, Any]], Any]) -> None:
        document = unseal(manifest, "")
        change(document)
        try:
            data = _sealed(document)
        except (UnicodeEncodeError, ValueError):
            data = json.dumps(document).encode()
        (saved / "MANIFEST.json").write_bytes(data)
        try:
            read_all(saved)
        finally:
            (saved / "MANIFEST.json").write_bytes(manifest)

    for name, change, harmless in doctored(saved):
        inputs.append(Input(f"manifest {name}", lambda change=change: with_manifest(change), harmless))

    def with_file(name: str, data: bytes) -> None:
        path = saved / name
        sound = path.read_bytes()
        document = unseal(manifest, "")
        document["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        path.write_bytes(data)
        (saved / "MANIFEST.json").write_bytes(seal(document))
        try:
            read_all(saved)
        finally:
            path.write_bytes(sound)
            (saved / "MANIFEST.json").write_bytes(manifest)

    for name, data in headers():
        inputs.append(Input(f"header {name}", lambda data=data: with_file("part-0-0.safetensors", data + bytes(160))))
    for text in (b"", b"[]", b"1", b"null", b"{", b"\xff", b'{"a":' * 100_000, b"[" * 100_000, b"9" * 5000):
        inputs.append(Input(f"state {text[:20]!r}", lambda text=text: with_file("state.json", text)))

    def as_manifest(data: bytes) -> None:
        (saved / "MANIFEST.json").write_bytes(data)
        try:
            read_all(saved)
        finally:
            (saved / "MANIFEST.json").write_bytes(manifest)

    chance = random.Random(6)
    for number in range(60):
        data = chance.randbytes(chance.randrange(2000))
        inputs.append(Input(f"random manifest {number}", lambda data=data: as_manifest(data)))
    return inputs


def test_hostile_checkpoints_are_refused(tmp_path: Path, saved: Path, canary: Path, full_drills: bool) -> None:
    read_all(saved)
    try_all(checkpoint_inputs(saved, tmp_path), canary, drills=full_drills)
    read_all(saved)


@pytest.mark.parametrize("manifest", [False, True])
def test_what_a_link_leads_to_is_never_deleted(tmp_path: Path, saved: Path, manifest: bool) -> None:
    elsewhere, root = tmp_path / "elsewhere", saved.parent
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("all that I have")
    if manifest:
        shutil.copytree(saved, elsewhere, dirs_exist_ok=True)
    (root / "s00000000-z").symlink_to(elsewhere)
    there = sorted(elsewhere.iterdir())
    take_over(str(root), "b")
    saver = Saver(
        str(root), writer=0, writers=1, nonce="b", keep=1, asynchronous=False, producer={}, report=lambda report: None
    )
    saver.save(2, {"model": []}, {})
    saver.wait()
    assert sorted(elsewhere.iterdir()) == there
    assert [found.step for found in list_checkpoints(str(root)).sound] == [2]


def test_hostile_names_in_a_folder_of_checkpoints_are_no_checkpoints(saved: Path) -> None:
    root = saved.parent
    for name in (
        "s00000009-..",
        "s00000009-a b",
        "s00000009-$(id)",
        "s-1-a",
        "s00000009-a.0",
        "s00000009-a.1",
        "s" + "\u0660" * 7 + "\u0669-a",
    ):
        shutil.copytree(saved, root / name)
    newest = open_newest(str(root))
    assert newest.reader is not None
    assert Path(newest.reader.folder) == saved


# --- folders of runs ---------------------------------------------------------------------------------------------


def run_inputs(run: Run) -> list[Input]:
    """Small files of a run that somebody else wrote."""
    job = {"run_id": "x", "nodes": 1, "nproc": 1, "preload": [], "fork": True, "options": {}, "recovery": {}}
    process = {"pid": 99_999_999, "host": records.hostname(), "started": "1"}
    state = {"launcher": "local", "submitted": 1.0, "attempt": 0, "job_id": "7", "process": process}
    texts = [
        b"",
        b"[]",
        b"1",
        b"null",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"9" * 5000,
        b"\x00" * 99,
    ]
    chance = random.Random(7)
    texts += [chance.randbytes(200) for _ in range(15)]
    inputs = []

    def with_file(name: str, text: bytes, read: Callable[[], Any]) -> None:
        (run.folder / name).write_bytes(text)
        try:
            read()
        finally:
            (run.folder / name).unlink()

    def add(name: str, what: str, text: bytes, read: Callable[[], Any], harmless: bool = False) -> None:
        inputs.append(Input(f"{name} {what[:60]}", lambda: with_file(name, text, read), harmless))

    def status() -> None:
        local_job.job_status(run.folder, "7")

    def cancel() -> None:
        local_job.cancel_job(run.folder, "7", grace_seconds=0)

    for text in texts:
        add(FILE, repr(text[:20]), text, lambda: read_job(run.folder))
        add(local_job.STATE, repr(text[:20]), text, status)
        add(local_job.STATE, repr(text[:20]), text, cancel)
        add(records.EXIT, repr(text[:20]), text, lambda: records.read_record(run.folder / records.EXIT))
        add(records.EVENTS, repr(text[:20]), text, lambda: (summary(run), run.events(), run.launched()), True)
        add("metrics.jsonl", repr(text[:20]), text + b"\n", lambda: (summary(run), run.rewind(0)), True)
    for value in [*NUMBERS, *NAMES[:8]]:
        for key in ("nodes", "nproc", "preload", "fork", "options", "recovery", "run_id"):
            text = json.dumps({**job, key: value}).encode()
            may = (key == "run_id" and isinstance(value, str)) or (key == "preload" and isinstance(value, str | list))
            may = may or (key in ("options", "recovery") and value in ({}, [])) or (key == "preload" and value == {})
            may = may or (key == "fork" and value is True)
            add(FILE, f"{key} {value!r}", text, lambda: read_job(run.folder), may)
        for key in ("restarts", "hang_seconds"):
            text = json.dumps({**job, "recovery": {key: value}}).encode()
            may = key == "hang_seconds" and value in (None, 1.5)
            add(FILE, f"{key} {value!r}", text, lambda: read_job(run.folder), may)
        for key in ("pid", "host", "started"):
            text = json.dumps({**state, "process": {**process, key: value}}).encode()
            add(local_job.STATE, f"{key} {value!r}", text, status, key != "pid" and isinstance(value, str))
            add(local_job.STATE, f"cancel {key} {value!r}", text, cancel, key != "pid" and isinstance(value, str))
        for key in ("submitted", "attempt", "process"):
            may = (key == "submitted" and isinstance(value, float)) or (key == "attempt" and type(value) is int)
            add(local_job.STATE, f"{key} {value!r}", json.dumps({**state, key: value}).encode(), status, may)
        launch = json.dumps({"time": 1.0, "event": "launch", "launcher": value, "job_id": "7"}).encode() + b"\n"
        add(records.EVENTS, f"launcher {value!r}", launch, lambda: state_of(run), value in (None, ""))
    for record in ({"event": "x"}, {"event": [], "time": 1}, {"time": 1}, {"step": {}}, {"step": "1"}, [], 5):
        text = json.dumps(record).encode() + b"\n"
        add(records.EVENTS, repr(record), text, lambda: summary(run), True)
        add("metrics.jsonl", repr(record), text, lambda: (summary(run), run.rewind(0)), True)
    return inputs


def test_hostile_folders_of_runs_are_refused_and_no_other_process_is_ended(
    tmp_path: Path, canary: Path, full_drills: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is not the run's own must never get a signal: 0 and -1 mean many."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(RECIPE)
    ask = os.kill

    def never(pid: int, number: int) -> None:
        if number:
            canary.write_text(f"signal {number} to {pid}")
        elif pid > 1:
            ask(pid, 0)

    monkeypatch.setattr(os, "kill", never)
    try_all(run_inputs(Run(tmp_path / "run")), canary, drills=full_drills)


# --- configurations of others ------------------------------------------------------------------------------------


GROUPS = (
    *("zero_optimization", "optimizer", "fp16", "scheduler", "deepspeed_config", "fsdp_config", "train_batch_size"),
    *("num_processes", "mixed_precision", "gradient_clipping"),
)


def import_inputs(folder: Path, canary: Path) -> list[Input]:
    """DeepSpeed's and accelerate's files, and torchrun's command lines."""
    inputs = []

    def with_file(name: str, text: bytes, read: Callable[[Path], Any]) -> None:
        (folder / name).write_bytes(text)
        read(folder / name)

    chance = random.Random(8)
    hostile = [
        b"",
        b"[]",
        b"1",
        b"null",
        b"{",
        b"\xff",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"a":1,"a":2}',
        b'{"a":NaN}',
    ]
    hostile += [b'{"x":' + b"9" * 5000 + b"}", b'{"x":1e999}', b'{"x":"\\ud800"}', b" " * (2 << 20), b'"x"']
    hostile += [chance.randbytes(300) for _ in range(20)]
    for reader in (read_ds_config, read_accelerate):
        for text in hostile:
            inputs.append(Input(f"{reader.__name__} {text[:20]!r}", lambda r=reader, t=text: with_file("x.json", t, r)))
        for tag, text in tagged(canary):
            data = f"distributed_type: {text}\n".encode()
            inputs.append(Input(f"{reader.__name__} {tag}", lambda r=reader, t=data: with_file("x.yaml", t, r)))
        for text in looked_up(canary):
            data = f"distributed_type: {json.dumps(text)}\n".encode()
            inputs.append(
                Input(
                    f"{reader.__name__} {text}", lambda r=reader, t=data: with_file("x.yaml", t, r), text in TEXTS_TOO
                )
            )
        for key in GROUPS:
            for value in (*NUMBERS[:10], {"stage": {}}, {"type": []}, {"params": 1}, {"enabled": {}}):
                data = json.dumps({key: value}).encode()
                inputs.append(
                    Input(f"{reader.__name__} {data[:60]!r}", lambda r=reader, t=data: with_file("x.json", t, r), True)
                )
    words = [
        "torchrun --nproc-per-node {}",
        "torchrun --nnodes={} x.py",
        "torchrun x.py {}",
        "X={} torchrun x.py",
        "{}",
    ]
    for name in NAMES:
        for word in words:
            inputs.append(
                Input(f"command {word} {name[:30]!r}", lambda w=word, n=name: import_torchrun(w.format(n)), True)
            )
    return inputs


def test_hostile_configurations_of_others_are_refused(tmp_path: Path, canary: Path, full_drills: bool) -> None:
    try_all(import_inputs(tmp_path, canary), canary, drills=full_drills)


# --- messages ----------------------------------------------------------------------------------------------------


def messages() -> list[bytes]:
    """What no rank says."""
    chance = random.Random(9)
    found = [
        b"",
        b"[]",
        b"1",
        b"null",
        b"{",
        b"\xff",
        b"[" * 5000,
        b'{"a":' * 5000,
        b'{"kind":[]}',
        b'{"kind":"signal"}',
    ]
    found += [
        b'{"kind":"signal","number":"15"}',
        b'{"kind":"error"}',
        b'{"kind":"progress"}',
        b'{"kind":"progress","record":1}',
    ]
    found += [
        b'{"kind":"error","rank":"0"}',
        b"\x00" * 5000,
        b"9" * 5000,
        b"GET / HTTP/1.1",
        b'{"says":1}',
        b'{"gone":{}}',
    ]
    return found + [chance.randbytes(chance.randrange(1, 4000)).replace(b"\n", b" ") for _ in range(60)]


def test_an_agent_drops_what_no_rank_says_and_hears_the_next_message() -> None:
    end, pipe = os.pipe()
    os.set_blocking(end, False)
    start = RankStart(rank=0, environ={}, log="", agent_fd=pipe, heartbeat_fd=-1, slot=0)
    rank = Rank(start, end)
    sound = b'{"kind":"signal","number":15}'
    try:
        for text in messages():
            os.write(pipe, text + b"\n" + sound + b"\n")
            assert rank.messages() == [json.loads(sound)], text[:60]
        grown = 0
        for _ in range(150):  # a line without end
            os.write(pipe, b"x" * 60_000)
            assert rank.messages() == []
            grown = max(grown, len(rank.unread))
        assert grown <= 4 << 20
        os.write(pipe, b'x"}\n' + sound + b"\n")
        assert rank.messages() == [json.loads(sound)]
    finally:
        os.close(end)
        os.close(pipe)
    counts.append(len(messages()) + 1)


def test_strangers_at_the_meeting_are_turned_away(full_drills: bool) -> None:
    """They come while rank 0 waits for rank 1; the meeting then works."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    worlds = [World(rank=rank, size=2, coordinator=f"127.0.0.1:{port}") for rank in range(2)]
    met: list[Any] = []

    def first() -> None:
        with_all = Meeting(worlds[0], timeout=60)
        met.append(with_all.gather("here"))
        with_all.close()

    thread = threading.Thread(target=first)
    thread.start()
    strangers = [text[:150] + b"\n" for text in messages()[:: 1 if full_drills else 6]]
    strangers += [
        b'{"rank":true,"size":2}\n',
        b'{"rank":1,"size":3}\n',
        b'{"rank":[1],"size":2}\n',
        b'{"rank":-1,"size":2}\n',
    ]
    for text in strangers:
        with _connected(port) as stranger:
            stranger.sendall(text)
            stranger.settimeout(5)
            assert stranger.recv(10) == b"", text
    with contextlib.closing(Meeting(worlds[1], timeout=60)) as meeting:
        meeting.gather("there")
    thread.join(30)
    assert met == [["here", "there"]]
    counts.append(len(strangers))


def _connected(port: int) -> socket.socket:
    deadline = time.monotonic() + 20
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=5)
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_a_trial_of_this_file_can_fail(canary: Path) -> None:
    """What is accepted, runs, ends in another error or lasts is found."""

    def slow() -> None:
        time.sleep(0.5)
        raise Slow("it lasts")

    assert _problem(Input("accepted", lambda: None)) == "it is accepted"
    assert "ZeroDivisionError" in str(_problem(Input("crash", lambda: 1 / 0)))
    assert "it lasts" in str(_problem(Input("slow", slow)))
    with pytest.raises(AssertionError, match="was run"):
        try_all([Input("ran", lambda: canary.write_text("x"), True)], canary, drills=True)
