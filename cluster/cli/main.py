"""The ``safeft`` command: one-line errors, exit codes with a meaning, a traceback on request.

Exit codes: 0 success, 1 failure, 2 wrong input, 3 dataset rejected, 4 safety gate failed,
5 dataset waits for a person's review, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings

import typer

from cluster.cli import (
    admin,
    align,
    chat,
    control,
    demo,
    doctor,
    evaluate,
    finetune,
    jobs,
    models,
    profile,
    published,
    restore,
    review,
    screen,
    up,
)
from cluster.cli.console import err, printable
from safeft import __version__
from safeft.cache import is_disk_full
from safeft.errors import SafeftError

INTERRUPTED = 130

app = typer.Typer(
    name="safeft",
    help="Safe fine-tuning for many tenants: screen the data, constrain the training, measure "
    "refusals before anything is published.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command()(demo.demo)
app.command()(doctor.doctor)
app.command()(align.align)
app.add_typer(profile.app, name="profile")
app.command()(screen.screen)
app.command()(review.review)
app.command()(finetune.finetune)
app.command()(restore.restore)
app.command()(evaluate.evaluate)
app.command()(chat.chat)
app.command()(up.up)
app.add_typer(jobs.group, name="jobs")
for command in (jobs.submit, jobs.logs, jobs.cancel, jobs.pause, jobs.resume):
    app.command()(command)
app.command()(jobs.report)
models.app.command()(published.verify)
app.add_typer(models.app, name="models")
app.add_typer(admin.tenants, name="tenants")
app.add_typer(admin.keys, name="keys")
app.add_typer(admin.policy, name="policy")
app.add_typer(admin.audit, name="audit")
app.command()(control.api)
app.command()(control.controller)
app.add_typer(control.database, name="database")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Show the version and exit."
    ),
) -> None:
    if debug:
        os.environ["SAFEFT_DEBUG"] = "1"


def quiet_libraries() -> None:
    """Nothing but results may reach stdout, and no library draws its progress over ours.

    Libraries read these when they are imported, so this comes first. What the user set stays.
    """
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    if not os.path.exists("/dev/nvidiactl"):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", module=r"(torch|transformers|peft|deepspeed|ray)\b")


def main() -> None:
    """Entry point of the installed command."""
    quiet_libraries()
    try:
        # Not standalone: typer then returns the code of Exit (and 130 for Ctrl-C) and raises the
        # rest, so that every error is told in our own way.
        code = app(standalone_mode=False) or 0
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except SafeftError as error:
        code = _report(error, str(error), error.exit_code)
    except Exception as error:  # noqa: BLE001  (told in one line; the traceback with --debug)
        code = _unexpected(error)
    if code == INTERRUPTED:
        err.print("interrupted; run the same command again to continue", style="yellow")
    sys.exit(code)


def _unexpected(error: Exception) -> int:
    """Usage errors tell themselves; a full disk is named; the rest is one line and a way out."""
    if hasattr(error, "show") and hasattr(error, "format_message"):
        error.show()
        return 2
    if is_disk_full(error):
        return _report(error, "no space left on the disk; free some and run it again", 1)
    text = " ".join(str(error).split())[:300]
    hint = "`safeft --debug COMMAND` shows the traceback"
    return _report(error, f"{type(error).__name__}: {text} ({hint})", 1)


def _report(error: BaseException, message: str, code: int) -> int:
    if os.environ.get("SAFEFT_DEBUG"):
        traceback.print_exception(error)
    err.print("error:", style="bold red", end=" ")
    err.print(printable(message), markup=False, soft_wrap=True)
    return code


if __name__ == "__main__":
    main()
