"""The terminal: answers on stdout, everything else on stderr, failures as one line and an exit code."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape

from vitcli.errors import StorageError, UserError

out, err = Console(), Console(stderr=True)
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES)
UsageError = typer.BadParameter.__mro__[2]  # of all mistakes of usage; typer 0.29 has a copy of click's of its own


def nowhere() -> Console:
    """A console that nobody sees, for processes that stand behind the first."""
    return Console(file=open(os.devnull, "w"))


def answer(
    json: bool, as_json: Callable[[], str], as_table: Callable[[], Any], as_lines: Callable[[], Iterable[str]]
) -> None:
    """The answer in the form that fits: JSON if asked, a table on a terminal, plain lines elsewhere."""
    if json:
        print(as_json())
    elif out.is_terminal:
        out.print(as_table())
    else:
        for line in as_lines():
            print(line)


def tell(text: str) -> None:
    """A line on stderr, as it is."""
    err.print(text, highlight=False, markup=False, soft_wrap=True)


def print_error(message: str) -> None:
    """An error line on stderr."""
    err.print(f"[bold red]error:[/] {escape(_printable(message))}", highlight=False, soft_wrap=True)


def _printable(text: str) -> str:
    """Line by line, what would colour or move the terminal as escapes: a message may quote a file of anyone's."""
    from vitcli.report.tables import printable

    return "\n".join(map(printable, text.split("\n")))


def open_standard_streams() -> None:
    """Where stdin, stdout or stderr is closed, what is opened next would take its place, and be written to."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)


def run(app: typer.Typer) -> None:
    """Run a command, and turn every expected failure into one error line and an exit code."""
    if os.environ.get("VIT_DEBUG"):
        app()
        return
    code = 1
    try:
        code = app(standalone_mode=False) or 0
    except UserError as error:
        print_error(str(error))
        if error.hint:
            tell(f"hint: {_printable(error.hint)}")
        code = error.exit_code
    except typer.Exit as ended:
        code = ended.exit_code
    except UsageError as error:  # pyright: ignore[reportGeneralTypeIssues]
        if message := error.format_message():  # not where the help itself was the answer
            print_error(message)
            tell("hint: vit COMMAND --help shows what it takes")
        code = error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except (BrokenPipeError, SystemExit) as ended:
        if not any(isinstance(error, BrokenPipeError) for error in (ended, ended.__context__)):
            raise  # typer makes an exit with 1 of a broken pipe
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Exception as error:
        code = _unexpected(error)
    sys.exit(code)


def _unexpected(error: Exception) -> int:
    """Say what nothing has foreseen, and its exit code: a disk that refuses, or else a bug."""
    if isinstance(error, OSError) and error.errno in DISK:
        print_error(f"{error.filename or 'the disk'}: {error.strerror}")
        tell("hint: free space, or choose a folder that you may write")
        return StorageError.exit_code
    print_error(f"a bug: {type(error).__name__}: {error}")
    tell("hint: VIT_DEBUG=1 shows where; please report it")
    return 1
