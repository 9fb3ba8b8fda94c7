"""How commands end: exit codes, and failures as one sentence."""

from __future__ import annotations

import logging
import shlex
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from attar.errors import AttarError
from attar.store import cache_folder

BUDGET_NOT_MET = 3
INTERRUPTED = 130
"""What shells report of a program that Ctrl-C ended."""


class Commands(TyperGroup):
    """Runs a command; whatever it raises becomes a sentence on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        if not ctx.params.get("debug"):
            _quiet_libraries()
        try:
            return super().invoke(ctx)
        except AttarError as error:
            if ctx.params.get("debug"):
                traceback.print_exc()
            say_error(str(error))
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            say_error(f"stopped{_how_to_go_on(sys.argv)}")
            raise typer.Exit(INTERRUPTED) from None
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise  # meant as they are
        except Exception as error:
            if _is_usage(error):
                raise
            raise _unexpected(error, ctx) from None


def _quiet_libraries() -> None:
    """Keeps what libraries tell their own developers off the screen."""
    warnings.simplefilter("ignore")
    for name in ("torch.utils._pytree", "torch.onnx", "torch.export"):  # torch resets "torch"
        logging.getLogger(name).setLevel(logging.ERROR)


def say_error(text: str) -> None:
    """`error: …` on stderr, in red where that is a terminal."""
    head, _, rest = f"error: {text}".partition("\n")
    typer.secho(head, fg="red", err=True)
    if rest:
        typer.echo(rest, err=True)


def _unexpected(error: Exception, ctx: Any) -> typer.Exit:
    """Says that this is a fault of Attar's, and where its traceback is."""
    if ctx.params.get("debug"):
        traceback.print_exception(error)
    first = (str(error).strip().splitlines() or ["no message"])[0]
    say_error(f"{type(error).__name__}: {first} (this is unexpected: {_keep_traceback(error)})")
    return typer.Exit(1)


def _keep_traceback(error: Exception) -> str:
    text = "".join(traceback.format_exception(error))
    path = cache_folder() / f"failure-{time.strftime('%Y%m%d-%H%M%S')}.txt"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{shlex.join(sys.argv)}\n\n{text}", encoding="utf-8")
    except OSError:
        return "--debug shows the traceback"
    return f"the traceback is in {path}"


def _is_usage(error: Exception) -> bool:
    """Whether it is the command line parser's own, which prints itself and exits with 2."""
    return hasattr(error, "exit_code") and hasattr(error, "format_message")


def _how_to_go_on(argv: list[str]) -> str:
    if {"compare", "sensitivity"} & set(argv):
        return "; the same command goes on"
    if "run" not in argv:
        return ""
    rest = [a for a in argv[1:] if a not in {"--resume", "--overwrite"}]
    return f"; go on with: {shlex.join([Path(argv[0]).name, *rest, '--resume'])}"
