"""What a torchrun command line asks for, as a recipe that starts the same number of ranks."""

from __future__ import annotations

import re
import shlex

from ..errors import RecipeError
from .foreign import Imported, whole

STARTS = ("torchrun", "torch.distributed.run", "torch.distributed.launch")
FLAGS = {  # torchrun's options, by the spelling that launcher.options takes; True: stands without a value
    **dict.fromkeys(("standalone", "module", "no_python", "run_path"), True),
    **dict.fromkeys(("nnodes", "nproc_per_node", "node_rank", "master_addr", "master_port", "local_addr"), False),
    **dict.fromkeys(("rdzv_backend", "rdzv_endpoint", "rdzv_id", "rdzv_conf", "role", "log_dir"), False),
    **dict.fromkeys(("max_restarts", "monitor_interval", "start_method", "redirects", "tee"), False),
    **dict.fromkeys(("local_ranks_filter", "logs_specs", "event_log_handler", "numa_binding"), False),
}
SHORT = {"-m": "module", "-r": "redirects", "-t": "tee"}
KEPT = (  # launcher.options of the same name; the rest is said by the launcher itself, or by a node
    *("rdzv_backend", "rdzv_endpoint", "rdzv_id", "rdzv_conf", "master_addr", "master_port", "local_addr"),
    *("max_restarts", "monitor_interval", "start_method", "numa_binding"),
)
SAID_BY_THE_LAUNCHER = ("standalone", "node_rank", "log_dir", "redirects", "tee", "role")


def import_torchrun(command: str) -> Imported:
    """The recipe for a command as typed in a shell; nothing in it is run or expanded. Raises RecipeError."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise RecipeError(f"the torchrun command cannot be split into words: {error}") from error
    out = Imported()
    words = _after_the_start(words, out)
    options, script = _options(words)
    out.put("launcher.name", "torchrun")
    _put_nodes(out, str(options.pop("nnodes", "1")))
    _put_ranks(out, str(options.pop("nproc_per_node", "1")))
    kept = {key: options.pop(key) for key in KEPT if key in options}
    if kept:
        out.put(
            "launcher.options",
            {key: count if (count := whole(text)) is not None else text for key, text in kept.items()},
        )
    if left := [key for key in SAID_BY_THE_LAUNCHER if options.pop(key, None) is not None]:
        out.notes.append(f"left out, for the launcher says it itself: {', '.join(left)}")
    if options.pop("module", None):
        script = ["-m", *script]
    if script:
        out.unknown["script"] = shlex.join(script)
        out.notes.append("the script becomes a Trainer: name it with --trainer, its settings are keys of the recipe")
    out.leave(options)
    return out


def _after_the_start(words: list[str], out: Imported) -> list[str]:
    """What follows `torchrun`; settings of variables before it are listed."""
    while words and re.fullmatch(r"[A-Za-z_]\w*=.*", words[0], re.DOTALL):
        name, _, value = words.pop(0).partition("=")
        out.unknown[f"environment.{name}"] = value
    for number, word in enumerate(words[:4]):
        if word.rpartition("/")[2] in STARTS:
            return words[number + 1 :]
    found = words[0] if words else "nothing"
    raise RecipeError(f"the command starts with {found!r}; it must be torchrun, or python -m torch.distributed.run")


def _options(words: list[str]) -> tuple[dict[str, str | bool], list[str]]:
    """torchrun's own options, and what they are followed by: the script and its arguments."""
    options: dict[str, str | bool] = {}
    rest = list(words)
    while rest and rest[0].startswith("-"):
        word, equals, value = rest.pop(0).partition("=")
        name = SHORT.get(word, word.removeprefix("--").replace("-", "_"))
        if name not in FLAGS:
            raise RecipeError(f"torchrun has no option {word!r} that is known here; take it out of the command")
        if FLAGS[name]:
            options[name] = True
            continue
        if not equals:
            if not rest:
                raise RecipeError(f"the option {word} of the torchrun command has no value")
            value = rest.pop(0)
        options[name] = value
    return options, rest


def _put_nodes(out: Imported, text: str) -> None:
    """`2`, or a range `1:4` of an elastic job."""
    least, _, most = text.partition(":")
    nodes = whole(most or least)
    if nodes is None or whole(least) is None or nodes < 1:
        out.leave({"nnodes": text})
        return
    out.put("launcher.nodes", nodes)
    if most:
        out.notes.append(f"nnodes {text} is a range; the recipe starts {nodes}, and any number can resume the run")


def _put_ranks(out: Imported, text: str) -> None:
    ranks = whole(text)
    if ranks is None or ranks < 1:
        out.leave({"nproc_per_node": text})
        out.notes.append(f"nproc_per_node {text} counts the devices of a machine; set launcher.nproc to their number")
    else:
        out.put("launcher.nproc", ranks)
