"""SIGTERM ends a verb as Ctrl-C does: what is known is kept, Ray and MLflow are told, and the process is gone soon."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transplant_ray.errors import Terminated

GRACE_SECONDS = 20
"""After which the process ends whatever it waits for: Kubernetes kills after 30, and so does `transplant-ray stop`."""


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM raises Terminated out of the block.

    It is entered a second time once Ray is there: `ray.init` takes the signal for a handler of its own that ends the process with
    exit code 15, and puts one in C++ before it that aborts 3 seconds later, in the midst of tidying up.
    """
    if threading.current_thread() is not threading.main_thread():  # where no signals arrive
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    came = False

    def end(*_: Any) -> None:
        nonlocal came
        came = True
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # whoever says it twice means the same
        hurry()
        raise KeyboardInterrupt  # Ray, while it waits, lets out nothing else

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as error:
        if came or (isinstance(error, SystemExit) and error.code == signal.SIGTERM):  # the latter is Ray's, in `ray.init`
            signal.alarm(0)
            raise Terminated from None
        raise
    finally:
        if not came:
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def hurry() -> None:
    """Something may wait for a server that is gone too; the ledger is written long before."""
    timer = threading.Timer(GRACE_SECONDS, os._exit, [Terminated.EXIT])
    timer.daemon = True
    timer.start()
