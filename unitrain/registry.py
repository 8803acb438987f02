"""Names of strategies, launchers, tasks, models, data sources: each a string until somebody asks for it.

Third parties add to the first two by the entry-point groups `unitrain.strategies` and `unitrain.launchers`.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoints, entry_points
from types import MappingProxyType
from typing import Any

from .errors import MissingExtra, UnknownName, UserError
from .recipe import StrategyRecipe


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Where a name lives and what it needs."""

    path: str  # "module:Class"
    summary: str
    framework: str = ""
    requires: str = ""  # the import name of a package that must be there
    package: str = ""  # its name for people
    extra: str = ""  # the extra that installs it
    install: str = ""  # the command that installs it, where no extra can
    problems: str = ""  # "module:function" that says what it refuses without importing the framework
    before: str = ""  # a module to import before the framework and the user's files: it sets what they read
    preload: tuple[str, ...] = ()  # what a warm process imports before it forks ranks
    fork: bool = True  # False: the framework starts threads at import
    remote: bool = False  # its ranks have an environment of their own: what they need is not needed here
    child: bool = False  # its jobs end with whoever starts them, unless launcher.options.detached says otherwise
    inner: str = ""  # its ranks are actors of one controller, which run this strategy unless options.inner names one
    starter: str = "agent"  # what starts its ranks, as World.starter says; our agent runs any launcher.options.entry

    @property
    def installed(self) -> bool:
        """True when what the entry requires can be imported."""
        return not self.requires or importlib.util.find_spec(self.requires) is not None


_TORCH = (
    "torch",
    "torch._dynamo",  # DDP and FSDP2 import it when they are built
    "torch.nn.parallel",
    "unitrain.strategies._torch_engine",
    "unitrain.strategies._torch_models",
    "unitrain.trainer",
    "unitrain.worker",
)

STRATEGIES: Mapping[str, Entry] = MappingProxyType({
    "single": Entry(
        path="unitrain.strategies.single:Single",
        summary="one process, the reference for all others",
        framework="torch",
        problems="unitrain.strategies._torch_refusals:single",
        preload=_TORCH,
    ),
    "ddp": Entry(
        path="unitrain.strategies.ddp:DDP",
        summary="PyTorch DDP: every rank holds the whole model",
        framework="torch",
        problems="unitrain.strategies._torch_refusals:ddp",
        preload=_TORCH,
    ),
    "fsdp2": Entry(
        path="unitrain.strategies.fsdp2:FSDP2",
        summary="PyTorch FSDP2: parameters, gradients and moments sharded over the ranks",
        framework="torch",
        problems="unitrain.strategies._torch_refusals:fsdp2",
        preload=(*_TORCH, "torch.distributed.fsdp"),
    ),
    **{
        name: Entry(
            path=f"unitrain.strategies.deepspeed:{kind}",
            summary=f"DeepSpeed {summary}",
            framework="torch",
            requires="deepspeed",
            package="DeepSpeed",
            extra="deepspeed",
            problems=f"unitrain.strategies._torch_refusals:{name}",
            preload=(*_TORCH, "unitrain.strategies.deepspeed"),
        )
        for name, kind, summary in (
            ("zero1", "Zero1", "ZeRO-1: optimizer state sharded"),
            ("zero2", "Zero2", "ZeRO-2: gradients and optimizer state sharded"),
            ("zero3", "Zero3", "ZeRO-3: parameters, gradients and optimizer state sharded"),
            ("zero2_offload", "Zero2Offload", "ZeRO-2 with the optimizer in host memory"),
            ("zero3_offload", "Zero3Offload", "ZeRO-3 with parameters and optimizer in host memory or on NVMe"),
        )
    },
    "horovod": Entry(
        path="unitrain.strategies.horovod:Horovod",
        summary="Horovod: gradients summed by ring all-reduce",
        framework="torch",
        requires="horovod",
        package="Horovod, built against this torch",
        install="python -m unitrain.build horovod",
        problems="unitrain.strategies._torch_refusals:horovod",
        preload=_TORCH,
    ),
    "accelerate": Entry(
        path="unitrain.strategies.accelerate:Accelerate",
        summary="runs your own accelerate config: DDP, FSDP2 or DeepSpeed",
        framework="torch",
        requires="accelerate",
        package="accelerate",
        extra="accelerate",
        problems="unitrain.strategies._torch_refusals:accelerate",
        preload=(*_TORCH, "accelerate"),
    ),
    "jax": Entry(
        path="unitrain.strategies.jax:Jax",
        summary="JAX: one jitted step over a mesh of data, fsdp and tensor axes",
        framework="jax",
        requires="flax",
        package="JAX and Flax",
        extra="jax",
        problems="unitrain.strategies._jax_refusals:jax",
        preload=("jax", "flax.nnx", "unitrain.strategies.jax", "unitrain.trainer", "unitrain.worker"),
    ),
    "tensorflow": Entry(
        path="unitrain.strategies.tensorflow:TensorFlow",
        summary="TensorFlow: MultiWorkerMirroredStrategy, every rank holds the whole model",
        framework="tensorflow",
        requires="tensorflow",
        package="TensorFlow",
        extra="tensorflow",
        problems="unitrain.strategies._tensorflow_refusals:tensorflow",
        before="unitrain.strategies._tensorflow_environment",
        preload=("unitrain.strategies.tensorflow", "unitrain.trainer", "unitrain.worker"),
    ),
    "ray": Entry(
        path="unitrain.strategies.ray:Ray",
        summary="Ray: the ranks of another strategy are actors, and the Trainer runs in their controller",
        requires="ray",
        package="Ray",
        extra="ray",
        problems="unitrain.strategies._ray_refusals:ray",
        preload=("unitrain.trainer", "unitrain.worker"),
        inner="ddp",
    ),
})  # fmt: skip

LAUNCHERS: Mapping[str, Entry] = MappingProxyType({
    "local": Entry(
        path="unitrain.launchers.local:Local", summary="ranks on this machine, started by our agent", child=True
    ),
    "torchrun": Entry(
        path="unitrain.launchers.torchrun:Torchrun",
        summary="ranks under torch's elastic agent: one on this node, and yours to start on every other",
        child=True,
        starter="torchrun",
    ),
    "ssh": Entry(
        path="unitrain.launchers.ssh:SSH",
        summary="hosts that share a folder, without a scheduler: an agent on each, started by ssh",
        child=True,
    ),
    "mpi": Entry(
        path="unitrain.launchers.mpi:MPI", summary="ranks under mpirun, one in each slot", child=True, starter="mpirun"
    ),
    "slurm": Entry(path="unitrain.launchers.slurm:Slurm", summary="a batch job of Slurm, requeued until it is done"),
    "ray": Entry(
        path="unitrain.launchers.ray:Ray",
        summary="nodes of a Ray cluster by its Jobs API, or a private Ray on this machine",
        requires="ray",
        package="Ray",
        extra="ray",
        child=True,
    ),
    "kubernetes": Entry(
        path="unitrain.launchers.kubernetes:Kubernetes",
        summary="pods of Kubernetes: TrainJob, JobSet, Indexed Job, or a Job for each node",
        requires="kubernetes",
        package="the kubernetes client",
        extra="kubernetes",
        remote=True,
    ),
})  # fmt: skip

# of each framework that `unitrain doctor` tries: (world, coordinator) -> what it found
PROBES: Mapping[str, str] = MappingProxyType({"torch": "unitrain.strategies._torch_probe:probe"})

# configuration classes: the schema of `model:` and `data:` for the built-in names
MODELS: Mapping[str, Entry] = MappingProxyType({
    "gpt": Entry(path="unitrain.models.config:GPT", summary="decoder-only transformer: RMSNorm, RoPE, SwiGLU"),
    "mlp": Entry(path="unitrain.models.config:MLP", summary="fully connected layers"),
    "convnet": Entry(path="unitrain.models.config:ConvNet", summary="small residual convolutional network"),
    "hf": Entry(
        path="unitrain.models.hf_config:HF",
        summary="a model of transformers, from a local folder or its configuration; with adapters (LoRA) if you like",
        requires="transformers",
        package="transformers",
        extra="hf",
    ),
})  # fmt: skip

SOURCES: Mapping[str, Entry] = MappingProxyType({
    "text": Entry(
        path="unitrain.data.text:TextData", summary="text files, folders and globs; the corpus python-stdlib"
    ),
    "tokens": Entry(path="unitrain.data.tokens:TokensData", summary="memory-mapped uint16 or uint32 token files"),
    "arrays": Entry(path="unitrain.data.arrays:ArraysData", summary="named arrays of an npz file"),
    "digits": Entry(
        path="unitrain.data.digits:DigitsData",
        summary="scikit-learn's handwritten digits",
        requires="sklearn",
        package="scikit-learn",
        extra="digits",
    ),
    "datasets": Entry(
        path="unitrain.data.hf:DatasetsData",
        summary="Hugging Face data sets on this machine: save_to_disk, parquet, JSON lines",
        requires="datasets",
        package="datasets",
        extra="hf",
    ),
    "records": Entry(
        path="unitrain.data.records:RecordsData",
        summary="prompts with completions, preferences or what a reward needs: JSON lines, or a function of yours",
    ),
})  # fmt: skip


def entries(group: str) -> dict[str, Entry]:
    """The built-in entries of a group ("strategies" or "launchers") and those of installed third parties."""
    built_in = {"strategies": STRATEGIES, "launchers": LAUNCHERS, "models": MODELS, "sources": SOURCES}[group]
    found = dict(built_in)
    for point in _third_parties(group):
        if point.name in found:
            raise UserError(
                f"the installed package of entry point {point.value!r} takes the name {point.name!r}, which "
                f"{found[point.name].path} has already: one of them must be renamed or removed"
            )
        found[point.name] = Entry(path=point.value, summary=f"from {point.value.partition('.')[0]}", fork=False)
    return found


@cache
def _third_parties(group: str) -> EntryPoints:
    return entry_points(group=f"unitrain.{group}")


def entry(group: str, name: str) -> Entry:
    """The entry of that name. Raises UnknownName with the known ones, or MissingExtra with how to install it.

    A strategy or launcher that no package registers goes by its own path, module:Class.
    """
    found = known(group, name)
    if not found.installed:
        raise MissingExtra(f"{_SINGULAR[group]} {name!r}", found.package, found.extra, install=found.install)
    return found


def known(group: str, name: str) -> Entry:
    """The same, whether what it needs is installed here or not."""
    if ":" in name and group in ("strategies", "launchers"):
        return Entry(path=name, summary="your own", fork=False)
    there = entries(group)
    if name not in there:
        raise UnknownName(_SINGULAR[group], name, there)
    return there[name]


def inner(strategy: StrategyRecipe) -> StrategyRecipe:
    """What the ranks themselves run: the strategy as it is, or the inner one where they are a controller's actors.

    Raises UnknownName where the inner one is none.
    """
    found = known("strategies", strategy.name)
    if not found.inner:
        return strategy
    name = str(strategy.options.get("inner") or found.inner)
    known("strategies", name)
    options = strategy.options.get("inner_options") or {}
    return StrategyRecipe(name=name, options=options if isinstance(options, Mapping) else {})


def framework_of(strategy: StrategyRecipe) -> str:
    """The framework that its ranks run on; empty where only a third party's class knows."""
    return known("strategies", inner(strategy).name).framework


def prepare(strategy: str) -> None:
    """Set what a strategy's framework reads from the environment when it is imported. Call it before that."""
    if module := entry("strategies", strategy).before:
        importlib.import_module(module)


def load(group: str, name: str) -> Any:
    """The class of that name, imported now."""
    return resolve(entry(group, name).path)


def resolve(path: str) -> Any:
    """The object at "module:Class"."""
    module, _, attribute = path.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise  # the module is there, but something that it imports is not
        raise UserError(f"there is no module {module!r} for {path!r}; install it or set PYTHONPATH") from error
    except AttributeError as error:
        raise UserError(f"module {module!r} has no {attribute!r} ({error})") from error


_SINGULAR = {"strategies": "strategy", "launchers": "launcher", "models": "model", "sources": "data source"}
