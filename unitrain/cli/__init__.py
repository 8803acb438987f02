"""The command `unitrain`: what can be said, and how an error ends it.

Nothing heavy is imported before a command runs: `--help` and completion answer at once.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from ..errors import UnitrainError
from . import auditing, chaos, doctor, exporting, importing, launch, listing, runs, verifying

app = typer.Typer(
    name="unitrain",
    help="One Trainer, any training backend, any cluster, nothing lost.",
    epilog="Exit codes: 0 done, 2 wrong usage, 70 failed, 75 stopped and saved, 78 bad recipe, 93 crash loop, "
    "130 interrupted; 1: doctor found what would make a run fail.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
app.command("launch")(launch.launch)
app.command("resume")(launch.resume)
app.command("list")(listing.list_names)
app.command("status")(runs.status)
app.command("logs")(runs.logs)
app.command("cancel")(runs.cancel)
app.command("doctor")(doctor.doctor)
app.command("export")(exporting.export)
app.command("import")(importing.import_)
app.command("verify")(verifying.verify)
app.command("chaos")(chaos.chaos)
app.command("audit")(auditing.audit)
app.command("repro")(auditing.repro)


def main() -> None:
    """Run the command line; an expected failure is one message, without a traceback."""
    try:
        app()
    except UnitrainError as error:
        sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(int(error.exit_code)) from None


def _print_version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        print(f"unitrain {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """One Trainer, any training backend, any cluster, nothing lost."""
