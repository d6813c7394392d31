"""Standard output of a command: lines and tables, one JSON document, or nothing."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console

from hfdetox import config
from hfdetox.cli.console import plan_lines
from hfdetox.errors import one_line
from hfdetox.logging import is_main_process


def say(*lines: Any) -> None:
    """Print text and rich tables on standard output, from the main process only."""
    if is_main_process():
        console = Console(file=sys.stdout, highlight=False, emoji=False)
        for line in lines:
            if isinstance(line, str):
                line = " " * (len(line) - len(line.lstrip(" "))) + one_line(line, None)
            console.print(line, markup=False, soft_wrap=isinstance(line, str))


class Output:
    """Standard output of a command: a JSON document, or lines and tables, or nothing."""

    def __init__(self, options: config.ConsoleOptions, stream: Any) -> None:
        self.options, self.stream = options, stream

    def show(self, document: dict[str, Any], lines: Sequence[Any]) -> None:
        """Write the document with `--json`, else the lines (text or rich tables) unless `--quiet`."""
        if not is_main_process():
            return
        if self.options.as_json:
            self.stream.write(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False, default=str) + "\n")
        elif not self.options.quiet:
            say(*lines)


def plans(shown: config.PlanConsole, out: Output, make: Callable[..., dict[str, Any]], options: Any) -> bool:
    """Show what `make` plans with the options, if that is all that was asked for; return whether it was."""
    if shown.dry_run:
        planned = make(**options.changed())
        out.show(planned, plan_lines(planned))
    return shown.dry_run


@contextlib.contextmanager
def standard_output(options: config.ConsoleOptions) -> Iterator[Output]:
    """With `--json`, send what a library prints to standard error: only the document goes to standard output."""
    with contextlib.ExitStack() as stack:
        stream = sys.stdout
        if options.as_json:
            if stream is sys.__stdout__:
                # Gloo and NCCL write to the descriptor itself
                stream = stack.enter_context(os.fdopen(os.dup(1), "w", encoding="utf-8"))
                os.dup2(2, 1)
                stack.callback(lambda: os.dup2(stream.fileno(), 1))
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        yield Output(options, stream)
