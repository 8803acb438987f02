"""The process in which reward functions run: reads calls from a socket, one line each, and answers with a line."""

from __future__ import annotations

import contextlib
import json
import numbers
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import type_name
from ..registry import resolve

_MOST_LETTERS = 500  # of an exception's message


def main() -> None:
    """`python -m unitrain.rl.reward_worker TASK`: import the functions that TASK names, and serve."""
    task = json.loads(sys.argv[1])
    with socket.socket(fileno=task["socket"]) as connection:
        serve(connection, [resolve(path) for path in task["functions"]], task["parent"])


def serve(connection: socket.socket, functions: Sequence[Callable[..., Any]], parent: int) -> None:
    """Answer calls [number of the function, keywords] until the process `parent` is gone."""
    threading.Thread(target=_end_with, args=[parent], daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's is for the run, which then ends this process
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a fork has its parent's handler
    with contextlib.suppress(BrokenPipeError, ConnectionResetError), connection.makefile("rb") as calls:
        _say(connection, {"ready": os.getpid()})
        for line in calls:
            number, keywords = json.loads(line)
            _say(connection, _answer(functions[number], keywords))


def _end_with(parent: int) -> None:
    """End this process soon after its parent, whose time limits then hold no more.

    A closed connection does not tell: a later fork of the parent may hold the other end.
    """
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(0)


def _answer(function: Callable[..., Any], keywords: dict[str, Any]) -> dict[str, Any]:
    try:
        value = function(**keywords)
    except Exception as error:
        place = _place_of(error)
        return {"failure": f"raised {type_name(type(error))}: {str(error)[:_MOST_LETTERS]}{place}"}
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        value = value.item()  # a scalar of numpy or of a framework
    if not isinstance(value, numbers.Real):
        return {"failure": f"returned {_described(value)}, not a number,"}
    return {"value": float(value)}


def _place_of(error: BaseException) -> str:
    """The file and line that raised, in the user's code and not in this file."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or trace.tb_frame.f_code.co_filename == __file__:
        return ""
    return f" ({trace.tb_frame.f_code.co_filename}:{trace.tb_lineno})"


def _described(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}" if value is not None else "None"


def _say(connection: socket.socket, answer: dict[str, Any]) -> None:
    connection.sendall(json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    main()
