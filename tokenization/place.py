"""Where a data set is made: a folder, or one of a bucket that machines share instead.

Both know files by their names below --out. A file appears under its name whole or not at all, and a
unit's note only after its records. The data set's metadata come last.
"""

import contextlib
import errno
import fcntl
import io
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from magnet_jax.config import CodecSpec
from magnet_jax.data import records
from magnet_jax.data.records import Shard
from magnet_jax.errors import PassingError, UserError
from magnet_jax.io import bucket, files

Example = Mapping[str, Any]

# The last two are one number on Linux, and two on macOS.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)


def place_at(out: str | Path) -> "Place":
    """What --out names; `UserError` for a bucket that is no gs://BUCKET/FOLDER."""
    return Bucket(bucket.url_of(out)) if bucket.is_url(out) else Folder(Path(out))


class Folder:
    """A folder of a file system, which all machines at work see."""

    poll_seconds = 1.0  # how often to look for what others have done
    is_held_alone = True  # while `held` for the whole

    def __init__(self, path: Path):
        self._path = path

    def __str__(self) -> str:
        return str(self._path)

    def how_to_open(self) -> str:
        return f'open it with tfds.builder_from_directory("{self._path}")'

    def names(self) -> set[str]:
        """What lies directly in the folder."""
        return {path.name for path in self._path.iterdir()} if self._path.exists() else set()

    def sizes(self) -> dict[str, int]:
        """Bytes of every file."""
        found = {}
        for prefix, folder in (("", self._path), ("units/", self._path / "units")):
            for path in folder.iterdir() if folder.exists() else ():
                with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
                    if path.is_file():
                        found[prefix + path.name] = path.stat().st_size
        return found

    def is_complete(self) -> bool:
        return records.is_complete(self._path)

    def read(self, names: Iterable[str]) -> dict[str, bytes]:
        """The content of those files that are there."""
        found = {}
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                found[name] = (self._path / name).read_bytes()
        return found

    def create(self, name: str, text: str) -> bytes:
        """Writes a file unless it is there, and returns what is there then.

        Of several who do so at once one writes.
        """
        with (self._path / ".lock-create").open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not (self._path / name).exists():
                self.write(name, text)
            return (self._path / name).read_bytes()

    def write(self, name: str, text: str | Iterable[str]) -> None:
        files.write_text(self._path / name, text)

    def lines(self, name: str) -> Iterator[bytes] | None:
        """A file line by line; None if it is not there."""
        try:
            return (self._path / name).open("rb")
        except FileNotFoundError:
            return None

    def write_shard(self, name: str, num_codebooks: int, examples: Iterable[Example]) -> Shard:
        """As `records.write_shard`."""
        return records.write_shard(self._path / name, num_codebooks, examples)

    def finalise(
        self, shards: Mapping[str, Sequence[Shard]], spec: CodecSpec, about: Mapping[str, Any]
    ) -> None:
        """As `records.finalise`."""
        records.finalise(self._path, shards, spec, about)
        for folder in (self._path, self._path / "units"):
            records.remove_temporaries(folder)

    @contextlib.contextmanager
    def turn(self, shard: str) -> Iterator[None]:
        """Lets one of several shards after the other begin: the first scans the source for all.

        The others say that they wait. The whole (0/1) is alone, and has no turn to wait for.
        """
        if shard == "0/1":
            yield
            return
        self._path.mkdir(parents=True, exist_ok=True)
        line = f"waiting for another shard, which scans the source for all that share {self}"
        with contextlib.ExitStack() as stack:
            with self._has_locks():
                stack.enter_context(files.held(self._path / ".lock-scan", wait=line))
            yield

    @contextlib.contextmanager
    def _has_locks(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            raise UserError(
                f"--out {self}: its file system has no locks ({error.strerror}); mount it "
                "with them (Lustre: -o flock), or name a folder elsewhere"
            ) from None

    @contextlib.contextmanager
    def held(self, shard: str) -> Iterator[None]:
        """Makes the folder, and holds it for this process, however that ends.

        Shards (I/N) hold it together, and each one its own. Raises `UserError` if another has it.
        """
        (self._path / "units").mkdir(parents=True, exist_ok=True)
        whole = shard == "0/1"
        names = [".lock"] if whole else [".lock", f".lock-{shard.replace('/', '-')}"]
        with contextlib.ExitStack() as stack:
            for name in names:
                # NFS locks for reading only what is open for reading, and for writing likewise.
                file = stack.enter_context((self._path / name).open("a+"))
                kind = fcntl.LOCK_SH if name == ".lock" and not whole else fcntl.LOCK_EX
                try:
                    with self._has_locks():
                        fcntl.flock(file, kind | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise PassingError(f"--out {self}: another job is writing there") from None
            yield


@contextlib.contextmanager
def _temporary_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="magnet_jax_") as folder:
        yield Path(folder)


@contextlib.contextmanager
def _written_below(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror or error}); TMPDIR names the folder "
            "that files are written in before they are uploaded"
        ) from None


class Bucket:
    """A folder of a bucket. Every method raises `UserError` where the bucket cannot be had.

    Record files are written to a temporary folder, and uploaded when they are whole.
    """

    poll_seconds = 10.0  # each look is a request
    is_held_alone = False

    def __init__(self, url: str):
        name, folder = bucket.split(url)
        self._url = f"gs://{name}/{folder}"

    def __str__(self) -> str:
        return self._url

    def how_to_open(self) -> str:
        return f"fetch it with `gcloud storage rsync -r --exclude='^units/' {self._url} DIR`"

    def names(self) -> set[str]:
        return bucket.names(self._url)

    def sizes(self) -> dict[str, int]:
        return bucket.sizes(self._url)

    def is_complete(self) -> bool:
        return records.COMPLETE in bucket.names(self._url)

    def read(self, names: Iterable[str]) -> dict[str, bytes]:
        # Most are not there at first, and a list is cheaper than to ask for each.
        there = self.sizes()
        return bucket.read(self._url, [name for name in names if name in there])

    def create(self, name: str, text: str) -> bytes:
        return bucket.create(self._url, name, text.encode())

    def write(self, name: str, text: str | Iterable[str]) -> None:
        if isinstance(text, str):
            bucket.put(self._url, name, text.encode())
            return
        with _temporary_folder() as folder:
            with _written_below(folder):
                files.write_text(folder / name, text)
            bucket.put(self._url, name, folder / name)

    def lines(self, name: str) -> Iterator[bytes] | None:
        found = bucket.read(self._url, [name])
        return io.BytesIO(found[name]) if name in found else None

    def write_shard(self, name: str, num_codebooks: int, examples: Iterable[Example]) -> Shard:
        with _temporary_folder() as folder:
            path = folder / Path(name).name
            with _written_below(folder):
                shard = records.write_shard(path, num_codebooks, examples)
            if shard.num_examples > 0:
                bucket.put(self._url, name, path)
            return shard

    def finalise(
        self, shards: Mapping[str, Sequence[Shard]], spec: CodecSpec, about: Mapping[str, Any]
    ) -> None:
        names = [(s.path.as_posix(), name) for s, name in records.final_names(shards)]
        there = self.sizes()
        bucket.move(self._url, [pair for pair in names if pair[0] in there])
        with _temporary_folder() as folder:
            for path in records.write_metadata(folder, shards, spec, about):
                bucket.put(self._url, path.name, path)

    @contextlib.contextmanager
    def turn(self, shard: str) -> Iterator[None]:
        """Nobody waits, as there are no locks: several shards may scan the source at once."""
        del shard
        yield

    @contextlib.contextmanager
    def held(self, shard: str) -> Iterator[None]:
        """Nothing is held: there are no locks in a bucket, and none are needed.

        Of jobs that begin at once one writes job.json, and the others must be the same. What they
        write then is a function of it: two that make the same shard lose time only.
        """
        del shard
        yield


Place = Folder | Bucket
