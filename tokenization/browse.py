"""What a data set of tokens holds, and one of its records as sound and picture.

python -m tokenization.browse data/clips
python -m tokenization.browse data/clips --record 3 --out data/record
"""

import json
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from tqdm import tqdm

from magnet_jax import cli
from magnet_jax.codec.encodec import check_codes, check_same_codec, load_codec
from magnet_jax.config import CodecSpec
from magnet_jax.data import records
from magnet_jax.errors import UserError, reported
from magnet_jax.io.audio import write_wav
from magnet_jax.io.files import check_new_file, replacing_file

_CAPTION = 60  # characters of it in a line


@dataclass(frozen=True, kw_only=True)
class Args:
    dataset: Annotated[Path, tyro.conf.Positional]
    """Folder that tokenization.job wrote."""
    split: Literal["train", "validation"] | None = None
    """List this split only; with --record the record's, train by default."""
    limit: int = 20
    """List so many records at most; 0 is all."""
    grep: str | None = None
    """List only records with this text in their caption, in capitals or not."""
    record: int | None = None
    """Decode this record, by its number in the list of its split, into --out."""
    out: Path | None = None
    """Folder for the record's WAV and PNG."""
    codec: str | None = None
    """Where the data set's codec lies, as in tokenization.job; by default where it lay then."""
    json: Path | None = None
    """File for what is shown, with whole captions, and of a --record the tokens too."""


def run(args: Args) -> None:
    """Prints, and writes what was asked for; raises `UserError` for what cannot be had."""
    _check(args)
    spec = records.read_codec_spec(args.dataset)
    totals = records.read_totals(args.dataset)
    found = {"totals": asdict(totals), "codec": asdict(spec)}
    if args.record is None:
        print(_described(args.dataset, totals, spec))
        listed, more = _listed(args, totals)
        print(_table(listed))
        if more:
            print(f"more records {'match' if args.grep else 'follow'}: --limit 0 lists all")
        found["records"] = listed
    else:
        found["record"] = _decoded(args, spec, totals)
        print("\n".join(found["record"][name] for name in ("wav", "picture")))
    if args.json is not None:
        with replacing_file(args.json) as temporary:
            temporary.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _check(args: Args) -> None:
    if args.limit < 0:
        raise UserError(f"--limit must not be negative, not {args.limit}")
    if (args.record is None) != (args.out is None):
        raise UserError("--record N and --out DIR go together: which record, and where to")
    if args.record is None and args.codec is not None:
        raise UserError("--codec decodes a record: give --record N and --out DIR")
    if args.record is not None and args.grep is not None:
        raise UserError("--grep lists records and --record decodes one: give one of them")
    check_new_file("--json", args.json, [".json"])


def _listed(args: Args, totals: records.Totals) -> tuple[list[dict[str, Any]], bool]:
    """The records to list, and whether there are more."""
    if args.split is None:
        splits = [split for split in records.SPLITS if split in totals.records]
    else:
        splits = [args.split]
    listed: list[dict[str, Any]] = []
    for line in _lines(args.dataset, splits):
        if args.grep is not None and args.grep.casefold() not in line["caption"].casefold():
            continue
        if args.limit and len(listed) == args.limit:
            return listed, True
        listed.append(line)
    return listed, False


def _lines(dataset: Path, splits: list[str]) -> Iterator[dict[str, Any]]:
    for split in splits:
        source = records.open_split(dataset, split)
        # A short list needs no bar.
        for index in tqdm(range(len(source)), desc=split, unit="record", leave=False, delay=1):
            yield _line(split, index, records.decode_example(source[index]))


def _line(split: str, index: int, record: dict[str, Any]) -> dict[str, Any]:
    return {
        "split": split,
        "index": index,
        "track_id": record["track_id"],
        "start": record["start"],
        "duration": record["duration"],
        "frames": record["codes_KT"].shape[1],
        "caption": record["caption"],
        "info": record["info"],
    }


def _described(dataset: Path, totals: records.Totals, spec: CodecSpec) -> str:
    counts = ", ".join(f"{count} {split}" for split, count in totals.records.items())
    about = ", ".join(f"{name.replace('_', ' ')} {v:.4g}" for name, v in totals.about.items())
    rows = [
        ("records", f"{sum(totals.records.values())}: {counts}"),
        ("made of", about),
        (
            "codec",
            f"{spec.source} ({spec.sha256[:12]}), {spec.sample_rate} Hz, {spec.channels} channel"
            f"{'s' * (spec.channels > 1)}, {spec.num_codebooks} codebooks "
            f"{'(left and right interleaved) ' * spec.interleaved}of "
            f"{spec.codebook_size}, {spec.frame_rate:g} frames a second",
        ),
        ("files", f"{len(totals.files)}, {sum(totals.files.values()) / 1e6:.2f} MB"),
    ]
    return "\n".join([str(dataset), *(f"  {name:7}  {value}" for name, value in rows)])


def _table(listed: list[dict[str, Any]]) -> str:
    if not listed:
        return "no such records"
    width = max(len("track"), *(len(line["track_id"]) for line in listed))
    heads = f"{'track':{width}}  {'start':>7}  {'seconds':>7}  caption"
    rows = [f"\n{'index':>6}  {'split':10}  {heads}"]
    for line in listed:
        caption = " ".join(line["caption"].split())
        caption = caption if len(caption) <= _CAPTION else f"{caption[: _CAPTION - 3]}..."
        rows.append(
            f"{line['index']:6}  {line['split']:10}  {line['track_id']:{width}}  "
            f"{line['start']:7.2f}  {line['duration']:7.2f}  {caption}"
        )
    return "\n".join(rows)


def _decoded(args: Args, spec: CodecSpec, totals: records.Totals) -> dict[str, Any]:
    """Writes a record's WAV and picture; what it is, and its tokens."""
    split = args.split or "train"
    source = records.open_split(args.dataset, split)
    if not 0 <= args.record < len(source):
        raise UserError(
            f"--record {args.record}: {args.dataset} has records 0 to {len(source) - 1} of {split}"
        )
    record = records.decode_example(source[args.record])
    try:
        codec = load_codec(
            args.codec or spec.source,
            num_codebooks=spec.num_codebooks,
            interleaved=spec.interleaved,
        )
    except UserError as error:
        if args.codec:
            raise
        raise UserError(f"{error}; --codec says where it lies now") from None
    check_same_codec(spec, codec.spec, str(args.dataset))
    try:
        codes_BKT = check_codes(record["codes_KT"][None], spec)
    except ValueError as error:
        raise UserError(f"{args.dataset}: record {args.record} of {split}: {error}") from None
    wav_CN = codec.decode(codes_BKT)[0]
    # The last frame may be longer than the track.
    wav_CN = wav_CN[:, : round(record["duration"] * spec.sample_rate)]
    wav = args.out / f"{split}_{args.record}.wav"
    picture = wav.with_suffix(".png")
    write_wav(wav, wav_CN, spec.sample_rate)
    _draw(picture, record, wav_CN, spec, f"{split} {args.record}")
    return _line(split, args.record, record) | {
        "codes": record["codes_KT"].tolist(),
        "wav": str(wav),
        "picture": str(picture),
    }


def _draw(
    path: Path, record: dict[str, Any], wav_CN: np.ndarray, spec: CodecSpec, title: str
) -> None:
    """The tokens, and beside them what they sound like."""
    from matplotlib.figure import Figure

    codes_KT = record["codes_KT"]
    count, frames = codes_KT.shape
    figure = Figure(figsize=(14, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    image = left.imshow(
        codes_KT,
        aspect="auto",
        cmap="viridis",
        interpolation="nearest",
        vmin=0,
        vmax=spec.codebook_size - 1,
        extent=(0, frames / spec.frame_rate, count + 0.5, 0.5),
    )
    left.set_yticks(range(1, count + 1))
    left.set(xlabel="seconds", ylabel="codebook", title="Tokens")
    scale = lambda seconds: seconds * spec.frame_rate, lambda frames: frames / spec.frame_rate
    left.secondary_xaxis("top", functions=scale).set_xlabel("frames")
    figure.colorbar(image, ax=left, label="token")
    mono_N = wav_CN.mean(0)
    window = max(1, min(1024, len(mono_N) // 4))
    *_, drawn = right.specgram(
        mono_N, NFFT=window, Fs=spec.sample_rate, noverlap=window * 3 // 4, vmin=-140, vmax=-20
    )
    right.set(
        xlabel="seconds", ylabel="Hz", title="Decoded audio", xlim=(0, frames / spec.frame_rate)
    )
    figure.colorbar(drawn, ax=right, label="dB")
    caption = textwrap.shorten(record["caption"], 120, placeholder=" ...")
    where = f"from {record['start']:.2f} s, {record['duration']:.2f} s long"
    track = record["track_id"]
    track = track if len(track) <= 80 else f"...{track[-77:]}"
    # Dollar signs are prices here, no formulas.
    figure.suptitle(f"{title}: {track}, {where}\n{caption}", fontsize="medium", parse_math=False)
    with replacing_file(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def main(argv: list[str] | None = None) -> None:
    run(cli.parse(Args, argv, prog="python -m tokenization.browse", description=__doc__))


if __name__ == "__main__":
    with reported():
        main()
