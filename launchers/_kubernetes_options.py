"""What a recipe may ask of Kubernetes, and what of it is refused before anything is sent anywhere."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from types import MappingProxyType
from typing import Any, NamedTuple

from unitrain.agent.job import AGENT_OPTIONS, TEAM_OPTIONS
from unitrain.errors import did_you_mean
from unitrain.recipe import Recipe
from unitrain.strategy import Problem

KINDS = ("trainjob", "jobset", "job", "jobs", "pytorchjob", "rayjob")
GRACE_SECONDS = 30.0  # the agent's, unless launcher.options.grace_seconds says otherwise
MARGIN_SECONDS = 15  # that a pod has beyond its agent's grace: for the ranks' end and the last files
PORT = 29500

_NAME = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
_DOTTED = rf"(?=.{{1,253}}$){_NAME}(\.{_NAME})*"
_KEY = rf"(({_DOTTED})/)?[A-Za-z0-9]([A-Za-z0-9._-]{{0,61}}[A-Za-z0-9])?"
_VALUE = r"([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?"
_QUANTITY = r"([0-9]{1,12}(\.[0-9]{1,9})?)(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?"
_IMAGE = (
    r"(?=.{1,255}$)[a-z0-9]([a-zA-Z0-9._-]*[a-zA-Z0-9])?(:[0-9]{1,5})?(/[a-z0-9]+([._-]+[a-z0-9]+)*)*"
    r"(:[A-Za-z0-9_][A-Za-z0-9._-]{0,127})?(@sha256:[0-9a-f]{64})?"
)
_PATH = r"/[^\x00-\x1f\x7f:]*"
_VARIABLE = r"[A-Za-z_][A-Za-z0-9_]*"
_SECRET_NAMES = re.compile(r"TOKEN(?!IZER)|SECRET|PASSW|CREDENTIAL|PRIVATE|(API|ACCESS)_?KEY", re.IGNORECASE)
_UNITS = {
    **{unit: Decimal(1000) ** power for power, unit in enumerate(("", "k", "M", "G", "T", "P"))},
    **{unit: Decimal(1024) ** power for power, unit in enumerate(("Ki", "Mi", "Gi", "Ti", "Pi"), start=1)},
    "m": Decimal("0.001"),
}
_VOLUMES = {"claim": _DOTTED, "host_path": _PATH, "secret": _DOTTED, "config_map": _DOTTED, "empty": r"Memory|Disk"}
_TOLERATION = {
    "key": _KEY,
    "operator": "Equal|Exists",
    "value": _VALUE,
    "effect": "NoSchedule|PreferNoSchedule|NoExecute",
}


class Option(NamedTuple):
    """What an option is for, which values it takes, and how to say so."""

    help: str
    accepts: Callable[[Any], bool]
    words: str


def quantity(text: str | float) -> Decimal:
    """`500m`, `32Gi` or 8 as a number. Raises ValueError for anything else."""
    found = re.fullmatch(_QUANTITY, str(text))
    if found is None:
        raise ValueError(f"{text!r} is no quantity")
    return Decimal(found[1]) * _UNITS[found[3] or ""]


def _word(pattern: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and re.fullmatch(pattern, value) is not None


def _number(least: int, most: int = 1 << 31) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and least <= value <= most


def _is_quantity(value: Any) -> bool:
    return type(value) in (str, int, float) and re.fullmatch(_QUANTITY, str(value)) is not None


def _words(pattern: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list | tuple) and all(map(_word(pattern), value))


def _table(keys: str, accepts: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, Mapping) and all(_word(keys)(key) and accepts(item) for key, item in value.items())
    )


def _is_line(value: Any) -> bool:
    return type(value) in (int, float) or (isinstance(value, str) and value.isprintable())


def _is_variable(value: Any) -> bool:
    if isinstance(value, Mapping):
        return set(value) == {"secret", "key"} and _word(_DOTTED)(value["secret"]) and _word(_VALUE)(value["key"])
    return _is_line(value)


def _is_volume(value: Any) -> bool:
    """One source, and where it is mounted."""
    if not isinstance(value, Mapping):
        return False
    sources = [key for key in value if key in _VOLUMES]
    words = {**_VOLUMES, "path": _PATH, "here": _PATH, "sub_path": r"[^/\x00-\x1f\x7f:][^\x00-\x1f\x7f:]*"}
    return len(sources) == 1 and all(
        type(item) is bool if key == "read_only" else key in words and _word(words[key])(item) and not _climbs(item)
        for key, item in value.items()
    )


def _climbs(path: str) -> bool:
    return ".." in path.split("/")


def _is_mount(value: Any) -> bool:
    return _is_volume(value) and "path" in value and "here" not in value


def _is_toleration(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        _number(0)(item) if key == "tolerationSeconds" else key in _TOLERATION and _word(_TOLERATION[key])(item)
        for key, item in value.items()
    )


def _list_of(accepts: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list | tuple) and all(map(accepts, value))


_NAME_WORDS = "a name of at most 63 lowercase letters, digits and '-'"
_NAMES_WORDS = "a list of names of lowercase letters, digits, '-' and '.'"
_QUANTITY_WORDS = "a quantity such as 8, 500m or 32Gi"
_LABELS_WORDS = "a table of label names and values: letters, digits, '-', '_' and '.', at most 63"
_MOUNT_WORDS = "{{{}: NAME, path: /WHERE, sub_path: IN/IT, read_only: true}}".format("|".join(_VOLUMES))
_SECONDS_WORDS = "a whole number of seconds"

OWN: Mapping[str, Option] = MappingProxyType({
    "kind": Option(
        "`trainjob`, `jobset`, `job` (Indexed Job), `jobs` (a Job for each node), `pytorchjob` or `rayjob`; unless "
        "given, the first of the first four that the cluster has",
        lambda value: value in KINDS,
        f"one of {', '.join(KINDS)}",
    ),
    "image": Option(
        "the containers' image, with unitrain and its backend in it; must be given",
        _word(_IMAGE),
        "an image such as registry.example.org/team/unitrain:1",
    ),
    "image_pull_policy": Option(
        "when the image is fetched; the cluster's choice unless given",
        _word("Always|IfNotPresent|Never"),
        "Always, IfNotPresent or Never",
    ),
    "image_pull_secrets": Option("names of Secrets with the registry's password", _words(_DOTTED), _NAMES_WORDS),
    "namespace": Option("where the objects are made; that of the context unless given", _word(_NAME), _NAME_WORDS),
    "context": Option(
        "which cluster of the kubeconfig file; its current one unless given",
        _word(r"[A-Za-z0-9][^\x00-\x20\x7f]{0,252}"),
        "the name of a context",
    ),
    "kubeconfig": Option(
        "the file that says where clusters are; $KUBECONFIG or ~/.kube/config unless given",
        _word(_PATH),
        "an absolute path",
    ),
    "python": Option(
        "of the image; `python` unless given",
        _word(r"/[A-Za-z0-9_./-]{1,254}|[A-Za-z0-9_][A-Za-z0-9_.-]{0,254}"),
        "an absolute path or a plain name",
    ),
    "workdir": Option(
        "where relative paths of the recipe start in the pods; the image's own folder unless given",
        _word(_PATH),
        "an absolute path",
    ),
    "volume": Option(
        "where runs are kept: {claim: NAME} or {host_path: DIR}; `path`: where pods see it (/runs, or the host's "
        "path); `sub_path`: a folder in it; `here`: where this machine sees the same folder, if it does",
        lambda value: (
            _is_volume(value) and bool({"claim", "host_path"} & set(value)) and not value.get("read_only", False)
        ),
        "{claim: NAME} or {host_path: DIR}, with path, sub_path and here as absolute paths",
    ),
    "mounts": Option("more volumes, such as data: a list", _list_of(_is_mount), f"a list of {_MOUNT_WORDS}"),
    "env": Option(
        "variables of the ranks: NAME: value, or NAME: {secret: NAME, key: KEY}",
        _table(_VARIABLE, _is_variable),
        "a table of NAME: value and NAME: {secret: NAME, key: KEY}",
    ),
    "env_from": Option("Secrets all of whose keys become variables", _words(_DOTTED), _NAMES_WORDS),
    "gpus": Option("of each pod, one for each of its launcher.nproc ranks; 0 unless given", _number(0, 64), "a number"),
    "gpu_resource": Option("what the cluster calls a GPU; `nvidia.com/gpu` unless given", _word(_KEY), "a resource"),
    "cpu": Option("cores that each pod asks for", _is_quantity, _QUANTITY_WORDS),
    "memory": Option("that each pod asks for, and its limit", _is_quantity, _QUANTITY_WORDS),
    "shm": Option(
        "most of /dev/shm, which counts as memory; unless given, as much as the pod's memory allows",
        _is_quantity,
        _QUANTITY_WORDS,
    ),
    "node_selector": Option("labels that a machine must have", _table(_KEY, _word(_VALUE)), _LABELS_WORDS),
    "tolerations": Option(
        "taints that are borne, as Kubernetes writes them",
        _list_of(_is_toleration),
        "a list of {key, operator, value, effect, tolerationSeconds}",
    ),
    "service_account": Option("whose rights the pods have; its token is not mounted", _word(_DOTTED), _NAME_WORDS),
    "priority_class": Option("the pods' PriorityClass", _word(_DOTTED), _NAME_WORDS),
    "run_as": Option(
        "user and group number of the processes and their files; then also nothing beyond Pod Security's `restricted`",
        _number(1),
        "a user's number above 0",
    ),
    "labels": Option("more labels of all objects", _table(_KEY, _word(_VALUE)), _LABELS_WORDS),
    "annotations": Option("of all objects", _table(_KEY, _is_line), "a table of names and lines"),
    "queue": Option("Kueue's LocalQueue; the job is then made suspended", _word(_DOTTED), _NAME_WORDS),
    "runtime": Option(
        "the ClusterTrainingRuntime of a TrainJob; `torch-distributed` unless given", _word(_DOTTED), _NAME_WORDS
    ),
    "port": Option(f"at which node 0's agent listens; {PORT} unless given", _number(1024, 65535), "a port"),
    "meet": Option(
        "how other nodes find node 0: by `dns`, or by a file in the run's folder (`shared`) where pods have no DNS; "
        "`dns` unless given",
        _word("dns|shared"),
        "dns or shared",
    ),
    "retries": Option(
        "times that failed pods are started again; evictions and saves do not count; 0: never; 3 unless given",
        _number(0, 1000),
        "a number",
    ),
    "termination_seconds": Option(
        f"from a pod's SIGTERM to its SIGKILL; grace_seconds + {MARGIN_SECONDS} unless given",
        _number(1),
        _SECONDS_WORDS,
    ),
    "deadline_seconds": Option("after which Kubernetes ends the job", _number(1), _SECONDS_WORDS),
    "keep_seconds": Option(
        "that ended objects and their logs stay in the cluster; 86400 unless given", _number(0), _SECONDS_WORDS
    ),
    "give_up_seconds": Option(
        "for which pods that cannot start, for a reason that waiting does not mend, are left before the job is "
        "deleted; 0: for ever; 600 unless given",
        _number(0),
        _SECONDS_WORDS,
    ),
})  # fmt: skip

OPTIONS: Mapping[str, str] = MappingProxyType(
    {**AGENT_OPTIONS, **TEAM_OPTIONS, **{name: option.help for name, option in OWN.items()}}
)


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """The options, checked, each with its default."""

    image: str
    kind: str | None = None
    image_pull_policy: str | None = None
    image_pull_secrets: tuple[str, ...] = ()
    namespace: str | None = None
    context: str | None = None
    kubeconfig: str | None = None
    python: str = "python"
    workdir: str | None = None
    volume: Mapping[str, Any] | None = None
    mounts: tuple[Mapping[str, Any], ...] = ()
    env: Mapping[str, Any] = field(default_factory=dict)
    env_from: tuple[str, ...] = ()
    gpus: int = 0
    gpu_resource: str = "nvidia.com/gpu"
    cpu: str | float | None = None
    memory: str | float | None = None
    shm: str | float | None = None
    node_selector: Mapping[str, str] = field(default_factory=dict)
    tolerations: tuple[Mapping[str, Any], ...] = ()
    service_account: str | None = None
    priority_class: str | None = None
    run_as: int | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, Any] = field(default_factory=dict)
    queue: str | None = None
    runtime: str = "torch-distributed"
    port: int = PORT
    meet: str = "dns"
    retries: int = 3
    termination_seconds: int | None = None
    deadline_seconds: int | None = None
    keep_seconds: int = 86400
    give_up_seconds: int = 600
    grace_seconds: float = GRACE_SECONDS

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Wishes:
        """From `launcher.options` that `problems` has nothing to say about."""
        own = {key: value for key, value in options.items() if (key in OWN or key == "grace_seconds")}
        given: Any = {key: tuple(value) if isinstance(value, list) else value for key, value in own.items()}
        return cls(**{key: value for key, value in given.items() if value is not None})

    @property
    def pod_seconds(self) -> int:
        """From a pod's SIGTERM to its SIGKILL."""
        return self.termination_seconds or int(self.grace_seconds) + MARGIN_SECONDS


def problems(recipe: Recipe) -> Iterator[Problem]:
    """Unknown options, values of the wrong form, and wishes that exclude each other."""
    wanted = recipe.launcher
    bad = False
    for key, value in wanted.options.items():
        if key not in OPTIONS:
            instead = f"it has {', '.join(OPTIONS)}"
            yield Problem(f"launcher 'kubernetes' has no option {key!r}{did_you_mean(key, OPTIONS)}", instead)
        elif value is not None and key in OWN and not OWN[key].accepts(value):
            bad = True
            yield Problem(f"launcher.options.{key} is {_short(value)}", f"give {OWN[key].words}")
    grace = wanted.options.get("grace_seconds", GRACE_SECONDS)
    if type(grace) not in (int, float) or not 0 <= grace <= 86400:
        bad = True
        yield Problem(f"launcher.options.grace_seconds is {_short(grace)}", "give seconds, from 0 to a day")
    if wanted.options.get("image") is None:
        bad = True
        yield Problem(
            "launcher 'kubernetes' has no image for its containers",
            "give launcher.options.image=REGISTRY/NAME:TAG, one with unitrain and the strategy's framework in it",
        )
    if not bad:
        yield from _excluded(Wishes.of(wanted.options), recipe)


def _excluded(wishes: Wishes, recipe: Recipe) -> Iterator[Problem]:
    wanted = recipe.launcher
    if wishes.volume is None and wanted.nodes > 1:
        yield Problem(
            f"{wanted.nodes} pods have no folder that all of them see",
            "give launcher.options.volume={claim: NAME}, a volume that several machines may write",
        )
    elif wishes.volume is None and recipe.checkpoint.path is None:
        yield Problem(
            "what the run saves would be lost with its pod",
            "give launcher.options.volume={claim: NAME}, or checkpoint.path=URL of an object store",
        )
    if recipe.code.snapshot and not {"here", "host_path"} & set(wishes.volume or {}):
        yield Problem(
            "the copy of the code that code.snapshot asks for cannot be put where pods see it",
            "give launcher.options.volume.here=DIR where this machine sees the volume, or put the code into the image",
        )
    if wishes.gpus and wishes.gpus != wanted.nproc:
        yield Problem(
            f"{wanted.nproc} ranks cannot have one each of {wishes.gpus} GPUs",
            f"set launcher.nproc={wishes.gpus}, or launcher.options.gpus={wanted.nproc}",
        )
    if wishes.termination_seconds is not None and wishes.termination_seconds < wishes.grace_seconds + MARGIN_SECONDS:
        least = int(wishes.grace_seconds) + MARGIN_SECONDS
        yield Problem(
            f"launcher.options.termination_seconds={wishes.termination_seconds} ends a pod before its ranks have had "
            f"their launcher.options.grace_seconds={wishes.grace_seconds:g}",
            f"give at least {least}, or a shorter grace",
        )
    if wishes.shm is not None and wishes.memory is not None and quantity(wishes.shm) > quantity(wishes.memory):
        what = f"launcher.options.shm={wishes.shm} is more than launcher.options.memory={wishes.memory}, which it is in"
        yield Problem(what, "give less of it, or more memory")
    if wishes.kind == "trainjob":
        yield from _not_of_trainjob(wishes)
    if wishes.kind == "pytorchjob" and wishes.meet == "shared":
        yield Problem("a PyTorchJob's nodes meet by DNS", "leave launcher.options.meet out, or set kind=jobs")
    if wishes.kind == "rayjob" and wishes.volume is None:
        yield Problem(
            "the head and the workers of a RayJob share a folder", "give launcher.options.volume={claim: NAME}"
        )
    if wishes.kind == "rayjob" and wishes.meet == "shared":
        yield Problem("a RayJob's nodes meet through Ray", "leave launcher.options.meet out")
    for name, value in wishes.env.items():
        if _SECRET_NAMES.search(name) and not isinstance(value, Mapping):
            yield Problem(
                f"launcher.options.env.{name} would stand in the manifest for everybody to read",
                f"make a Secret, and give launcher.options.env.{name}={{secret: NAME, key: KEY}}",
            )
    yield from _taken_paths(wishes)


def _not_of_trainjob(wishes: Wishes) -> Iterator[Problem]:
    """What a TrainJob leaves to its runtime."""
    instead = "leave that to the ClusterTrainingRuntime, or set launcher.options.kind=jobset"
    for name in ("env_from", "priority_class", "keep_seconds", "image_pull_policy", "workdir"):
        if getattr(wishes, name) != getattr(Wishes(image=""), name):
            yield Problem(f"a TrainJob has no place for launcher.options.{name}", instead)


def _taken_paths(wishes: Wishes) -> Iterator[Problem]:
    ours = ["/etc/unitrain", "/dev/shm", *([volume_path(wishes.volume)] if wishes.volume else [])]
    paths = [*ours, *(mount["path"].rstrip("/") or "/" for mount in wishes.mounts)]
    for path in sorted({path for path in paths if paths.count(path) > 1}):
        yield Problem(f"two volumes are mounted at {path}", "give another path in launcher.options.mounts")


def volume_path(volume: Mapping[str, Any]) -> str:
    """Where pods see the folder of runs."""
    return str(volume.get("path") or volume.get("host_path") or "/runs").rstrip("/") or "/"


def _short(value: Any) -> str:
    text = repr(dict(value) if isinstance(value, Mapping) else value)
    return text if len(text) < 80 else f"{text[:77]}..."
