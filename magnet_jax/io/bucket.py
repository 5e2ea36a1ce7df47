"""Runs in a bucket, --out gs://BUCKET/RUN: for hosts that share no file system.

Orbax reads and writes checkpoints in the bucket itself, every process its share. The rest of a
run's folder is small: it lies in a temporary folder (`Mirror`), from where it is brought to the
bucket file by file. A file of a bucket is there whole or not at all.

A data set that is tokenized into a bucket is brought there file by file as well (`put`, `create`,
`move`).

Three clients are at work: Google's own for the small files, TensorStore for arrays, and gcsfs
(by etils.epath) for what Orbax writes beside arrays. Each has its own errors; `explained` makes one
line of any.
"""

import base64
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
_OUT_OF_REACH = "out of reach"


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


def patience() -> float:
    """Seconds after which a bucket out of reach is given up."""
    given = os.environ.get(TIMEOUT, str(SECONDS))
    if not re.fullmatch(r"\d+", given) or not int(given):
        raise UserError(f"{TIMEOUT} is {given!r}, not a whole number of seconds")
    return int(given)


def prepare(url: str) -> None:
    """Makes the clients ready for a folder; to be called before Orbax meets it.

    Raises `UserError` if they are not installed, or the bucket cannot be read.
    """
    _set_up()
    bucket, prefix = split(url)
    with explained(url):
        _store(bucket).read(f"{prefix}/config.json").result()


@functools.cache
def _set_up() -> None:
    """Sets up the clients; `UserError` if they are not installed."""
    # gcsfs would treat each kind of bucket in its own way, and ask for further permissions to know
    # it; Orbax sees to hierarchical ones by itself.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    _need_packages()
    import aiohttp
    import fsspec

    # TensorStore's requests have no limits of their own, and Orbax has no setting for how often it
    # tries again (for a quarter of an hour).
    for name, seconds in zip(("CONNECT_TIMEOUT", "LOW_SPEED_TIME"), REQUEST_SECONDS):
        os.environ.setdefault(f"TENSORSTORE_CURL_{name}_SECONDS", str(seconds))
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "1")
    # gcsfs's memory of what is in a folder does not hear of what TensorStore and other hosts write.
    fsspec.config.conf["gcs"] = {
        "use_listings_cache": False,
        "requests_timeout": aiohttp.ClientTimeout(total=REQUEST_SECONDS[1]),
    }


def _need_packages() -> None:
    try:
        import gcsfs  # noqa: F401
        from google.cloud import storage  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"gs:// needs further packages ({error.name}): pip install -e '.[gcs]'"
        ) from None


def retries(seconds: float) -> dict[str, Any]:
    """TensorStore's: it waits 1, 2, 4, ... and at most 32 seconds between attempts."""
    attempts, waited = 1, 0
    while waited < seconds:
        waited += min(2 ** (attempts - 1), 32)
        attempts += 1
    return {"max_retries": attempts, "initial_delay": "1s", "max_delay": "32s"}


@functools.cache
def _client() -> Any:
    """Google's client, which needs no JAX: machines that tokenize load none."""
    _need_packages()
    from google.cloud import storage

    return storage.Client()


def _limits(seconds: float | None = None) -> dict[str, Any]:
    """How long Google's client tries; keywords for any of its calls."""
    from google.cloud.storage.retry import DEFAULT_RETRY

    return {
        "retry": DEFAULT_RETRY.with_timeout(patience() if seconds is None else seconds),
        "timeout": REQUEST_SECONDS,
    }


def reason(error: BaseException) -> str:
    """What is wrong with a bucket and how to mend it, by what some client raised."""
    chain, texts = error, []
    while chain is not None:
        texts.append(f"{type(chain).__name__} {' '.join(str(chain).split())}")
        chain = chain.__cause__
    text = "\n".join(texts)
    # TensorStore names what it was doing from the outside in, then the cause.
    cause = re.sub(r" \[tensorstore_spec=.*", "", texts[0])
    cause = cause if len(cause) < 240 else f"{cause[:80]} ... {cause[-140:]}"
    if re.search(
        r"DefaultCredentialsError|RefreshError|UNAUTHENTICATED|Unauthorized|^HttpError .*, 401$",
        text,
        re.MULTILINE,
    ):
        return (
            f"no valid credentials ({cause}): run `gcloud auth application-default login`, or "
            "start the machine with a service account"
        )
    if re.search(r"PERMISSION_DENIED|Forbidden|^HttpError .*, 403$", text, re.MULTILINE):
        return (
            f"no permission ({cause}): the account of every host needs the roles "
            "storage.objectUser and storage.legacyBucketReader on the bucket"
        )
    if re.search(r"NotFound|NOT_FOUND", text):
        return f"no such bucket or file ({cause}): make the bucket, or mend its name"
    return f"{_OUT_OF_REACH} ({cause}): mend the network; {TIMEOUT} sets the seconds to wait for it"


@contextlib.contextmanager
def explained(url: str) -> Iterator[None]:
    """Turns what a client raises into a `UserError` of one line."""
    try:
        with silenced("google", "gcsfs"):
            yield
    except UserError:
        raise
    except Exception as error:  # three clients, a dozen types, without a common one
        text = reason(error)
        kind = PassingError if text.startswith(_OUT_OF_REACH) else UserError
        raise kind(f"{url}: {text}") from error


def check(url: str, name: str) -> None:
    """Writes, reads and removes a file below a folder, as a run will.

    Args:
      url: the folder.
      name: the file's; each process has its own.

    Raises:
      UserError: no such bucket, no permission, no way there, or no packages for it.
    """
    bucket_name, prefix = split(url)
    _set_up()
    with explained(url):
        client, limits = _client(), _limits(SECONDS_AT_START)
        bucket = client.get_bucket(bucket_name, **limits)  # as Orbax does
        _store(bucket_name).write(f"{prefix}/{name}", b"magnet_jax").result()
        blob = bucket.blob(f"{prefix}/{name}")
        blob.download_as_bytes(**limits)
        blob.delete(**limits)


def _store(bucket: str) -> Any:
    """A bucket as Orbax writes arrays to it.

    At its first request TensorStore may print where it has looked for credentials in vain, before
    it asks the machine for them.
    """
    import tensorstore

    spec = {"driver": "gcs", "bucket": bucket}
    spec["gcs_request_retries"] = retries(SECONDS_AT_START)
    return tensorstore.KvStore.open(spec).result()


def names(url: str) -> set[str]:
    """What lies directly in a folder of a bucket; nothing where there is no such folder.

    Raises `UserError` where the bucket cannot be read.
    """
    bucket, prefix = split(url)
    with explained(url):
        found = _client().list_blobs(bucket, prefix=f"{prefix}/", delimiter="/", **_limits())
        paths = [blob.name for blob in found] + [*found.prefixes]
    return {path[len(prefix) :].strip("/") for path in paths} - {""}


def fetch(url: str, folder: Path, leave_out: Collection[str] = ()) -> None:
    """Copies a folder of a bucket, without what is in `leave_out`, into a local one.

    Raises `UserError` where the bucket cannot be read.
    """
    name, prefix = split(url)
    with explained(url):
        client, limits = _client(), _limits()
        from google.cloud.storage import transfer_manager

        bucket = client.bucket(name)
        paths = [
            blob.name[len(prefix) + 1 :]
            for blob in client.list_blobs(bucket, prefix=f"{prefix}/", **limits)
        ]
        transfer_manager.download_many_to_path(
            bucket,
            [p for p in paths if not p.endswith("/") and p.split("/")[0] not in leave_out],
            destination_directory=str(folder),
            blob_name_prefix=f"{prefix}/",
            download_kwargs=limits,
            worker_type=transfer_manager.THREAD,
            raise_exception=True,
        )


def sizes(url: str) -> dict[str, int]:
    """The files at any depth below a folder, by their paths from there, and their bytes.

    Raises `UserError` where the bucket cannot be read.
    """
    bucket, prefix = split(url)
    with explained(url):
        found = _client().list_blobs(bucket, prefix=f"{prefix}/", **_limits())
        return {blob.name[len(prefix) + 1 :]: blob.size for blob in found}


def read(url: str, paths: Iterable[str]) -> dict[str, bytes]:
    """The content of those files below a folder that are there.

    Raises `UserError` where the bucket cannot be read.
    """

    def content(path: str) -> bytes | None:
        from google.api_core.exceptions import NotFound

        try:
            return _blob(url, path).download_as_bytes(**_limits())
        except NotFound:
            return None

    paths = list(paths)
    found = zip(paths, _at_once(url, content, paths))
    return {path: data for path, data in found if data is not None}


def put(url: str, path: str, content: bytes | Path) -> None:
    """Writes a file below a folder, of which nothing is seen there before it is whole.

    content: what it holds, or the local file that has it.

    Raises `UserError` where it cannot be written, or arrives with another size or checksum.
    """
    with explained(url):
        import google_crc32c

        blob, checksum = _blob(url, path), google_crc32c.Checksum()
        options = {"content_type": "application/octet-stream", "checksum": "crc32c", **_limits()}
        if isinstance(content, bytes):
            size = len(content)
            checksum.update(content)
            blob.upload_from_string(content, **options)
        else:
            size = content.stat().st_size
            with content.open("rb") as file:
                for _ in checksum.consume(file, 1 << 20):
                    pass
            blob.upload_from_filename(os.fspath(content), **options)
        # (what the server says that it has)
        if (blob.size, blob.crc32c) != (size, base64.b64encode(checksum.digest()).decode()):
            raise UserError(f"{url}/{path}: is not there as it was sent; run the same again")


def create(url: str, path: str, content: bytes) -> bytes:
    """Writes a file below a folder unless one is there, and returns what is there then.

    Of several who do so at once one writes. Raises `UserError` where that fails.
    """
    with explained(url):
        from google.api_core.exceptions import PreconditionFailed

        blob = _blob(url, path)
        with contextlib.suppress(PreconditionFailed):
            blob.upload_from_string(content, if_generation_match=0, **_limits())
        return blob.download_as_bytes(**_limits())


def read_version(url: str, path: str) -> tuple[bytes, int] | None:
    """What a file below a folder holds, and its generation; None where there is none.

    Raises `UserError` where the bucket cannot be read.
    """
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

    Returns whether it had. Raises `UserError` where the bucket cannot be written.
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

    No byte is downloaded. Killed in between, a file has both names. Raises `UserError` where that
    fails.
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


def _blob(url: str, path: str) -> Any:
    bucket, prefix = split(url)
    return _client().bucket(bucket).blob(f"{prefix}/{path}")


def _at_once(url: str, function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    """Maps items in threads; `UserError` by what they raise."""
    with explained(url), ThreadPoolExecutor(REQUESTS) as pool:
        return list(pool.map(function, items))


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
        name, prefix = split(self.url)
        stamps = self._stamps()
        changed = sorted(path for path, stamp in stamps.items() if self._there.get(path) != stamp)
        if not changed:
            return
        with explained(self.url):
            client, limits = _client(), _limits()
            from google.cloud.storage import transfer_manager

            transfer_manager.upload_many_from_filenames(
                client.bucket(name),
                changed,
                source_directory=str(self.folder),
                blob_name_prefix=f"{prefix}/",
                upload_kwargs=limits,
                worker_type=transfer_manager.THREAD,
                raise_exception=True,
            )
        self._there = stamps
