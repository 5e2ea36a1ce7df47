"""Errors that are the user's to mend, and how they are shown; how a job is stopped."""

import errno
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class UserError(Exception):
    """One line that says what is wrong, where, and how to mend it."""

    def __init__(self, message: str):
        # What the user gave stands in it, and may hold line breaks, or what no terminal can show.
        line = re.sub(r"\s*[\r\n]+\s*", " ", message)
        super().__init__(line.encode(errors="backslashreplace").decode())


class PassingError(UserError):
    """A `UserError` that the same command may well not meet again: the network, memory, a lock.

    Its exit status is 75 (EX_TEMPFAIL), which what starts commands by itself may tell from 2.
    """


def first_line(error: BaseException) -> str:
    """What a library's error says, for a line of ours; its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


@contextmanager
def reported() -> Iterator[None]:
    """Turns a `UserError`, or a file that cannot be had, into one line on stderr and exit status 2.

    (75 for a `PassingError`.)

    Bugs keep their traceback.
    """
    try:
        yield
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        raise SystemExit(os.EX_TEMPFAIL if isinstance(error, PassingError) else 2) from None
    except BrokenPipeError:
        # Whoever read the output, a pager or `head`, has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if error.filename is None and not full:  # not about a file that someone named
            raise
        where = "" if error.filename is None else f"{error.filename}: "
        print(f"error: {where}{error.strerror}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


_silenced: dict[str, list[int]] = {}  # of each logger, the levels to go back to
_silencing = threading.Lock()


@contextmanager
def silenced(*names: str) -> Iterator[None]:
    """Keeps libraries' loggers from showing what is raised as well, until the end."""
    with _silencing:
        for name in names:
            logger = logging.getLogger(name)
            _silenced.setdefault(name, []).append(logger.level)
            logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        with _silencing:
            for name in names:  # (several threads may do so at once, and the last one restores)
                levels = _silenced[name]
                if len(levels) > 1:
                    levels.pop()
                else:
                    logging.getLogger(name).setLevel(levels.pop())


def stop_when_terminated() -> None:
    """Makes SIGTERM end this process in good order, as Ctrl-C does, with a line that it goes on."""

    def stop(*_: Any) -> None:
        print("\nstopped; the same command goes on from here", file=sys.stderr, flush=True)
        raise SystemExit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, stop)


def end_with_parent(parent: int) -> None:
    """Ends this worker with the process `parent`, however that ends: its folder is another's then.

    To be called first thing in the worker; returns at once.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
