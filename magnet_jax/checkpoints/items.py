"""How one item of a checkpoint, a tree of arrays, is written and read: by Orbax, made stricter.

- The name of a folder stands for itself; Orbax would take `[1]`, `*` and `?` for patterns.
- What was written is looked through before it counts as saved, hence before an older step goes.
- Where an array cannot be read, the reads still under way are waited for.
- Requests to a bucket are repeated for as long as bucket.py says.
"""

import asyncio
import collections
import fnmatch
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
import tensorstore
from etils import epath

from magnet_jax.io import bucket


class Literal(type(epath.Path())):
    """A path whose own name is no pattern; only what `glob` is given is one."""

    def glob(self, pattern: str) -> Iterator[epath.Path]:
        *folders, name = pattern.split("/")
        folder = self.joinpath(*folders)
        if folder.is_dir():
            yield from (path for path in folder.iterdir() if fnmatch.fnmatchcase(path.name, name))


class _Arrays(ocp.type_handlers.ArrayHandler):
    """Orbax's, with a context of ours for TensorStore's requests."""

    def __init__(self, context: tensorstore.Context):
        super().__init__()
        self._context = context

    def _in_context(self, infos: Sequence[Any]) -> list[Any]:
        return [info.replace(ts_context=self._context) for info in infos]

    async def serialize(self, values: Sequence, infos: Sequence, args: Any = None) -> Sequence:
        return await super().serialize(values, self._in_context(infos), args)

    async def metadata(self, infos: Sequence) -> Sequence:
        return await super().metadata(self._in_context(infos))

    async def deserialize(self, infos: Sequence, args: Any = None) -> Sequence:
        before = asyncio.all_tasks()
        try:
            return await super().deserialize(self._in_context(infos), args)
        except Exception:
            # Orbax closes the event loop at once, and each read that ends later would complain.
            late = asyncio.all_tasks() - before
            await asyncio.gather(*late, return_exceptions=True)
            raise


class Items(ocp.PyTreeCheckpointHandler):
    """Writes and reads trees of `jax.Array` (`ocp.args.PyTreeSave`, `PyTreeRestore`)."""

    def __init__(self, multiprocessing: ocp.options.MultiprocessingOptions, in_bucket: bool):
        context = {  # as Orbax has it
            "file_io_concurrency": {"limit": 128},
            "cache_pool#ocdbt": {"total_bytes_limit": 100_000_000},
        }
        if in_bucket:
            context["gcs_request_retries"] = bucket.retries(bucket.patience())
        self._context = tensorstore.Context(context)
        types = ocp.type_handlers.create_type_handler_registry((jax.Array, _Arrays(self._context)))
        super().__init__(multiprocessing_options=multiprocessing, type_handler_registry=types)

    def finalize(self, directory: epath.Path) -> None:
        """Makes one store of what each process has written; a `ValueError` if it is not whole.

        Orbax calls it in the first process, before the checkpoint gets its name.
        """
        merging = ocp.type_handlers.merge_ocdbt_per_process_files(
            Literal(directory), ts_context=self._context, use_zarr3=False
        )
        loop = asyncio.new_event_loop()  # (`asyncio.run` is not for several threads at once)
        try:
            loop.run_until_complete(merging)
        finally:
            loop.close()
        self._check_whole(directory)

    def _check_whole(self, directory: epath.Path) -> None:
        """Every array is described, and has as many chunks as its shape says."""
        try:
            found = collections.Counter(key.rpartition("/")[0] for key in self._keys(directory))
            arrays = jax.tree.leaves(self.metadata(directory).tree)
        except ValueError as error:
            raise ValueError(f"what was written is not whole: {error}") from error
        for array in arrays:
            chunks = zip(array.shape, array.storage.chunk_shape, strict=True)
            expected = math.prod(-(-size // chunk) for size, chunk in chunks)
            if found[array.name] != expected + 1:  # (with its description)
                raise ValueError(
                    f"what was written is not whole: {array.name} has {found[array.name] - 1} of "
                    f"{expected} chunks"
                )

    def _keys(self, directory: epath.Path) -> list[str]:
        if bucket.is_url(directory):
            name, prefix = bucket.split(str(directory))
            base = {"driver": "gcs", "bucket": name, "path": f"{prefix}/"}
        else:
            base = {"driver": "file", "path": f"{directory}/"}
        spec = {"driver": "ocdbt", "base": base}
        store = tensorstore.KvStore.open(spec, context=self._context).result()
        return [key.decode() for key in store.list().result()]


def registry(
    multiprocessing: ocp.options.MultiprocessingOptions, in_bucket: bool
) -> ocp.handlers.CheckpointHandlerRegistry:
    """What a `CheckpointManager` is to write and read its items with."""
    items, found = (
        Items(multiprocessing, in_bucket),
        ocp.handlers.DefaultCheckpointHandlerRegistry(),
    )
    for args in (ocp.args.PyTreeSave, ocp.args.PyTreeRestore):
        found.add(None, args, items)
    return found
