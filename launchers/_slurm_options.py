"""What a user can ask of Slurm in `launcher.options`, and which text of it may stand in a batch script.

Every value is checked against the words that it can have: nothing of a recipe adds a directive, a line or a command.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unitrain.agent.job import AGENT_OPTIONS, TEAM_OPTIONS
from unitrain.errors import did_you_mean
from unitrain.strategy import Problem

MAX_REQUEUES = 10
WARN_SECONDS = 120
_MOST_LETTERS = 1024  # of a value

Text = Callable[[Any], str]  # a value as Slurm or a shell has it. Raises ValueError with what is expected instead.


def option_problems(options: Mapping[str, Any], nodes: int) -> list[Problem]:
    """What is wrong with the options of a run on so many nodes."""
    problems = []
    for key, value in options.items():
        if key in HETEROGENEOUS:
            what = "launcher 'slurm' starts no heterogeneous jobs: every node must have the same number of ranks"
            problems.append(Problem(what, "ask for nodes of one kind, by constraint or partition"))
        elif key == "array":
            what = "launcher.options.array would start the same run several times in one folder"
            problems.append(Problem(what, "use unitrain launch --sweep, which gives each job a folder of its own"))
        elif key not in OPTIONS:
            near = did_you_mean(key, OPTIONS) if key.isprintable() else ""
            what = f"launcher 'slurm' has no option {key[:60]!r}{near}"
            problems.append(Problem(what, f"it has {', '.join(OPTIONS)}"))
        else:
            try:
                OPTIONS[key].text(value)
            except ValueError as error:
                shown = repr(value) if len(repr(value)) <= 80 else f"{repr(value)[:80]}..."
                problems.append(Problem(f"launcher.options.{key} is {shown}", f"give {error}"))
    return problems or _contradictions(options, nodes)


def _contradictions(options: Mapping[str, Any], nodes: int) -> list[Problem]:
    """Of values that are good each by itself."""
    problems = []
    if "gpus_per_node" in options and "gpu" in options.get("gres", ""):
        problems.append(Problem("launcher.options asks for GPUs by gpus_per_node and by gres", "keep one of them"))
    if "container_mounts" in options and "container_image" not in options:
        problems.append(Problem("launcher.options.container_mounts needs a container", "give container_image"))
    if options.get("min_nodes", nodes) > nodes:
        what = f"launcher.options.min_nodes is {options['min_nodes']} of launcher.nodes={nodes}"
        problems.append(Problem(what, f"give a number from 1 to {nodes}"))
    limit, warn = options.get("time"), options.get("warn_seconds", WARN_SECONDS)
    if limit is not None and seconds(limit) <= warn:
        what = f"launcher.options.time={limit} is over before the warning {warn} s ahead of its end"
        problems.append(Problem(what, "raise it, or set launcher.options.warn_seconds to what a save takes"))
    return problems


def seconds(limit: int | str) -> int:
    """A time limit as sbatch reads it: minutes, mm:ss, hh:mm:ss, d-hh, d-hh:mm or d-hh:mm:ss."""
    days, dash, rest = str(limit).rpartition("-")
    numbers = [int(word) for word in rest.split(":")]
    weights = ((60,), (60, 1), (3600, 60, 1))[2 if dash else len(numbers) - 1]
    return int(days or 0) * 86400 + sum(number * weight for number, weight in zip(numbers, weights, strict=False))


# --- words that may stand in a script ----------------------------------------------------------------------------


def path_text(value: Any) -> str:
    """A path that can stand in a directive and in a script. Raises ValueError for any other."""
    text = str(value) if isinstance(value, str | Path) else ""
    # '%' would be replaced in the name of the log; what else is missing here means something to a shell or to sbatch.
    if not re.fullmatch(r"[\w/.+@=,:~][\w/.+@=,:~-]*( [\w/.+@=,:~][\w/.+@=,:~-]*)*", text) or len(text) > 3000:
        raise ValueError("a path of letters, digits, spaces, and any of / . _ + @ = , : ~ -")
    return _without_hetjob(text)


def name_text(value: str) -> str:
    """A name that a job can have. Raises ValueError for any other."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}", value):
        raise ValueError("a name of letters, digits, '.', '_' and '-'")
    return _without_hetjob(value)


def extra_directive(word: Any) -> str:
    """One of `directives`, as it was given. Raises ValueError for what it may not be."""
    found = _EXTRA.fullmatch(word) if isinstance(word, str) and len(word) <= _MOST_LETTERS else None
    if found is None:
        raise ValueError("each as '--option=value' in letters, digits and any of _ : * @ % + . , -")
    if found[1] not in EXTRA:
        ours = next((name for name, option in OPTIONS.items() if option.flag == found[1]), None)
        instead = f"launcher.options.{ours} in place of --{found[1]}" if ours else f"any of --{', --'.join(EXTRA)}"
        raise ValueError(instead)
    return _without_hetjob(word)


def _without_hetjob(text: str) -> str:
    """Some versions of sbatch, not 22.05, cut these words out of a directive wherever they stand in it."""
    if re.search("hetjob|packjob", text, re.IGNORECASE):
        raise ValueError("it without the words hetjob and packjob, which some versions of sbatch cut out")
    return text


def _matching(pattern: str, expected: str) -> Text:
    form = re.compile(pattern)

    def text(value: Any) -> str:
        if not isinstance(value, str) or len(value) > _MOST_LETTERS or not form.fullmatch(value):
            raise ValueError(expected)
        return _without_hetjob(value)

    return text


def _count(least: int) -> Text:
    def text(value: Any) -> str:
        if type(value) is not int or not least <= value < 1 << 31:
            raise ValueError(f"a whole number from {least}")
        return str(value)

    return text


def _count_or(words: Text, least: int = 1) -> Text:
    count = _count(least)

    def text(value: Any) -> str:
        return count(value) if type(value) is int else words(value)

    return text


def _each(words: Text) -> Text:
    def text(value: Any) -> str:
        if not isinstance(value, list | tuple):
            raise ValueError("a list")
        return " ".join(words(word) for word in value)

    return text


def _exclusive(value: Any) -> str:
    if value is True:
        return ""
    if value in ("user", "mcs"):
        return str(value)
    raise ValueError("true, user or mcs")


def _true_or_false(value: Any) -> str:
    if type(value) is not bool:
        raise ValueError("true or false")
    return str(value).lower()


def _time(value: Any) -> str:
    if type(value) not in (int, float) or not 0 <= value < 1e9:
        raise ValueError("seconds")
    return str(value)


def _mount(value: Any) -> str:
    if not isinstance(value, str) or "," in value or not all(path.startswith("/") for path in value.split(":")):
        raise ValueError("whole paths, or 'here:there' of two")
    return path_text(value)


# --- the tables --------------------------------------------------------------------------------------------------

_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.@+-]*"
_name = _matching(_NAME, "a name of letters, digits, '_', '.', '@', '+' and '-'")
_names = _matching(rf"{_NAME}(,{_NAME})*", "names with commas between them")
_limit = _matching(r"\d+(:\d{1,2}){0,2}|\d+-\d{1,2}(:\d{1,2}){0,2}", "minutes, or a text such as '4:00:00' or '2-12'")
_gpus = _matching(r"[A-Za-z0-9_.-]+:\d+", "a number, or a text such as 'a100:4'")
_GRES = r"[A-Za-z0-9_]+(:[A-Za-z0-9_.-]+)?(:\d+[KMGT]?)?"
_gres = _matching(rf"{_GRES}(,{_GRES})*", "a text such as 'gpu:4' or 'gpu:a100:4,nvme:1'")
_features = _matching(r"[A-Za-z0-9_\[(][A-Za-z0-9_.,&|!*:()\[\]-]*", "features, such as 'a100&ib'")
_memory = _matching(r"\d+[KMGT]?", "megabytes, or a text such as '64G'")
_events = _matching(r"[A-Z_0-9]+(,[A-Z_0-9]+)*", "words such as END,FAIL")
_address = _matching(r"[A-Za-z0-9_][A-Za-z0-9_.+@-]*", "an address")
_hosts = _matching(r"[A-Za-z0-9][A-Za-z0-9_.,\[\]-]*", "host names, such as node[1-4],node7")
_JOB = r"\d+(_(\d+|\*))?(\+\d+)?"
_JOBS = rf"(after|afterany|afterok|afternotok|aftercorr|afterburstbuffer):{_JOB}(:{_JOB})*|singleton"
_jobs = _matching(rf"({_JOBS})([,?]({_JOBS}))*", "a text such as 'afterok:1234'")
_WORD = r"[\w.,:()/#=+@][\w.,:()/#=+@-]*"
_words = _matching(rf"{_WORD}( {_WORD})*", "words of letters, digits and any of . , : ( ) / # = + @ -")
_image = _matching(r"[\w/][\w./:@#+-]*", "a file or the name of an image, without spaces and quotes")
_entry = _matching(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", "module:function")


@dataclass(frozen=True)
class Option:
    """One of `launcher.options`."""

    text: Text
    help: str
    flag: str = ""  # of sbatch, where it is one


OPTIONS: Mapping[str, Option] = {
    "partition": Option(_names, "where it runs; several with commas: whichever is free first", "partition"),
    "account": Option(_name, "which account pays", "account"),
    "qos": Option(_name, "quality of service", "qos"),
    "time": Option(_count_or(_limit), "limit of one start, in minutes or as '1-12:00:00'", "time"),
    "gpus_per_node": Option(_count_or(_gpus), "GPUs of each node; all of its ranks see all of them", "gpus-per-node"),
    "gres": Option(_gres, "generic resources of each node, where the site has no gpus_per_node", "gres"),
    "cpus_per_task": Option(
        _count(1), "CPU cores of each node for all of its ranks; launcher.nproc unless given", "cpus-per-task"
    ),
    "constraint": Option(_features, "features that the nodes must have", "constraint"),
    "exclusive": Option(_exclusive, "true: nodes of our own", "exclusive"),
    "mem": Option(_count_or(_memory, 0), "memory of each node; 0: all of it", "mem"),
    "mail_type": Option(_events, "when Slurm writes a mail", "mail-type"),
    "mail_user": Option(_address, "to whom", "mail-user"),
    "dependency": Option(_jobs, "which jobs come first; where they never can, the job is removed", "dependency"),
    "reservation": Option(_names, "a reservation to use", "reservation"),
    "nodelist": Option(_hosts, "nodes that must be among them", "nodelist"),
    "exclude": Option(_hosts, "nodes that must not", "exclude"),
    "comment": Option(_words, "words for the site's records", "comment"),
    "directives": Option(_each(extra_directive), "other options of sbatch: ['--licenses=fluent:2', '--switches=1']"),
    "requeue": Option(_true_or_false, "false: neither Slurm nor the job itself starts it again; true unless given"),
    "max_requeues": Option(
        _count(0), f"starts in a row without a newer checkpoint after which the job ends; {MAX_REQUEUES} unless given"
    ),
    "warn_seconds": Option(
        _count(1),
        f"how long before the time limit the run is asked to save and stop; {WARN_SECONDS} unless given. Slurm may be "
        "up to 60 s early",
    ),
    "setup": Option(path_text, "a shell file of your own, read on the first node before anything starts"),
    "python": Option(
        path_text, "the interpreter on the nodes; the one that launches unless given, and `python` in a container"
    ),
    "container_image": Option(_image, "an image for the agents: a .sif file for Apptainer, anything else for pyxis"),
    "container_mounts": Option(
        _each(_mount), "folders in the container beside the run's and the working directory: '/data' or '/here:/there'"
    ),
    "max_parallel": Option(_count(1), "how many runs of a sweep may run at a time"),
    "grace_seconds": Option(_time, AGENT_OPTIONS["grace_seconds"]),
    "entry": Option(_entry, AGENT_OPTIONS["entry"]),
    "min_nodes": Option(_count(1), TEAM_OPTIONS["min_nodes"]),
    "join_seconds": Option(_time, TEAM_OPTIONS["join_seconds"]),
    "rejoin_seconds": Option(_time, TEAM_OPTIONS["rejoin_seconds"]),
}
DIRECTIVES: Mapping[str, Option] = {name: option for name, option in OPTIONS.items() if option.flag}
HETEROGENEOUS = ("het_group", "het_job", "hetjob", "packjob")

# What a list of `directives` may hold: requests for resources. All else is ours, or would run something.
EXTRA = (
    *("acctg-freq", "begin", "contiguous", "core-spec", "cores-per-socket", "cpu-freq", "deadline", "delay-boot"),
    *("distribution", "gpu-bind", "gpu-freq", "gpus-per-socket", "gres-flags", "hint", "licenses", "mem-bind"),
    *("mem-per-cpu", "mem-per-gpu", "mincpus", "network", "nice", "oversubscribe", "power", "prefer", "priority"),
    *("profile", "reboot", "sockets-per-node", "spread-job", "switches", "thread-spec", "threads-per-core"),
    *("time-min", "tmp", "use-min-nodes", "wait-all-nodes", "wckey"),
)
_EXTRA = re.compile(r"--([a-z][a-z-]*)(=[A-Za-z0-9_:*@%+.,-]+)?")
