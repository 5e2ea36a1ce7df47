"""Decoding in a process of its own: a file that crashes or hangs its library is a reject.

`open_audio` gives a track block by block. Each reader has one `Decoder`, a process that lives until
a file kills it, or is killed for it. The file gets a second try with a new one: the machine may
have been to blame. What it is given is a track's place alone, and none of its captions.

python -m tokenization.intake.decoder FD is that process; it talks over the connection FD.
"""

import contextlib
import dataclasses
import itertools
import os
import queue
import resource
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from magnet_jax.errors import PassingError, UserError
from tokenization.intake import audio, mix
from tokenization.intake.audio import Facts, Intake, RejectedError
from tokenization.track import HeldBytes, Mix, Part, RowBytes

PROGRAM = ("-m", "tokenization.intake.decoder")

_MEMORY = 8 * 2**30  # bytes of a decoder; a row within Parquet takes two pages, 2 GiB at most each
_START_SECONDS = 300.0  # for Python and its imports, on a machine that is busy with other things


class Stream:
    """A track being read: iterate once, over blocks [C, n] (float32); then `facts` are known.

    Iterating raises `RejectedError` as soon as the track is known not to be fit, which may be
    after blocks of it, and `UserError` if the file is gone or its file system out of reach.
    """

    def __init__(self, answers: Iterator[Any]):
        self.facts: Facts | None = None
        self._answers = answers

    def __iter__(self) -> Iterator[np.ndarray]:
        for answer in self._answers:
            if isinstance(answer, Facts):
                self.facts = answer
            elif answer is not None:
                yield answer.T


class _LostError(Exception):
    """The process hung or ended; holds what that says of the track if it is so again."""

    def __init__(self, verdict: RejectedError | UserError):
        super().__init__(verdict)
        self.verdict = verdict


class Decoder:
    """A process that decodes one track at a time; started when it is needed.

    timeout: seconds without progress after which it is killed.
    program: what Python is given to start it; None is this module.
    hidden: variables of the environment that it is not given.
    """

    def __init__(
        self, timeout: float, program: tuple[str, ...] | None = None, hidden: tuple[str, ...] = ()
    ):
        self._timeout, self._program, self._hidden = timeout, program, hidden
        self._killed = False
        self._busy = False  # with a track, as far as this process has read its answers
        self._process: subprocess.Popen | None = None
        self._connection: Connection | None = None

    def __enter__(self) -> "Decoder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process; the decoder may be used again."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process.stdin.close()
            self._connection.close()
            self._process = self._connection = None
        self._busy = False

    def kill(self) -> None:
        """Ends what another thread waits for; no track is decoded after that."""
        self._killed = True
        process = self._process
        if process is not None:
            process.kill()

    def ask(self, kind: str, *arguments: Any) -> Iterator[Any]:
        """What the process answers: `answers` says what there is to ask."""
        given = 0
        for last in (False, True):
            try:
                with contextlib.closing(self._ask_once(kind, *arguments)) as answers:
                    for answer in itertools.islice(answers, given, None):
                        given += 1
                        yield answer
                return
            except _LostError as error:
                if last or self._killed:
                    raise error.verdict from None

    def _ask_once(self, kind: str, *arguments: Any) -> Iterator[Any]:
        if self._process is not None and (self._busy or self._process.poll() is not None):
            self.close()  # a track was left in the middle, or something ended it between two
        if self._process is None:
            self._start()
        if self._killed:  # while it started
            self.close()
            raise _LostError(UserError("the process that decodes audio was ended"))
        process, finished, self._busy = self._process, False, True
        try:
            with contextlib.suppress(BrokenPipeError):  # the answer will be that it has ended
                self._connection.send((kind, *arguments))
            while True:
                what, value = self._answer()
                finished = what != "more"
                yield told(what, value)
                if finished:
                    return
        finally:
            # Whoever stopped reading before the end leaves blocks behind. (Python may tell of it
            # late, when another process reads another track.)
            if self._process is process:
                self._busy = False
                if not finished:
                    self.close()

    def _answer(self) -> tuple[str, Any]:
        try:
            if self._connection.poll(self._timeout):
                return self._connection.recv()
        except (EOFError, OSError):
            status = self._process.wait()
            if status == -signal.SIGKILL:  # nothing that a file could do
                raise _LostError(
                    PassingError(
                        "the process that decodes audio was killed, twice: out of memory? Fewer "
                        "at once take less; the same command goes on from here"
                    )
                ) from None
            how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
            raise _LostError(RejectedError("decoder crashed", how)) from None
        detail = f"no progress within {self._timeout:g} s"
        raise _LostError(RejectedError("decoder hung", detail))

    def _start(self) -> None:
        ours, theirs = Pipe()
        # As multiprocessing does, so that it finds what this process found.
        path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
        told = {name: value for name, value in os.environ.items() if name not in self._hidden}
        try:
            self._process = subprocess.Popen(
                [sys.executable, *(self._program or PROGRAM), str(theirs.fileno())],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                # Numpy's threads would have nothing to do.
                env=told | {"PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"},
                start_new_session=True,  # Ctrl-C is for the parent to see
            )
        except OSError as error:  # too many processes, no memory
            ours.close()
            raise PassingError(
                f"the process that decodes audio cannot be started ({error.strerror})"
            ) from None
        finally:
            theirs.close()
        self._connection = ours
        try:
            ready = ours.poll(_START_SECONDS) and ours.recv()
        except (EOFError, OSError):
            ready = False
        if not ready:
            self.close()
            raise UserError("the process that decodes audio did not start; its message is above")


def told(what: str, value: Any) -> Any:
    """The value of an answer, see `answers`; raises what it says went wrong."""
    if what == "rejected":
        raise RejectedError(*value)
    if what == "gone":
        raise UserError(f"{value}: vanished while the job ran; run the job again")
    if what == "out":
        raise PassingError(f"{value}; mend that, the same command goes on from here")
    return value


def open_audio(part: Part | Mix, intake: Intake, decoder: Decoder) -> Stream:
    """A track in blocks, mixed and resampled; a few of them are in memory, however long it is."""
    return Stream(decoder.ask("decode", part, intake))


def measure(part: Part, intake: Intake, decoder: Decoder) -> Facts:
    """The facts of a track that is decoded for them alone; raises as `Stream` does."""
    *_, facts = decoder.ask("measure", part, intake)
    return facts


def read_header(part: Part, intake: Intake, decoder: Decoder) -> Facts:
    """The facts that a header tells; raises as `Stream` does."""
    *_, facts = decoder.ask("read_header", part, intake)
    return facts


class Unpacker:
    """Takes audio out of Parquet files, in one process for all decoders.

    To come to a row, all before it in its row group have to be unpacked: decoders that took turns
    would each unpack all of them. Tracks are to be given in the order of their rows.
    """

    def __init__(self, timeout: float):
        self._decoder = Decoder(timeout)
        self._thread = ThreadPoolExecutor(1, "unpacker")

    def submit(self, part: Part | Mix) -> Future:
        """The part with its bytes; as it was if it lies elsewhere, or they cannot be had.

        Whoever decodes it then finds out why.
        """
        return self._thread.submit(self._unpacked, part)

    def _unpacked(self, part: Part | Mix) -> Part | Mix:
        place = None if isinstance(part, Mix) else part.place
        if not isinstance(place, RowBytes) or place.kind != "parquet":
            return part
        try:
            (data,) = self._decoder.ask("read_bytes", part)
        except RejectedError:
            return part
        return dataclasses.replace(part, place=HeldBytes(path=place.path, data=data))

    def close(self) -> None:
        """Ends the process, and what it was given to do."""
        self._decoder.kill()
        self._thread.shutdown(cancel_futures=True)
        self._decoder.close()


@contextlib.contextmanager
def readers(count: int, timeout: float) -> Iterator[Callable[..., Future]]:
    """Threads with a decoder each: submit(function, *arguments) calls it with one more, the last.

    What has not begun when this ends is dropped.
    """
    decoders = [Decoder(timeout) for _ in range(count)]
    idle: queue.SimpleQueue[Decoder] = queue.SimpleQueue()
    for decoder in decoders:
        idle.put(decoder)

    def call(function: Callable, *arguments: Any) -> Any:
        decoder = idle.get()
        try:
            return function(*arguments, decoder)
        finally:
            idle.put(decoder)

    pool = ThreadPoolExecutor(count)
    try:
        yield lambda function, *arguments: pool.submit(call, function, *arguments)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for decoder in decoders:
            decoder.kill()  # its reader need not come to the end of a long track
        pool.shutdown()
        for decoder in decoders:
            decoder.close()


# --- the process itself -------------------------------------------------------------------------


def decode(part: Part | Mix, intake: Intake) -> Iterator[np.ndarray | None]:
    """As `audio.decode` and `mix.decode`."""
    return mix.decode(part, intake) if isinstance(part, Mix) else audio.decode(part, intake)


def answers(
    kind: str, part: Part | Mix, *arguments: Any, decode: Callable = decode
) -> Iterator[tuple[str, Any]]:
    """What is answered to a question.

    ("decode", part, intake) -> ("more", block, or None where it takes long) ..., ("done", facts)
    ("measure", part, intake) -> ("more", None) ..., ("done", facts)
    ("read_header", part, intake) -> ("done", facts)
    ("read_bytes", part) -> ("done", the bytes of its file)
    or in the end ("rejected", (reason, detail)), ("gone", path) or ("out", what is out of reach).
    """
    try:
        if kind == "read_header":
            yield "done", audio.read_header(part, *arguments)
        elif kind == "read_bytes":
            with audio.open_bytes(part.place) as file:
                yield "done", file.read()
        else:
            blocks = decode(part, *arguments)
            while True:
                try:
                    block = next(blocks)
                except StopIteration as end:
                    yield "done", end.value
                    return
                yield "more", block if kind == "decode" else None
    except RejectedError as error:
        yield "rejected", (error.reason, error.detail)
    except FileNotFoundError as error:
        yield "gone", error.filename or part.paths[0]
    except MemoryError:
        yield "rejected", ("unreadable", "asks for more memory than there is")
    except Exception as error:
        if isinstance(error, OSError) and audio.is_outage(error):
            yield "out", f"{error.filename or part.paths[0]}: {error.strerror}"
            return
        # Its last line alone, and without the path, which differs between machines.
        what = traceback.format_exc().strip().splitlines()[-1]
        for path in part.paths:
            what = what.replace(path, os.path.basename(path))
        yield "rejected", ("decoder failed", what)


def serve(connection: Connection, decode: Callable = decode) -> None:
    """Answers questions until the connection ends."""
    connection.send("ready")
    while True:
        try:
            question = connection.recv()
        except EOFError:
            return
        for answer in answers(*question, decode=decode):
            connection.send(answer)


def _end_with_parent() -> None:
    sys.stdin.buffer.read()  # until the parent is gone, however it went
    os._exit(1)


def main(decode: Callable = decode) -> None:
    """Serves the connection whose file descriptor is the last argument."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash is noted well enough
    # A damaged header that asks for all memory there is takes down one file, not the machine.
    # Maps of files do not count.
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    if most == resource.RLIM_INFINITY or most > _MEMORY:
        with contextlib.suppress(ValueError, OSError):  # macOS may refuse it
            resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY, most))
    # What the libraries have to say about a file's damage goes nowhere.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    serve(Connection(int(sys.argv[-1])), decode)


if __name__ == "__main__":
    main()
