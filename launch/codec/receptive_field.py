"""What a token frame hears, as in appendix B of the paper, and the context that follows from it.

python -m launch.codec.receptive_field --picture data/receptive_field.png

An impulse is added to long audio at places spread over one frame, and the latent before
quantization is compared with and without it: once with the encoder's LSTM, once without, where
strides, kernels and dilations say exactly which frames must change.
"""

import dataclasses
from pathlib import Path
from typing import Annotated

import numpy as np
from tqdm import tqdm

from magnet_jax import cli
from magnet_jax.arguments import Between, check_fields
from magnet_jax.codec import receptive_field, tonal
from magnet_jax.codec.encodec import Codec, load_codec
from magnet_jax.codec.receptive_field import Background, Field, Response, energy_within
from magnet_jax.config import EMBEDDED
from magnet_jax.errors import reported
from magnet_jax.io.files import PICTURES, check_new_file, replacing_file

_FLOOR = 1e-5  # the picture's lower end, of the response's peak; its square, of the energy


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    codec: str = EMBEDDED
    """As in tokenization.job: 'embedded', folder or hub id of a transformers EncodecModel,
    AudioCraft's compression_state_dict.bin, encodec_24khz or the path of its weights."""
    background: Background = "silence"
    """What the impulse is added to: silence as in the paper, or a constant or white noise, both of
    RMS 0.1; the LSTM forgets faster in some than in others."""
    frames: int = 256
    """Frames of background to each side of the impulse; the LSTM must forget within half of them
    for its field to be told."""
    impulses: int = 16
    """Places of the impulse within a frame, evenly spread."""
    share: Annotated[float, Between(0, 1 - 1e-9, above=True, words="lie between 0 and 1")] = 1e-6
    """Share of the response's energy that may be left where the LSTM counts as having forgotten."""
    picture: Path | None = None
    """PNG, PDF or SVG file: the response against time, and what of its energy lies further out."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Findings:
    samples: Field
    """Of the convolutions, exact."""
    frames: Field
    """The same in whole frames."""
    confirmed: bool
    """Whether the measured support without LSTM is that, for every impulse."""
    lstm_frames: int | None
    """Frames before a frame that it hears with LSTM, but for `share`; None: not to be told."""
    context: int
    """Frames to each side for `model.local_context`."""
    context_exact: float
    """The same before rounding up."""
    response: Response


def measure(args: Args, codec: Codec) -> Findings:
    """Raises `UserError` for a codec without receptive field, and for numbers out of range."""
    check_fields(args, "--")
    exact = receptive_field.convolution_frames(codec.config)
    response = receptive_field.impulse_response(
        codec,
        background=args.background,
        frames=args.frames,
        impulses=args.impulses,
        progress=lambda places: tqdm(places, desc="measuring", unit="impulse"),
    )
    lasts = receptive_field.lasting_frames(response, args.share)
    context, context_exact = receptive_field.restricted_context(codec.config)
    return Findings(
        samples=receptive_field.convolutions(codec.config),
        frames=exact,
        confirmed=receptive_field.hears_what_it_should(response, codec.config),
        lstm_frames=None if lasts is None else max(lasts, exact.before),
        context=context,
        context_exact=context_exact,
        response=response,
    )


def summary(args: Args, codec: Codec, found: Findings) -> str:
    """For people: what was found, and a table of energies."""
    spec, samples = codec.spec, found.samples
    milliseconds = 1000 / spec.frame_rate
    width = samples.before + 1 + samples.after
    if found.confirmed:
        check = f"the same, for impulses at {args.impulses} places of a frame"
    else:
        check = "NOT the same: some frames changed that should not have, or did not that should"
    if found.lstm_frames is None:
        lstm = f"more than {args.frames // 2} frames before: take larger --frames or --share"
    else:
        lstm = (
            f"{found.lstm_frames} frames before, {found.frames.after} after; less than "
            f"{args.share:g} of the energy lies further back"
        )
    rows = [
        (
            "convolutions",
            f"{found.frames.before} frames before, {found.frames.after} after: {width} samples "
            f"({1000 * width / spec.sample_rate:.1f} ms), {samples.before} before a frame's first "
            f"and {samples.after} after",
        ),
        ("measured", check),
        ("with LSTM", lstm),
        (
            "restricted context",
            f"{found.context} frames ({found.context * milliseconds:.0f} ms) to each side, for "
            f"model.local_context: the convolutions",
        ),
        (
            "",
            f"hear {found.context_exact:.2f} frames from a frame's middle, rounded up (paper, "
            f"section 3.2)",
        ),
    ]
    if codec.tonal:
        before, after = tonal.reach(codec.tonal.spectrum, spec.sample_rate, codec.hop)
        rows.append(("tonal stream", f"{before} frames before, {after} after"))
    lines = [
        f"codec {spec.source}, {spec.sample_rate} Hz, {spec.frame_rate:g} frames a second of "
        f"{codec.hop} samples; impulse on {args.background}"
    ]
    lines += [f"  {name:18}  {value}" for name, value in rows]
    lines += ["", "share of the response's energy within so many frames of the impulse's"]
    lines.append(f"  {'frames':>6}  {'ms':>6}  {'without LSTM':>12}  {'with LSTM':>12}")
    without, whole = (energy_within(m) for m in _magnitudes(found.response))
    for n in _shown(found.context, args.frames):
        shares = f"{_percent(without[n]):>12}  {_percent(whole[n]):>12}"
        lines.append(f"  {n:6}  {n * milliseconds:6.0f}  {shares}")
    return "\n".join(lines)


def draw(args: Args, codec: Codec, found: Findings, path: Path) -> None:
    """Left the paper's Figure 3 in log scale, right the energy that lies further out."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    place = _places(found, codec.hop)
    styles = (("with LSTM", "C1-"), ("without LSTM", "C0-"))
    without, whole = _magnitudes(found.response)
    furthest = 2 * found.context
    for (label, style), magnitudes_PT in zip(styles, (whole, without)):
        curve = _in_order(magnitudes_PT) / magnitudes_PT.max()
        left.plot(place, np.where(curve > 0, curve, np.nan), style, lw=1.2, label=label)
        beyond = 1 - energy_within(magnitudes_PT)
        beyond = beyond[beyond > _FLOOR**2]
        right.plot(beyond, style, marker=".", label=label)
        furthest = max(furthest, len(beyond))
    shown = 3 * max(found.context, 1)
    edges = -found.samples.before, found.samples.after
    for edge, label in zip(edges, ("the convolutions' field", None)):
        # an impulse so far from a frame's first sample, as a distance from its middle
        x = (edge - (codec.hop - 1) / 2) / codec.hop
        left.axvline(x, color="C0", ls=":", label=label)
    left.axvspan(
        -found.context, found.context, color="gray", alpha=0.15, lw=0,
        label=f"restricted context, {found.context} frames",
    )  # fmt: skip
    left.set(
        xlim=(-shown, shown), ylim=(_FLOOR, 3), yscale="log",
        xlabel="impulse before or after the frame's middle (frames)",
        ylabel="change of the latent / its peak",
        title="Response of one frame",
    )  # fmt: skip
    right.axvspan(0, found.context, color="gray", alpha=0.15, lw=0)
    right.axhline(args.share, color="C1", ls=":", label=f"--share {args.share:g}")
    right.set(
        xlim=(0, furthest), ylim=(_FLOOR**2, 1), yscale="log",
        xlabel="distance to either side of the impulse (frames)",
        ylabel="share of the energy further out",
        title="Energy of the response",
    )  # fmt: skip
    milliseconds = 1000 / codec.spec.frame_rate
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", loc="lower right" if axes is left else "upper right")
        scale = lambda frames: frames * milliseconds, lambda ms: ms / milliseconds
        axes.secondary_xaxis("top", functions=scale).set_xlabel("ms")
    source = codec.spec.source if len(codec.spec.source) < 60 else f"...{codec.spec.source[-57:]}"
    figure.suptitle(
        f"EnCodec {source}, {codec.spec.sample_rate} Hz, impulse on {args.background}",
        fontsize="medium",
        parse_math=False,
    )
    with replacing_file(path) as temporary:
        figure.savefig(temporary, dpi=120, format=path.suffix[1:].lower())


def _magnitudes(response: Response) -> tuple[np.ndarray, np.ndarray]:
    """Without and with LSTM, [P, T]."""
    return response.convolutions_PT, response.whole_PT


def _places(found: Findings, hop: int) -> np.ndarray:
    """Where the impulses lie, in frames after the middle of the frame that hears them, sorted."""
    response = found.response
    first_T = np.arange(-response.frames, response.frames + 1) * hop
    samples_TP = response.places_P[None] - first_T[::-1, None]
    return ((samples_TP - (hop - 1) / 2) / hop).ravel()


def _in_order(magnitudes_PT: np.ndarray) -> np.ndarray:
    """In the order of `_places`: the earliest impulse is the one that the last frame hears."""
    return magnitudes_PT[:, ::-1].T.ravel()


def _shown(context: int, frames: int) -> list[int]:
    """Rows of the table: every frame up to twice the context, then doubling."""
    rows = list(range(min(2 * context, frames) + 1))
    while 2 * rows[-1] <= frames and rows[-1] > 0:
        rows.append(2 * rows[-1])
    return rows


def _percent(share: float) -> str:
    return f"{100 * share:.4f} %"


def main(argv: list[str] | None = None) -> None:
    args = cli.parse(Args, argv, prog="python -m launch.codec.receptive_field", description=__doc__)
    check_new_file("--picture", args.picture, PICTURES)
    codec = load_codec(args.codec)
    found = measure(args, codec)
    print(summary(args, codec, found))
    if args.picture is not None:
        draw(args, codec, found, args.picture)


if __name__ == "__main__":
    with reported():
        main()
