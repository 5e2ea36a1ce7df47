"""The same server in replicas that Ray Serve starts, ends and shares requests among.

serve run launch.serve.on_ray:build checkpoint=demo folder=served max_replicas=4 gpus=1

Each replica is what `python -m launch.serve` is: an engine with a device of its own. The options
are those of launch.serve and of `Settings`. Ray's proxy listens at 127.0.0.1:8000. Requests of one
X-Session-Id header are answered by one replica; what another one has made, or was given, it finds
in the folder that all share.
"""

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, RequestRouterConfig

from launch.serve.__main__ import Args, access_of, open_engine
from magnet_jax import cli
from magnet_jax.arguments import check_fields
from magnet_jax.config import Count, NotNegative, Whole
from magnet_jax.errors import UserError

ROUTER = "ray.serve.experimental.consistent_hash_router:ConsistentHashRouter"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How many replicas there are, and what each takes."""

    min_replicas: Whole = 1
    """Replicas that are always there; 0 lets the last one go where nobody asks."""
    max_replicas: Count = 1
    """The most of them."""
    cpus: NotNegative = 1.0
    """CPUs of each."""
    gpus: NotNegative = 0.0
    """GPUs of each."""
    waiting: Count = 8
    """Requests that a replica is to have at a time: with more, another one is started."""

    def __post_init__(self):
        check_fields(self, "")


class Replica:
    """An engine behind the HTTP application."""

    def __init__(self, args: Args):
        from launch.serve.uploads import Reader  # in the replica: JAX is slow to load

        self._args, self._reader = args, Reader()
        self._engine = open_engine(args).__enter__()
        self._engine.warmed.wait()
        if self._engine.failure is not None:
            raise self._engine.failure

    def __serve_build_asgi_app__(self) -> Any:
        from magnet_jax.serving import http

        args = self._args
        return http.create_app(
            self._engine, access_of(args), self._reader, log_prompts=args.log_prompts
        )

    def check_health(self) -> None:
        """Raises where the device's thread is gone; Ray then starts another replica."""
        if not self._engine.alive:
            raise RuntimeError("the device's thread has ended")

    async def __del__(self):
        await asyncio.to_thread(self._engine.drain, self._args.drain_seconds)
        await asyncio.to_thread(self._engine.close)
        self._reader.close()


def build(options: dict[str, str]) -> serve.Application:
    """The application, as `serve run` and Serve's config files ask for it.

    Raises `UserError` for an unknown option.
    """
    own = {field.name for field in dataclasses.fields(Settings)}
    words = {True: [], False: []}
    for name, value in options.items():
        words[name in own] += [f"--{name.replace('_', '-')}", str(value)]
    settings = cli.parse(Settings, words[True], prog="serve run launch.serve.on_ray:build")
    args = cli.parse(Args, words[False], prog="python -m launch.serve")
    access_of(args)  # which says what is wrong with it
    if args.folder is None:
        raise UserError("folder=DIR: name a folder that all replicas share")
    deployment = serve.deployment(
        serve.ingress()(Replica),
        name="magnet_jax",
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
        max_ongoing_requests=args.limits.queue + args.limits.max_batch,
        autoscaling_config=AutoscalingConfig(
            min_replicas=settings.min_replicas,
            max_replicas=max(settings.max_replicas, settings.min_replicas),
            target_ongoing_requests=settings.waiting,
        ),
        request_router_config=RequestRouterConfig(request_router_class=ROUTER),
        graceful_shutdown_timeout_s=args.drain_seconds + 10,
    )
    return deployment.bind(_anywhere(args))


def _anywhere(args: Args) -> Args:
    """The options with whole paths: a replica works in another folder."""
    from magnet_jax.checkpoints import pretrained  # JAX is slow to load

    paths = {"folder": args.folder, "api_key_file": args.api_key_file}
    if args.checkpoint not in pretrained.SHIPPED and Path(args.checkpoint).is_dir():
        paths["checkpoint"] = Path(args.checkpoint)
    found = {name: path and path.resolve() for name, path in paths.items()}
    return dataclasses.replace(args, **found)
