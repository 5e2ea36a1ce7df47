"""Serves a model to browsers and programs: a page to play with, and an HTTP API.

python -m launch.serve --checkpoint demo
"""

import dataclasses
import functools
import logging
import os
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import platformdirs
import tyro

from magnet_jax import cli, errors
from magnet_jax.arguments import RARE, Between, check_fields
from magnet_jax.config import KernelConfig, NotNegative, SamplingMeshConfig
from magnet_jax.errors import UserError
from magnet_jax.io import machine
from magnet_jax.serving.limits import Limits

if TYPE_CHECKING:
    from magnet_jax.serving.access import Access
    from magnet_jax.serving.engine import Engine

API_KEY = "MAGNET_JAX_API_KEY"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
MOST_REQUESTS = 512  # at once; more are answered with 503
Names = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    checkpoint: Annotated[str | Path, tyro.conf.arg(metavar="MODEL")]
    """The model, named as for launch.sample: a folder, a hub id or the word demo."""
    host: str = "127.0.0.1"
    """Address to listen at. One that other machines reach needs --api-key-file."""
    port: Annotated[int, Between(0, 65_535)] = 7860
    """Port to listen at; 0 is any that is free."""
    page: bool = True
    """Serve the page as well as the API."""
    api_key_file: Path | None = None
    """File of keys, one a line, of which every request needs one. MAGNET_JAX_API_KEY holds a key
    as well."""
    open: bool = False
    """Serve other machines without any key."""
    allow_host: Names = ()
    """Another name of this server, as browsers ask for it. Give it again for more."""
    allow_origin: Names = ()
    """Another site whose pages may use the API, such as https://example.org."""
    folder: Path | None = None
    """Where uploads and results are kept for a time. By default it is in the user's cache."""
    warm: str | None = None
    """Programs to be compiled before the server is ready, as SECONDS:CLIPS,CLIPS such as 10:1,4.
    By default clips are as long as the model's, and 1, 2, 4, ... up to --limits.max-batch of them;
    on a CPU, which gains nothing from batches, 1. The word none is for none."""
    limits: Limits = Limits()
    """What is refused, and when it is given up."""
    drain_seconds: NotNegative = 60.0
    """Seconds for which jobs may end after SIGTERM."""
    log_prompts: Annotated[bool, RARE] = False
    """Write texts to the log."""
    codec: Annotated[str | None, tyro.conf.arg(metavar="DIR"), RARE] = None
    """Where the codec is, if it is no longer where the data set was made with it."""
    kernels: Annotated[KernelConfig, RARE] = KernelConfig()
    """How attention is computed."""
    mesh: Annotated[SamplingMeshConfig, RARE] = SamplingMeshConfig()
    """How many devices make one batch."""


def warm_of(args: Args, seconds: float) -> tuple[tuple[float, int], ...]:
    """Seconds and clips of the batches to be warm."""
    import jax

    from magnet_jax.serving import work

    if args.warm == "none":
        return ()
    if args.warm is None:
        most = 1 if jax.default_backend() == "cpu" else work.padded(args.limits.max_batch)
        return tuple((seconds, 1 << i) for i in range(most.bit_length()))
    try:
        length, _, sizes = args.warm.partition(":")
        return tuple((float(length), work.padded(int(size))) for size in sizes.split(","))
    except ValueError:
        raise UserError(f"--warm {args.warm}: must be SECONDS:CLIPS,CLIPS such as 10:1,4") from None


def access_of(args: Args) -> "Access":
    """Who may ask; raises `UserError` for a server that is open by mistake."""
    from magnet_jax.serving import access

    keys = () if args.api_key_file is None else access.read_keys(args.api_key_file)
    if key := os.environ.get(API_KEY):
        keys = (*keys, access.checked_key(key, API_KEY))
    local = args.host in LOOPBACK
    if not local and not keys and not args.open:
        raise UserError(
            f"--host {args.host}: is in reach of other machines: give --api-key-file FILE, or "
            "--open to serve everybody"
        )
    hosts = (*access.LOOPBACK, *args.allow_host) if local or args.allow_host else None
    return access.Access(keys=keys, hosts=hosts, origins=args.allow_origin)


def open_engine(args: Args) -> "Engine":
    """The model behind its queue, not yet begun."""
    # JAX is slow to load
    from magnet_jax import api, programs
    from magnet_jax.checkpoints import pretrained
    from magnet_jax.decode import placement
    from magnet_jax.serving.engine import Engine
    from magnet_jax.serving.store import Store

    programs.keep_on_disk()
    machine.keep_freed()
    loaded = pretrained.load(args.checkpoint, codec=args.codec)
    decoder = pretrained.load_decoder(loaded, str(args.checkpoint), "jax")
    execution = placement.Execution(kernels=args.kernels, mesh=args.mesh)
    model = api.of_kind(loaded, decoder, execution)
    folder = args.folder or Path(platformdirs.user_cache_dir("magnet_jax")) / f"serve-{args.port}"
    limits = args.limits
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        store = Store(folder, keep_seconds=limits.keep_seconds, keep_bytes=limits.keep_mb * 1e6)
    except OSError as error:
        raise UserError(f"--folder {folder}: cannot be written ({error.strerror})") from None
    name = Path(args.checkpoint).name if Path(args.checkpoint).is_dir() else str(args.checkpoint)
    return Engine(model, store, limits, name=name, warm=warm_of(args, model.max_duration))


def bound(args: Args) -> socket.socket:
    """The socket to listen at; before a model is loaded, as the port may be taken."""
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    try:
        return socket.create_server((args.host, args.port), family=family)
    except OSError as error:
        where = f"--host {args.host} --port {args.port}"
        raise UserError(f"{where}: cannot be listened at ({error.strerror or error})") from None


def serve(args: Args) -> None:
    """Serves until SIGTERM or Ctrl-C; what was begun is ended before."""
    check_fields(args, "--")
    try:
        import uvicorn

        from magnet_jax.serving import http
    except ModuleNotFoundError as error:
        raise UserError(f"the server needs {error.name}: pip install 'magnet-jax[serve]'") from None
    from launch.serve.uploads import Reader

    access, listening = access_of(args), bound(args)
    _log_to_stderr()
    engine, reader = open_engine(args), Reader()
    app = http.create_app(engine, access, reader, page=args.page, log_prompts=args.log_prompts)
    config = uvicorn.Config(
        app, host=args.host, port=args.port, workers=1, limit_concurrency=MOST_REQUESTS,
        timeout_keep_alive=5, timeout_graceful_shutdown=5, log_config=None, access_log=False,
        server_header=False,
    )  # fmt: skip
    server = uvicorn.Server(config)
    ending = threading.Event()

    def end(*_: Any) -> None:
        if ending.is_set():  # asked twice
            server.should_exit = server.force_exit = True
            return
        ending.set()
        print("ending: jobs that were begun are ended first", file=sys.stderr, flush=True)
        threading.Thread(target=drained, daemon=True).start()

    def drained() -> None:
        engine.drain(args.drain_seconds)
        server.should_exit = True

    server.handle_exit = end  # in place of uvicorn's, which waits for no job
    with engine:
        threading.Thread(target=_tell, args=(engine, server, args, listening), daemon=True).start()
        try:
            server.run(sockets=[listening])
        finally:
            reader.close()
    if engine.failure is not None:
        raise engine.failure


def _log_to_stderr() -> None:
    """Shows what we and the web server log; libraries' own loggers stay as they are."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
    for name in ("magnet_jax", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False


def _tell(engine: "Engine", server: Any, args: Args, listening: socket.socket) -> None:
    """Says where the server is as soon as it is ready."""
    engine.warmed.wait()
    if engine.failure is not None:
        server.should_exit = True
        return
    port = listening.getsockname()[1]
    host = f"[{args.host}]" if ":" in args.host else args.host
    print(f"ready: http://{host}:{port}", flush=True)


def parse(words: list[str]) -> Args:
    return cli.parse(Args, words, prog="python -m launch.serve", description=__doc__)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, functools.partial(sys.exit, 143))
    with errors.reported():
        serve(parse(sys.argv[1:]))
