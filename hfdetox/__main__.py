"""The command, also as the module that torchrun and accelerate start: Ctrl-C counts before the libraries are there."""

import os
import signal
import sys
import threading
from types import FrameType

_INTERRUPTED = 130
_SECONDS = 0.05  # between two looks whether an import is done
_waiting = threading.Event()
_looking = threading.Event()


def main() -> None:
    """Run the command line of this process and exit with its status."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    try:
        from hfdetox.cli.app import main as run

        run()
    except KeyboardInterrupt:
        _say()
        sys.exit(_INTERRUPTED)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt, in the middle of an import as soon as it is done; the second Ctrl-C there ends at once.

    An exception inside an import is lost, becomes another one, or ends the process in a library's C++.
    """
    if not _importing(frame):
        _waiting.clear()
        # an object that is only half made may fail once more when it is thrown away
        sys.unraisablehook = lambda _: None
        raise KeyboardInterrupt
    if _waiting.is_set() and not _looking.is_set():
        _say()
        os._exit(_INTERRUPTED)
    _waiting.set()
    _looking.clear()
    timer = threading.Timer(_SECONDS, _look)
    timer.daemon = True
    timer.start()


def _look() -> None:
    _looking.set()
    signal.raise_signal(signal.SIGINT)


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _say() -> None:
    sys.stderr.write("hfdetox: interrupted; nothing was written\n")


if __name__ == "__main__":
    main()
