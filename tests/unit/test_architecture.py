"""Who may import whom, and what no source file may do; every rule is shown to fail on a file that breaks it."""

from __future__ import annotations

import ast
import os
import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple

import pytest

import unitrain
from unitrain import registry

pytestmark = pytest.mark.fast

ROOT = Path(__file__).resolve().parents[2]
TREES = {"unitrain": "unitrain", "strategies": "unitrain.strategies", "launchers": "unitrain.launchers"}

# the import names that belong to each value of Strategy.framework
FRAMEWORKS = {
    "torch": {"torch", "torchvision"},
    "jax": {"jax", "jaxlib", "flax", "optax"},
    "tensorflow": {"tensorflow", "keras"},
    "keras": {"keras"},
    "ray": {"ray"},
}
# what stands on one of those, or replaces this package's own work
BACKENDS = {"deepspeed", "horovod", "ray", "accelerate", "lightning", "pytorch_lightning", "transformers", "mpi4py"}
FOREIGN = BACKENDS.union(*FRAMEWORKS.values())
# files of the core whose models, or whose loop, are a backend's own
MODEL_BACKENDS = {
    "unitrain.models.hf_torch": {"transformers"},
    "unitrain.rl.trl_loop_torch": {"transformers", "accelerate"},
}

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
IMPORT_NAMES = {"pyyaml": "yaml"}  # where it is not the package's own
REQUIRED = {re.split(r"[^\w-]", line, maxsplit=1)[0].lower() for line in PROJECT["dependencies"]}
DECLARED = {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in REQUIRED} - FOREIGN
STANDARD = sys.stdlib_module_names

FORBIDDEN_MODULES = {"pickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
FORBIDDEN_CALLS = {
    *("eval", "exec", "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load", "torch.load", "torch.save"),
}

# endings of the names of files of the core that belong to a framework
BOUND = {"_torch": "torch", "_jax": "jax", "_tf": "tensorflow", "_keras": "keras", "_ray": "ray"}

# who reads the environment, and why; everybody else asks unitrain.world
ENVIRONMENT_READERS = {"unitrain.world": "the one place that knows what each starter sets"}

PUBLIC_NAMES = [
    "ArraySource",
    "Batch",
    "Cursor",
    "DatasetSource",
    "Engine",
    "HyperParameters",
    "Launcher",
    "Loss",
    "OptimizerRecipe",
    "Recipe",
    "Role",
    "Source",
    "StepOut",
    "Strategy",
    "Trainer",
    "UnitrainError",
    "World",
    "__version__",
    "launch",
    "load_recipe",
]


class Import(NamedTuple):
    """One imported module: absolute name, line, and whether it runs when the importer is imported."""

    target: str
    line: int
    place: str  # top | function | typing

    @property
    def package(self) -> str:
        return self.target.partition(".")[0]


@dataclass(frozen=True)
class Module:
    """One source file under the name that it is imported by."""

    name: str
    text: str
    is_package: bool = False
    siblings: frozenset[str] = field(default=frozenset(), repr=False)  # names of all modules

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def family(self) -> str:
        """core, strategies, launchers."""
        parts = self.name.split(".")
        return parts[1] if len(parts) > 1 and parts[1] in ("strategies", "launchers") else "core"

    @property
    def framework(self) -> str | None:
        """The framework that a file of the core is written in."""
        folders = ("models", "tasks", "testing", "importers", "rl", "actors")
        bound = tuple(f"unitrain.{folder}." for folder in folders)
        if self.name.startswith(bound):
            return next((framework for ending, framework in BOUND.items() if self.name.endswith(ending)), None)
        return None

    @cached_property
    def imports(self) -> list[Import]:
        return list(dict.fromkeys(self._walk(self.tree, "top")))

    def _walk(self, node: ast.AST, place: str) -> Iterator[Import]:
        match node:
            case ast.Import(names=names):
                yield from (Import(alias.name, node.lineno, place) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                origin = self._absolute(module or "", level)
                for alias in names:
                    inner = f"{origin}.{alias.name}"
                    yield Import(inner if inner in self.siblings else origin, node.lineno, place)
            case ast.Call(func=called, args=[ast.Constant(value=str(target)), *_]) if _ends(called) in (
                "import_module",
                "__import__",
                "resolve",
            ):
                level = len(target) - len(target.lstrip("."))
                absolute = self._absolute(target.lstrip("."), level).partition(":")[0]
                yield Import(absolute, node.lineno, "function" if place == "top" else place)
            case ast.If(test=test) if _ends(test) == "TYPE_CHECKING":
                for child in node.body:
                    yield from self._walk(child, "typing")
                for child in node.orelse:
                    yield from self._walk(child, place)
                return
        inside = "function" if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) else place
        for child in ast.iter_child_nodes(node):
            yield from self._walk(child, inside if place == "top" else place)

    def _absolute(self, module: str, level: int) -> str:
        if level == 0:
            return module
        parts = self.name.split(".")
        base = parts[: len(parts) - level + self.is_package]
        return ".".join([*base, module] if module else base)


def _ends(node: ast.AST) -> str:
    """The last name of a dotted expression: `path` of `os.path`."""
    match node:
        case ast.Attribute(attr=name) | ast.Name(id=name):
            return name
    return ""


def _dotted(node: ast.AST) -> str:
    """`os.path.join` as text; empty for anything but names and dots."""
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=value, attr=name):
            return f"{_dotted(value)}.{name}"
    return ""


@cache
def package_modules() -> list[Module]:
    """Every module of the package, each file once: the links to strategies and launchers are not followed."""
    files: dict[str, Path] = {}
    for top, package in TREES.items():
        for folder, _, names in os.walk(ROOT / top):
            for path in (Path(folder, name) for name in names if name.endswith(".py")):
                dotted = ".".join([package, *path.relative_to(ROOT / top).with_suffix("").parts])
                files[dotted.removesuffix(".__init__")] = path
    names_of_all = frozenset(files)
    return [
        Module(name, path.read_text(encoding="utf-8"), path.name == "__init__.py", names_of_all)
        for name, path in sorted(files.items())
    ]


# --- rules: a module in, sentences out ---------------------------------------------------------------------------


def core_imports_no_framework(module: Module) -> Iterator[str]:
    """The core runs without any framework; models and tasks belong to one, the test kit may start one late.

    What builds a backend asks that backend, late too.
    """
    if module.family != "core":
        return
    own = FRAMEWORKS[module.framework] if module.framework else set()
    own = own | MODEL_BACKENDS.get(module.name, set())
    for found in module.imports:
        late = found.place == "function" and (
            module.name.startswith("unitrain.testing")
            or (module.name.startswith("unitrain.build.") and found.package in {"torch", *module.name.split(".")})
        )
        if found.package in FOREIGN - own and not late:
            yield f"{module.name}:{found.line} imports {found.target}"


def core_names_no_backend(module: Module) -> Iterator[str]:
    """The core knows strategies and launchers as strings of the registry only."""
    if module.family == "core":
        for found in module.imports:
            if found.target.startswith(("unitrain.strategies", "unitrain.launchers")):
                yield f"{module.name}:{found.line} imports {found.target}; ask unitrain.registry"


def core_loads_no_framework_by_itself(module: Module) -> Iterator[str]:
    """Importing a module of the core never imports a model or task that imports a framework."""
    if module.family == "core" and not module.framework and module.name != "unitrain.tasks":
        for found in module.imports:
            bound = found.target == "unitrain.tasks" or Module(found.target, "").framework
            if bound and found.place == "top":
                yield f"{module.name}:{found.line} imports {found.target} when it is imported itself"


def core_needs_only_what_is_declared(module: Module) -> Iterator[str]:
    """What the core imports at top level, a plain `pip install unitrain` brings."""
    if module.family == "core":
        known = STANDARD | DECLARED | FOREIGN | {"unitrain"}
        if module.name.startswith("unitrain.testing"):
            known |= {"pytest"}  # who imports the test kit has it
        for found in module.imports:
            if found.place == "top" and found.package not in known:
                yield f"{module.name}:{found.line} imports {found.package}, which pyproject.toml does not require"


def a_strategy_imports_core_and_its_own_framework(module: Module) -> Iterator[str]:
    """No launcher, no other strategy but what its framework's strategies share, no other framework.

    A shared file may import the backends that its name tells (`_torch_deepspeed_state`), and a strategy of another
    backend may import it only where it is used.
    """
    if module.family != "strategies" or module.name == "unitrain.strategies":
        return
    framework, backends = _registered_framework(module.name)
    if framework is None:
        yield f"{module.name} stands in no table of unitrain.registry"
        return
    shared = f"unitrain.strategies._{framework}"
    for found in module.imports:
        if found.target.startswith("unitrain.launchers"):
            yield f"{module.name}:{found.line} imports {found.target}: strategies know nothing of launchers"
        elif found.target.startswith("unitrain.strategies.") and not found.target.startswith(shared):
            yield f"{module.name}:{found.line} imports {found.target}: of its own family only {shared}*"
        elif found.place != "function" and not _backends(found.target) <= backends:
            yield f"{module.name}:{found.line} imports {found.target} at top level, which is of another backend"
        elif found.package in FOREIGN - FRAMEWORKS[framework] - backends:
            yield f"{module.name}:{found.line} imports {found.target}, a framework that is not its own"


def _registered_framework(name: str) -> tuple[str | None, set[str]]:
    """The framework of a file in strategies/ and its backend packages, as the registry or an underscore tells."""
    last = name.rpartition(".")[2]
    if last.startswith("_"):
        return next((framework for framework in FRAMEWORKS if last.startswith(f"_{framework}")), None), _backends(name)
    for entry in registry.STRATEGIES.values():
        if entry.path.partition(":")[0] == name:
            return entry.framework or entry.requires, {entry.requires}
    return None, set()


def _backends(name: str) -> set[str]:
    """The backends in the name of a file that strategies share."""
    last = name.rpartition(".")[2]
    return (BACKENDS | {"keras"}) & set(last.split("_")) if last.startswith("_") else set()


def a_launcher_imports_core_alone(module: Module) -> Iterator[str]:
    """Neither strategies nor other launchers nor a framework; a client library only where it is used.

    Files that begin with an underscore are what a launcher is made of, or what several share.
    """
    if module.family != "launchers" or module.name == "unitrain.launchers":
        return
    entries = [entry for entry in registry.LAUNCHERS.values() if entry.path.partition(":")[0] == module.name]
    if not entries and not module.name.rpartition(".")[2].startswith("_"):
        yield f"{module.name} stands in no table of unitrain.registry"
    clients = {entry.requires.partition(".")[0] for entry in entries}
    clients |= {"ray"} if module.name.startswith("unitrain.launchers._ray_") else set()
    for found in module.imports:
        if found.target.startswith(("unitrain.strategies", "unitrain.tasks", "unitrain.models")):
            yield f"{module.name}:{found.line} imports {found.target}: launchers know nothing of what they start"
        elif found.target.startswith("unitrain.launchers.") and not found.target.startswith("unitrain.launchers._"):
            yield f"{module.name}:{found.line} imports {found.target}: a launcher stands alone"
        elif found.package in FOREIGN - clients:
            yield f"{module.name}:{found.line} imports {found.target}: launchers need no framework"
        elif found.place == "top" and found.package not in STANDARD | DECLARED | {"unitrain"}:
            yield f"{module.name}:{found.line} imports {found.target} at top level; import it where it is used"


def only_world_reads_the_environment(module: Module) -> Iterator[str]:
    """Setting a variable, and handing all of them on to a child, is fine; reading one is a hidden parameter."""
    if module.name in ENVIRONMENT_READERS:
        return
    not_read: set[ast.AST] = set()
    for node in ast.walk(module.tree):
        match node:
            case ast.Subscript(value=value, ctx=ast.Store() | ast.Del()):
                not_read.add(value)
            case ast.Call(func=ast.Attribute(value=value, attr="update" | "setdefault")):
                not_read.add(value)
            case ast.keyword(arg="env", value=ast.Dict(keys=keys, values=values)):
                not_read.update(value for key, value in zip(keys, values, strict=True) if key is None)
    for node in ast.walk(module.tree):
        read = ""
        match node:
            case ast.Attribute() if _dotted(node) in ("os.environ", "os.environb", "os.getenv", "os.path.expandvars"):
                read = "" if node in not_read else _dotted(node)
            case ast.ImportFrom(module="os", names=names):
                read = ", ".join(a.name for a in names if a.name in ("environ", "environb", "getenv"))
        if read:
            yield f"{module.name}:{node.lineno} reads {read}; unitrain.world is the reader of the environment"


def nothing_runs_text_or_unpickles(module: Module) -> Iterator[str]:
    """No pickle in any form, no code from text, no shell."""
    for found in module.imports:
        if found.package in FORBIDDEN_MODULES:
            yield f"{module.name}:{found.line} imports {found.target}"
    for node in ast.walk(module.tree):
        if not isinstance(node, ast.Call):
            continue
        called = _dotted(node.func)
        as_data = any(word.arg == "weights_only" and ast.unparse(word.value) == "True" for word in node.keywords)
        if called == "torch.load" and as_data and module.name == "unitrain.importers.pickled_torch":
            continue  # in a process of its own
        if called in FORBIDDEN_CALLS:
            yield f"{module.name}:{node.lineno} calls {called}"
        for word in node.keywords:
            refused = isinstance(word.value, ast.Constant) and not word.value.value
            if word.arg in ("shell", "allow_pickle") and not refused:
                yield f"{module.name}:{node.lineno} passes {word.arg}={ast.unparse(word.value)}"


Rule = Callable[[Module], Iterator[str]]
RULES: list[Rule] = [
    core_imports_no_framework,
    core_names_no_backend,
    core_loads_no_framework_by_itself,
    core_needs_only_what_is_declared,
    a_strategy_imports_core_and_its_own_framework,
    a_launcher_imports_core_alone,
    only_world_reads_the_environment,
    nothing_runs_text_or_unpickles,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_module_keeps_the_rule(rule: Rule) -> None:
    broken = [sentence for module in package_modules() for sentence in rule(module)]
    assert not broken, "\n".join(broken)


# for each rule: name of the file, what it says, and what the rule must say of it (empty: it is allowed)
SEEDS: dict[Rule, list[tuple[str, str, str]]] = {
    core_imports_no_framework: [
        ("trainer", "import torch", "trainer:1 imports torch"),
        ("trainer", "def f():\n    from torch import nn", "trainer:2 imports torch"),
        ("trainer", "if TYPE_CHECKING:\n    import jax.numpy", "imports jax.numpy"),
        ("trainer", "import importlib\nimportlib.import_module('keras')", "imports keras"),
        ("models.gpt", "import torch", "imports torch"),
        ("models.gpt_torch", "import torch", ""),
        ("models.gpt_torch", "import transformers", "imports transformers"),
        ("models.hf_torch", "import transformers", ""),
        ("rl.trl_loop_torch", "import transformers", ""),
        ("rl.trl_torch", "import transformers", "imports transformers"),
        ("models.hf_config", "import transformers", "imports transformers"),
        ("models.gpt_jax", "import torch", "imports torch"),
        ("tasks.language", "import torch", "imports torch"),
        ("tasks.language_torch", "import torch", ""),
        ("tasks.language_jax", "import torch", "imports torch"),
        ("testing.kit", "import torch", "imports torch"),
        ("testing.kit", "def f():\n    import torch", ""),
        ("testing.kit_torch", "import torch", ""),
        ("importers.pickled_torch", "import torch", ""),
        ("importers.accelerate", "def f():\n    import torch", "imports torch"),
        ("actors.group_ray", "import ray", ""),
        ("actors.group_ray", "import torch", "imports torch"),
        ("actors.group", "import ray", "imports ray"),
        ("trainer", "def f():\n    import ray", "imports ray"),
        ("build.deepspeed", "def f():\n    import torch, deepspeed", ""),
        ("build.deepspeed", "import deepspeed", "imports deepspeed"),
        ("build.horovod", "def f():\n    import deepspeed", "imports deepspeed"),
    ],
    core_names_no_backend: [
        ("trainer", "from .strategies import ddp", "imports unitrain.strategies.ddp"),
        ("cli.run", "def f():\n    from ..launchers.local import Local", "imports unitrain.launchers.local"),
        ("trainer", "resolve('unitrain.strategies.ddp:DDP')", "imports unitrain.strategies.ddp"),
        ("trainer", "from .strategy import Engine", ""),
    ],
    core_loads_no_framework_by_itself: [
        ("trainer", "from .tasks import LanguageModel", "imports unitrain.tasks when"),
        ("models.config", "from . import gpt_torch", "imports unitrain.models.gpt_torch when"),
        ("models.config", "def f():\n    from . import gpt_torch", ""),
    ],
    core_needs_only_what_is_declared: [
        ("data.digits", "import sklearn", "imports sklearn, which"),
        ("data.digits", "import pytest", "imports pytest, which"),
        ("data.digits", "def f():\n    import sklearn", ""),
        ("data.text", "import json, numpy, omegaconf", ""),
    ],
    a_strategy_imports_core_and_its_own_framework: [
        ("strategies.ddp", "import jax", "a framework that is not its own"),
        ("strategies.ddp", "import torch.distributed", ""),
        ("strategies.ddp", "from ._torch import to", ""),
        ("strategies.ddp", "from .fsdp2 import X", "of its own family only"),
        ("strategies.ddp", "def f():\n    from ..launchers import local", "nothing of launchers"),
        ("strategies.unknown", "", "stands in no table"),
        ("strategies._torch", "import jax", "a framework that is not its own"),
        ("strategies._torch", "import deepspeed", "a framework that is not its own"),
        ("strategies._torch_deepspeed_state", "import deepspeed", ""),
        ("strategies._torch_deepspeed_state", "import accelerate", "a framework that is not its own"),
        ("strategies.ddp", "from ._torch_deepspeed import X", "at top level, which is of another backend"),
        ("strategies._torch_keras", "import keras", ""),
        ("strategies._torch", "import keras", "a framework that is not its own"),
        ("strategies._torch", "from ._torch_keras import X", "at top level, which is of another backend"),
        ("strategies.ddp", "def f():\n    from ._torch_deepspeed import X", ""),
        ("strategies.deepspeed", "from ._torch_deepspeed import X", ""),
        ("strategies.tensorflow", "import keras, tensorflow", ""),
        ("strategies.ray", "import ray\nfrom ._ray_crew import X", ""),
        ("strategies.ray", "import torch", "a framework that is not its own"),
        ("strategies._ray_crew", "from ._torch import X", "of its own family only"),
        ("strategies._tensorflow_engine", "import torch", "a framework that is not its own"),
        ("strategies.tensorflow", "from ._torch_engine import X", "of its own family only"),
    ],
    a_launcher_imports_core_alone: [
        ("launchers.local", "from ..strategies import ddp", "nothing of what they start"),
        ("launchers.local", "from . import torchrun", "a launcher stands alone"),
        ("launchers._local_host", "from . import torchrun", "a launcher stands alone"),
        ("launchers.local", "from ._local_host import X", ""),
        ("launchers.local", "def f():\n    import torch", "need no framework"),
        ("launchers.local", "import kubernetes", "import it where it is used"),
        ("launchers.local", "def f():\n    import kubernetes", ""),
        ("launchers.local", "from ..launcher import Job", ""),
        ("launchers._ray_driver", "def f():\n    import ray", ""),
        ("launchers._ray_driver", "import ray", "import it where it is used"),
        ("launchers._ssh_team", "def f():\n    import ray", "need no framework"),
        ("launchers.unknown", "", "stands in no table"),
    ],
    only_world_reads_the_environment: [
        ("trainer", "import os\nx = os.environ['RANK']", "trainer:2 reads os.environ"),
        ("trainer", "import os\nx = dict(os.environ)", "reads os.environ"),
        ("trainer", "import os\nx = os.getenv('RANK')", "reads os.getenv"),
        ("trainer", "from os import environ", "reads environ"),
        ("trainer", "import os\nos.environ['RANK'] = '0'", ""),
        ("trainer", "import os\nos.environ.update(RANK='0')", ""),
        ("trainer", "import os\nrun(command, env={**os.environ, 'RANK': '0'})", ""),
        ("trainer", "import os\nrun(command, env={'RANK': os.environ['RANK']})", "trainer:2 reads os.environ"),
        ("world", "import os\nx = os.environ['RANK']", ""),
    ],
    nothing_runs_text_or_unpickles: [
        ("checkpoint.x", "def f():\n    import pickle", "imports pickle"),
        ("checkpoint.x", "torch.load(path)", "calls torch.load"),
        ("checkpoint.x", "torch.load(path, weights_only=True)", "calls torch.load"),
        ("importers.pickled_torch", "torch.load(path, weights_only=True)", ""),
        ("importers.pickled_torch", "torch.load(path, weights_only=False)", "calls torch.load"),
        ("checkpoint.x", "eval('1')", "calls eval"),
        ("checkpoint.x", "exec('1')", "calls exec"),
        ("checkpoint.x", "os.system('ls')", "calls os.system"),
        ("checkpoint.x", "run('ls', shell=True)", "passes shell=True"),
        ("checkpoint.x", "yaml.load(text)", "calls yaml.load"),
        ("checkpoint.x", "np.load(path, allow_pickle=True)", "passes allow_pickle=True"),
        ("checkpoint.x", "np.load(path, allow_pickle=False)\nmodel.eval()", ""),
    ],
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_rule_sees_what_breaks_it_and_nothing_else(rule: Rule) -> None:
    there = ("strategies.ddp", "launchers.local", "launchers.torchrun", "models.gpt_torch", "tasks")
    siblings = frozenset(f"unitrain.{name}" for name in there)
    for name, text, complaint in SEEDS[rule]:
        said = list(rule(Module(f"unitrain.{name}", text, siblings=siblings)))
        if complaint:
            assert any(complaint in sentence for sentence in said), f"{text!r} in {name} went unseen: {said}"
        else:
            assert said == [], f"{text!r} in {name} is allowed"


# --- cycles ------------------------------------------------------------------------------------------------------


def cycles(modules: list[Module]) -> list[list[str]]:
    """Import cycles among top-level imports; what only type checkers or function calls import does not count."""
    names = {module.name for module in modules}
    graph = {
        module.name: [found.target for found in module.imports if found.place == "top" and found.target in names]
        for module in modules
    }
    found: list[list[str]] = []
    finished: set[str] = set()

    def visit(name: str, path: list[str]) -> None:
        if name in path:
            found.append([*path[path.index(name) :], name])
        elif name not in finished:
            for target in graph[name]:
                visit(target, [*path, name])
            finished.add(name)

    for name in graph:
        visit(name, [])
    return found


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert cycles(package_modules()) == []


def test_a_circle_is_found_however_it_is_written() -> None:
    def seeded(text_of_a: str) -> list[list[str]]:
        known = frozenset({"unitrain.a", "unitrain.b", "unitrain.c"})
        texts = {"unitrain.a": text_of_a, "unitrain.b": "from unitrain.c import x", "unitrain.c": "from . import a"}
        return cycles([Module(name, text, siblings=known) for name, text in texts.items()])

    assert seeded("from . import b") == [["unitrain.a", "unitrain.b", "unitrain.c", "unitrain.a"]]
    assert seeded("try:\n    import unitrain.b\nfinally:\n    pass") != []
    assert seeded("if TYPE_CHECKING:\n    from . import b") == []
    assert seeded("def f():\n    from . import b") == []


# --- the whole repository ----------------------------------------------------------------------------------------

PRIVATE = {
    # but the home of our images' user
    "a folder of one machine": re.compile(r"(?<![\w.*}$)~])/(?!home/unitrain\b)(?:home|root|Users|work|mnt)/[\w.]"),
    "a package or model registry": re.compile(
        r"\b(?:pypi\.org|pythonhosted\.org|download\.pytorch\.org|anaconda\.org|npmjs\.org|huggingface\.co"
        r"|docker\.io|ghcr\.io|quay\.io|gcr\.io|nvcr\.io)\b"
    ),
}
FOLDERS = ("unitrain", "strategies", "launchers", "recipes", "examples", "benchmarks", "tests", "docs", "docker", ".ci")
BINARY = {".png", ".npz", ".npy", ".bin", ".safetensors", ".pyc", ".gz"}


def private_mentions(text: str) -> list[str]:
    """What a text says of one machine or of a host to fetch from."""
    return [f"{kind}: {found[0]}" for kind, pattern in PRIVATE.items() for found in pattern.finditer(text)]


def repository_texts() -> Iterator[tuple[Path, str]]:
    """Every text file that is part of the repository; caches, environments and runs are not."""
    roots = [path for path in ROOT.iterdir() if path.is_file()]
    below = [Path(folder, name) for top in FOLDERS for folder, _, names in os.walk(ROOT / top) for name in names]
    for path in [*roots, *below]:
        if path.suffix not in BINARY and "__pycache__" not in path.parts:
            yield path.relative_to(ROOT), path.read_text(encoding="utf-8", errors="replace")


def test_no_file_names_a_machine_or_a_registry() -> None:
    found = [f"{path} names {what}" for path, text in repository_texts() for what in private_mentions(text)]
    assert not found, "\n".join(found)


def test_a_machine_or_a_registry_would_be_seen() -> None:
    for first, rest in (
        ("cd /", "home/me/x"),
        ("at=/", "root/.x"),
        ("https://pypi", ".org/x"),
        ("FROM docker", ".io/x"),
    ):
        assert private_mentions(first + rest)
    for good in ("#!/usr/bin/env bash", "/tmp/run", "docs/home/page.md", "$HOME/work/x", "~/work/run"):
        assert not private_mentions(good), good


def test_public_names_are_the_recorded_ones() -> None:
    assert unitrain.__all__ == PUBLIC_NAMES


def test_every_registered_name_has_its_file() -> None:
    names = {module.name for module in package_modules()}
    for group in (registry.STRATEGIES, registry.LAUNCHERS, registry.MODELS, registry.SOURCES):
        for name, entry in group.items():
            assert entry.path.partition(":")[0] in names, f"{name!r} is said to live at {entry.path}"
