"""What every verb says beside its output, and how it ends when it is told to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner

from transplant_ray.errors import Terminated

INTERRUPTED = 130
"""What shells make of SIGINT."""
complaints = Console(stderr=True, emoji=False)


def tell(text: str) -> None:
    """Beside the output, which scripts may read."""
    complaints.print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def loading() -> Iterator[None]:
    """Around imports that take ten seconds: who looks at a terminal sees that something happens."""
    spinner = Spinner("dots", "loading libraries")
    # Nothing redirected, as a status would do: loggers that are made now keep the stream that they find.
    with Live(spinner, console=complaints, transient=True, redirect_stdout=False, redirect_stderr=False):
        yield


@contextmanager
def resumable(what_next: str) -> Iterator[None]:
    """Ctrl-C and SIGTERM end in a line, and in the exit code that a shell gives them."""
    try:
        yield
    except KeyboardInterrupt as stop:
        terminated = isinstance(stop, Terminated)
        tell(f"stopped by {'SIGTERM' if terminated else 'Ctrl-C'}; {what_next}")
        raise typer.Exit(Terminated.EXIT if terminated else INTERRUPTED) from None
