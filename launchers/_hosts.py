"""Which hosts a launcher goes to: lists and files of hosts, written `host`, `user@host` or `user@host:port`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unitrain.recipe import LauncherRecipe
from unitrain.strategy import Problem

# A name may not begin with a dash: it would be an option of the command that it is given to.
_NAME = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,252}"
_HOST = re.compile(
    rf"(?:(?P<user>{_NAME})@)?(?:(?P<name>{_NAME})|\[(?P<v6>[0-9A-Fa-f:.]{{2,45}})\])(?::(?P<port>\d{{1,5}}))?"
)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\*?|\*")

HOST_OPTIONS = {
    "hosts": "the hosts, as a list: host, user@host, user@host:port; an IPv6 address stands in brackets",
    "hostfile": "or a file that lists them, one a line; behind each `slots=N` may stand, and comments begin with #",
}


@dataclass(frozen=True, kw_only=True)
class Host:
    """One machine, as ssh is told."""

    name: str
    user: str = ""
    port: int | None = None
    slots: int | None = None  # ranks that it takes, where a host file says so

    def __str__(self) -> str:
        name = f"[{self.name}]" if ":" in self.name else self.name
        return f"{self.user}@{name}" if self.user else name

    @classmethod
    def parse(cls, text: Any) -> Host:
        """Raises ValueError for anything but the three forms."""
        found = _HOST.fullmatch(text) if isinstance(text, str) else None
        if found is None:
            raise ValueError(f"{text!r} is no host; write host, user@host or user@host:port")
        port = None if found["port"] is None else int(found["port"])
        if port is not None and not 0 < port < 65536:
            raise ValueError(f"{text!r} has the port {port}; ports go from 1 to 65535")
        return cls(name=found["name"] or found["v6"], user=found["user"] or "", port=port)


def hosts_of(options: Mapping[str, Any]) -> list[Host]:
    """The hosts that the options name. Raises ValueError where they are wrong or none."""
    listed, file = options.get("hosts"), options.get("hostfile")
    if listed is not None and file is not None:
        raise ValueError("launcher.options has hosts and hostfile; give one of them")
    if listed is None and file is None:
        raise ValueError("launcher.options names no hosts")
    if file is not None:
        found = _read(file)
    else:
        words = listed.split(",") if isinstance(listed, str) else listed
        if not isinstance(words, Sequence) or not words:
            raise ValueError(f"launcher.options.hosts is {listed!r}, which is no list of hosts")
        found = [Host.parse(word.strip() if isinstance(word, str) else word) for word in words]
    twice = sorted({str(host) for host in found if sum(other.name == host.name for other in found) > 1})
    if twice:
        raise ValueError(
            f"{', '.join(twice)} is named more than once; a host gets one agent, with launcher.nproc ranks"
        )
    return found


def chosen_hosts(options: Mapping[str, Any], nodes: int, nproc: int) -> list[Host]:
    """One host for each node. Raises ValueError where the hosts do not fit the shape of the run."""
    found = hosts_of(options)
    if options.get("hostfile") is not None:
        if len(found) < nodes:
            raise ValueError(f"{options['hostfile']} lists {len(found)} hosts, and launcher.nodes is {nodes}")
        found = found[:nodes]
    elif len(found) != nodes:
        raise ValueError(f"launcher.options.hosts names {len(found)} hosts, and launcher.nodes is {nodes}")
    for host in found:
        if host.slots is not None and host.slots < nproc:
            raise ValueError(f"{host} has slots={host.slots}, and launcher.nproc is {nproc}")
    return found


def host_problems(wanted: LauncherRecipe) -> list[Problem]:
    """What is wrong with the hosts of a recipe."""
    try:
        chosen_hosts(wanted.options, wanted.nodes, wanted.nproc)
    except ValueError as error:
        return [
            Problem(
                str(error),
                "give launcher.options.hosts=[HOST,USER@HOST:PORT] or launcher.options.hostfile=FILE, and --nodes as "
                "many as there are",
            )
        ]
    return []


def unknown_options(wanted: LauncherRecipe, known: Mapping[str, str]) -> list[Problem]:
    """Keys that the launcher does not have."""
    return [
        Problem(f"launcher {wanted.name!r} has no option {str(key)[:60]!r}", f"it has {', '.join(known)}")
        for key in wanted.options
        if key not in known
    ]


def odd_words(options: Mapping[str, Any], names: Sequence[str]) -> list[Problem]:
    """Values that cannot be one word of a command line: no text, empty, with control characters, or like an option."""
    return [
        Problem(
            f"launcher.options.{name} is {options[name]!r}", "give a text without control characters or dash before"
        )
        for name in names
        if options.get(name) is not None and not is_word(options[name])
    ]


def is_word(value: Any) -> bool:
    """True for a text that a command line or a line of a file can hold as it is meant."""
    return isinstance(value, str) and value != "" and value.isprintable() and not value.startswith("-")


def odd_numbers(options: Mapping[str, Any], ranges: Mapping[str, tuple[float, float]]) -> list[Problem]:
    """Numbers that are none or out of range; a range of whole numbers takes whole numbers only."""
    found = []
    for name, (least, most) in ranges.items():
        value = options.get(name)
        kinds = (int,) if isinstance(least, int) else (int, float)
        if value is not None and (type(value) not in kinds or not least <= value <= most):
            what = f"launcher.options.{name} is {value!r}"
            found.append(
                Problem(what, f"give a {'whole ' if kinds == (int,) else ''}number from {least:g} to {most:g}")
            )
    return found


def odd_variables(options: Mapping[str, Any]) -> list[Problem]:
    """Names of variables that are none."""
    names = options.get("environment")
    if names is None or (
        isinstance(names, Sequence)
        and not isinstance(names, str)
        and all(isinstance(name, str) and _VARIABLE.fullmatch(name) for name in names)
    ):
        return []
    what = f"launcher.options.environment is {names!r}"
    return [Problem(what, "give a list of names, such as [HF_TOKEN, NCCL_*]; values come from where you launch")]


def chosen_variables(names: Sequence[str], environ: Mapping[str, str]) -> dict[str, str]:
    """Those variables of an environment; `NCCL_*` are all of that beginning. Raises ValueError for one that is not."""
    found: dict[str, str] = {}
    for name in names:
        if name.endswith("*"):
            found |= {key: value for key, value in environ.items() if key.startswith(name[:-1])}
        elif name in environ:
            found[name] = environ[name]
        else:
            raise ValueError(f"launcher.options.environment names {name}, which is not set here")
    return found


def _read(path: Any) -> list[Host]:
    if not is_word(path):
        raise ValueError(f"launcher.options.hostfile is {path!r}, which is no file")
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the host file {path} cannot be read: {getattr(error, 'strerror', error)}") from error
    found = []
    for number, line in enumerate(lines, start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        try:
            host = Host.parse(words[0])
            slots = _slots(words[1:])
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        found.append(Host(name=host.name, user=host.user, port=host.port, slots=slots))
    if not found:
        raise ValueError(f"the host file {path} lists no host")
    return found


def _slots(words: Sequence[str]) -> int | None:
    slots = None
    for word in words:
        name, _, value = word.partition("=")
        if name not in ("slots", "max_slots", "max-slots") or not re.fullmatch(r"[1-9]\d{0,5}", value):
            raise ValueError(f"{word!r} is not understood; behind a host only slots=N may stand")
        slots = int(value) if name == "slots" else slots
    return slots
