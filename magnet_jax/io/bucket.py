"""Runs and data sets in a bucket, --out gs://BUCKET/FOLDER: for hosts that share no file system.

Orbax reads and writes checkpoints in the bucket itself, every process its share, with clients of
its own. All else goes through Google's client here, file by file: a file of a bucket is there whole
or not at all. The small files of a run lie in a temporary folder (`Mirror`), from where they are
brought to the bucket.

epath has no conditional writes, which the lock and `create` need, so it is not used here.
"""

import contextlib
import functools
import os
import re
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from magnet_jax.errors import PassingError, UserError, silenced

TIMEOUT = "MAGNET_JAX_BUCKET_TIMEOUT"  # seconds that a bucket may be out of reach
SECONDS = 300
SECONDS_AT_START = 30
REQUEST_SECONDS = (10, 60)  # to connect, and between two packets
REQUESTS = 8  # at once


# --- names ----------------------------------------------------------------------------------------


def is_url(path: str | os.PathLike) -> bool:
    """Whether a path is one of a bucket; also where `Path` has taken one of its slashes."""
    return bool(re.match(r"[a-z][a-z0-9]+:/", os.fspath(path)))


def url_of(path: str | os.PathLike) -> str:
    """The URL that a path was, before `Path` took one of its slashes."""
    return re.sub("^([a-z0-9]+:)/+", r"\1//", os.fspath(path))


def split(url: str) -> tuple[str, str]:
    """The bucket and the folder within it; `UserError` for what is not gs://BUCKET/FOLDER."""
    if found := re.search(r"[][*?#]", url):
        # What Orbax deletes there by name, its clients would take for a pattern of names.
        raise UserError(
            f"{url}: {found[0]} is a pattern, or the end, of a name for the programs that read "
            "buckets; give a name without any of [ ] * ? #"
        )
    match = re.fullmatch(r"gs://([a-z0-9][a-z0-9._-]+[a-z0-9])/+(.*[^/])/*", url)
    if not match:
        raise UserError(
            f"{url}: what can be written to is gs://BUCKET/FOLDER; a bucket of another kind must "
            "be mounted as a folder"
        )
    return match[1], re.sub("/+", "/", match[2])


# --- the clients ----------------------------------------------------------------------------------


def patience() -> float:
    """Seconds after which a bucket out of reach is given up."""
    given = os.environ.get(TIMEOUT, str(SECONDS))
    if not re.fullmatch(r"0*[1-9]\d*", given):
        raise UserError(f"{TIMEOUT} is {given!r}, not a whole number of seconds")
    return int(given)


def retries(seconds: float) -> dict[str, Any]:
    """TensorStore's: it waits 1, 2, 4, ... and at most 32 seconds between attempts."""
    attempts, waited = 1, 0
    while waited < seconds:
        waited += min(2 ** (attempts - 1), 32)
        attempts += 1
    return {"max_retries": attempts, "initial_delay": "1s", "max_delay": "32s"}


# Of the clients of Orbax.
_ENVIRONMENT = {
    # gcsfs would treat each kind of bucket in its own way, and ask for further permissions to know
    # it; Orbax sees to hierarchical ones by itself. gcsfs reads this as it is imported.
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    # TensorStore's requests have no limits of their own.
    "TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS": str(REQUEST_SECONDS[0]),
    "TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": str(REQUEST_SECONDS[1]),
    "TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES": "1",
}


def prepare() -> None:
    """Sets up the clients of Orbax, before it meets a bucket; `UserError` if they are missing."""
    _client()
    import aiohttp
    import fsspec

    # gcsfs's memory of what is in a folder does not hear of what TensorStore and other hosts write.
    fsspec.config.conf["gcs"] = {
        "use_listings_cache": False,
        "requests_timeout": aiohttp.ClientTimeout(total=REQUEST_SECONDS[1]),
    }


@functools.cache
def _client() -> Any:
    """Google's client, which needs no JAX: machines that tokenize load none."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import gcsfs  # noqa: F401
        from google.cloud import storage
    except ImportError as error:
        raise UserError(
            f"gs:// needs further packages ({error.name}): pip install -e '.[gcs]'"
        ) from None
    return storage.Client()


def _limits(seconds: float | None = None) -> dict[str, Any]:
    """How long Google's client tries; keywords for any of its calls."""
    from google.cloud.storage.retry import DEFAULT_RETRY

    return {
        "retry": DEFAULT_RETRY.with_timeout(patience() if seconds is None else seconds),
        "timeout": REQUEST_SECONDS,
    }


# --- errors ---------------------------------------------------------------------------------------

# What Google's client, TensorStore and gcsfs say of an error, what it is, and how to mend it.
_REASONS = (
    (
        r"DefaultCredentialsError|RefreshError|UNAUTHENTICATED|Unauthorized|^HttpError .*, 401$",
        "no valid credentials",
        "run `gcloud auth application-default login`, or start the machine with a service account",
    ),
    (
        r"PERMISSION_DENIED|Forbidden|^HttpError .*, 403$",
        "no permission",
        "the account of every host needs the roles storage.objectUser and "
        "storage.legacyBucketReader on the bucket",
    ),
    (r"NotFound|NOT_FOUND", "no such bucket or file", "make the bucket, or mend its name"),
    (r"DataCorruption", "damaged on the way", "run the same again"),
)
_OUT_OF_REACH = "out of reach"


def reason(error: BaseException) -> str:
    """What is wrong with a bucket and how to mend it, by what some client raised."""
    chain, texts = error, []
    while chain is not None:
        texts.append(f"{type(chain).__name__} {' '.join(str(chain).split())}")
        chain = chain.__cause__
    # TensorStore names what it was doing from the outside in, then the cause.
    cause = re.sub(r" \[tensorstore_spec=.*", "", texts[0])
    cause = cause if len(cause) < 240 else f"{cause[:80]} ... {cause[-140:]}"
    for pattern, what, remedy in _REASONS:
        if re.search(pattern, "\n".join(texts), re.MULTILINE):
            return f"{what} ({cause}): {remedy}"
    return f"{_OUT_OF_REACH} ({cause}): mend the network; {TIMEOUT} sets the seconds to wait for it"


@contextlib.contextmanager
def explained(url: str) -> Iterator[None]:
    """Turns what a client raises into a `UserError` of one line."""
    try:
        with silenced("google", "gcsfs"):
            yield
    except UserError:
        raise
    except Exception as error:  # the clients raise a dozen types without a common one
        text = reason(error)
        kind = PassingError if text.startswith(_OUT_OF_REACH) else UserError
        raise kind(f"{url}: {text}") from error


# --- files ----------------------------------------------------------------------------------------
# Each function raises `UserError` where the bucket cannot be had.


def _blob(url: str, path: str) -> Any:
    bucket, prefix = split(url)
    return _client().bucket(bucket).blob(f"{prefix}/{path}")


def _at_once(url: str, function: Callable[[Any], None], items: Iterable[Any]) -> None:
    """Calls a function for each item, in threads."""
    with explained(url), ThreadPoolExecutor(REQUESTS) as pool:
        list(pool.map(function, items))  # raises what they raise


def check(url: str, name: str) -> None:
    """Writes, reads and removes the file `name` below a folder, as a run will."""
    with explained(url):
        limits, blob = _limits(SECONDS_AT_START), _blob(url, name)
        _client().get_bucket(blob.bucket.name, **limits)  # as Orbax does
        blob.upload_from_string(b"magnet_jax", **limits)
        blob.download_as_bytes(**limits)
        blob.delete(**limits)


def names(url: str) -> set[str]:
    """What lies directly in a folder of a bucket; nothing where there is no such folder."""
    bucket, prefix = split(url)
    with explained(url):
        found = _client().list_blobs(bucket, prefix=f"{prefix}/", delimiter="/", **_limits())
        paths = [blob.name for blob in found] + [*found.prefixes]
    return {path[len(prefix) :].strip("/") for path in paths} - {""}


def sizes(url: str) -> dict[str, int]:
    """The files at any depth below a folder, by their paths from there, and their bytes."""
    bucket, prefix = split(url)
    with explained(url):
        found = _client().list_blobs(bucket, prefix=f"{prefix}/", **_limits())
        return {blob.name[len(prefix) + 1 :]: blob.size for blob in found}


def fetch(url: str, folder: Path, leave_out: Collection[str] = ()) -> None:
    """Copies a folder of a bucket, without what is in `leave_out`, into a local one."""

    def fetch_one(path: str) -> None:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        _blob(url, path).download_to_filename(folder / path, **_limits())

    def is_wanted(path: str) -> bool:
        parts = path.split("/")
        return parts[-1] != "" and ".." not in parts and parts[0] not in leave_out

    _at_once(url, fetch_one, filter(is_wanted, sizes(url)))


def read(url: str, paths: Iterable[str]) -> dict[str, bytes]:
    """The content of those files below a folder that are there."""

    found = {}

    def read_one(path: str) -> None:
        from google.api_core.exceptions import NotFound

        with contextlib.suppress(NotFound):
            found[path] = _blob(url, path).download_as_bytes(**_limits())

    _at_once(url, read_one, paths)
    return found


def put(url: str, path: str, content: bytes | Path) -> None:
    """Writes a file below a folder, of which nothing is seen there before it is whole.

    content: what it holds, or the local file that has it. Its CRC32C is compared on the way.
    """
    with explained(url):
        blob = _blob(url, path)
        upload = blob.upload_from_filename if isinstance(content, Path) else blob.upload_from_string
        upload(content, content_type="application/octet-stream", checksum="crc32c", **_limits())


def create(url: str, path: str, content: bytes) -> bytes:
    """Writes a file below a folder unless one is there, and returns what is there then.

    Of several who do so at once one writes.
    """
    with explained(url):
        from google.api_core.exceptions import PreconditionFailed

        blob = _blob(url, path)
        with contextlib.suppress(PreconditionFailed):
            blob.upload_from_string(content, if_generation_match=0, **_limits())
        return blob.download_as_bytes(**_limits())


def read_version(url: str, path: str) -> tuple[bytes, int] | None:
    """What a file below a folder holds, and its generation; None where there is none."""
    with explained(url):
        from google.api_core.exceptions import NotFound, PreconditionFailed

        blob, limits = _blob(url, path), _limits(SECONDS_AT_START)
        while True:
            try:
                blob.reload(**limits)
                version = blob.generation
                return blob.download_as_bytes(if_generation_match=version, **limits), version
            except PreconditionFailed:  # written in between
                continue
            except NotFound:
                return None


def swap(url: str, path: str, version: int, content: bytes | None) -> bool:
    """Writes a file below a folder, or removes it, if it has that generation (0: if there is none).

    Returns whether it had.
    """
    with explained(url):
        from google.api_core.exceptions import NotFound, PreconditionFailed

        blob, limits = _blob(url, path), _limits(SECONDS_AT_START)
        try:
            if content is None:
                with contextlib.suppress(NotFound):
                    blob.delete(if_generation_match=version, **limits)
            else:
                blob.upload_from_string(content, if_generation_match=version, **limits)
        except PreconditionFailed:
            return False
        return True


def move(url: str, names: Collection[tuple[str, str]]) -> None:
    """Gives files below a folder, by pairs of the old path and the new, other names.

    No byte is downloaded. Killed in between, a file has both names.
    """

    def move_one(pair: tuple[str, str]) -> None:
        from google.api_core.exceptions import NotFound

        old, new = (_blob(url, path) for path in pair)
        token, *_ = new.rewrite(old, **_limits())
        while token is not None:  # large files take several requests
            token, *_ = new.rewrite(old, token=token, **_limits())
        with contextlib.suppress(NotFound):  # deleted, but the answer was lost
            old.delete(**_limits())

    _at_once(url, move_one, names)


class Mirror:
    """A temporary folder that stands for one of a bucket, until the process ends."""

    def __init__(self, url: str, leave_out: Collection[str]):
        """Fetches what the folder holds, without `leave_out`."""
        self.url = url
        self._temporary = tempfile.TemporaryDirectory(prefix="magnet_jax_")
        self.folder = Path(self._temporary.name) / split(url)[1].rpartition("/")[2]
        self.folder.mkdir()
        fetch(url, self.folder, leave_out)
        self._there = self._stamps()

    def _stamps(self) -> dict[str, tuple[int, int]]:
        stats = {path: path.stat() for path in self.folder.rglob("*") if path.is_file()}
        return {
            path.relative_to(self.folder).as_posix(): (stat.st_mtime_ns, stat.st_size)
            for path, stat in stats.items()
        }

    def push(self) -> None:
        """Brings what has changed to the bucket; `UserError` where that fails."""
        stamps = self._stamps()
        changed = sorted(path for path, stamp in stamps.items() if self._there.get(path) != stamp)
        _at_once(self.url, lambda path: put(self.url, path, self.folder / path), changed)
        self._there = stamps
