"""Time of decoding one step after another, against transformers' MusicGen with the same weights."""

import dataclasses
import functools
import time

import jax
from tqdm import tqdm

from launch.benchmark import models, report
from launch.benchmark.options import Autoregressive
from magnet_jax.convert import lm_rules
from magnet_jax.decode import placement, sampling
from magnet_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One batch size; the fastest call of each, in seconds."""

    batch_size: int
    ours: float
    peer: float | None
    equal: float | None
    """Share of the tokens that are the same: the weights are, and rounding decides the rest."""

    @property
    def ratio(self) -> float | None:
        return self.peer and self.ours / self.peer


def measure(args: Autoregressive) -> None:
    """Measures, prints, and writes what `args` asks for."""
    with models.opened(args.checkpoint, args.model, "musicgen") as (name, loaded):
        model = loaded.config.model
        if model.kind != "musicgen":
            raise UserError(f"a model of kind {model.kind}: this measures those of kind musicgen")
        loaded = loaded._replace(config=dataclasses.replace(loaded.config, compute_dtype="float32"))
        num_frames = max(1, round(args.seconds * loaded.codec.frame_rate))
        print(
            f"model   {name}\nclip    {num_frames} frames, guidance "
            f"{loaded.config.autoregressive.guidance:g}, greedy, float32 on "
            f"{jax.devices()[0].device_kind}",
            flush=True,
        )
        peer = None
        if args.peer:  # (its module imports torch)
            from launch.benchmark.musicgen_peer import Peer

            peer = Peer(lm_rules.to_audiocraft(loaded.params["lm"], model), model)
        loaded = placement.prepare(loaded)
        print(report.aligned(("batch", "ours", "a step", "theirs", "ratio", "same tokens")))
        rows = []
        for batch in args.batch_sizes:
            rows.append(_measure(loaded, peer, batch, num_frames, args.repeats))
            print(_line(rows[-1], num_frames + max(model.delays)), flush=True)
    found = [dataclasses.asdict(row) | {"ratio": row.ratio} for row in rows]
    report.write_json(args.json, {"num_frames": num_frames, "rows": found})


def _measure(loaded, peer, batch: int, num_frames: int, repeats: int) -> Row:
    """Ours and the peer take turns, so that a busy moment hits both."""
    texts = models.texts(batch)
    decoding = dataclasses.replace(loaded.config.autoregressive, greedy=True)
    ours = functools.partial(
        sampling.generate, loaded, texts, num_frames=num_frames, decoding=decoding, seed=0
    )
    ours()  # compiles
    calls = {"ours": lambda: ours().codes_BKT}
    if peer is not None:
        states_BSE, lengths_B = models.text_states(loaded, texts)
        calls["peer"] = functools.partial(
            peer.generate, states_BSE, lengths_B, num_frames=num_frames, guidance=decoding.guidance
        )
        peer.generate(states_BSE, lengths_B, num_frames=1, guidance=decoding.guidance)
    seconds, tokens = {name: [] for name in calls}, {}
    for _ in tqdm(range(repeats), f"batch {batch}", leave=False):
        for name, call in calls.items():
            started = time.perf_counter()
            tokens[name] = call()
            seconds[name].append(time.perf_counter() - started)
    with_peer = peer is not None
    return Row(
        batch_size=batch,
        ours=min(seconds["ours"]),
        peer=min(seconds["peer"]) if with_peer else None,
        equal=float((tokens["ours"] == tokens["peer"]).mean()) if with_peer else None,
    )


def _line(row: Row, num_steps: int) -> str:
    cells = [str(row.batch_size), f"{row.ours:.3f} s", f"{row.ours / num_steps * 1e3:.1f} ms"]
    if row.peer is not None:
        cells += [f"{row.peer:.3f} s", f"{row.ratio:.2f}", f"{row.equal:.1%}"]
    return report.aligned(cells)
