"""Which clips belong together: captions, reference clips, and clips to fit a probe to."""

import collections
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from launch.evaluate import prompts
from magnet_jax.errors import UserError
from magnet_jax.evaluation import probe, scores


class Row(NamedTuple):
    """A line of the table: clips, and what they are held against."""

    files: dict[str, Path]
    captions: dict[str, str]
    pairs: dict[str, str]
    """Ids of their reference clips."""


def match(folder: Path, listed: list[prompts.Prompt] | None, reference: Mapping[str, Path]) -> Row:
    """The generated clips with their captions and reference clips: by the list, or by sidecars.

    Raises `UserError` if there is nothing to hold any of them against.
    """
    files, real = scores.find_audio(folder), _by_name(reference)
    if listed is None:
        row = _by_sidecars(files, real, reference)
        if not row.captions and not reference:
            raise UserError(
                f"{folder}: no captions beside its clips; give --prompts FILE or --reference FOLDER"
            )
    else:
        row = _by_list(folder, files, real, listed)
    if reference and len(row.pairs) < len(row.files):
        print(
            f"note: {len(row.pairs)} of the {len(row.files)} clips have a reference clip of their "
            + ("name: KL is of these" if row.pairs else "name: KL is left out")
        )
    return row


def _by_sidecars(
    files: dict[str, Path], real: Mapping[str, str], reference: Mapping[str, Path]
) -> Row:
    pairs = {name: real[name] for name in files if name in real}
    captions = {}
    for name, path in files.items():
        text = prompts.sidecar(path) or (name in pairs and prompts.sidecar(reference[pairs[name]]))
        if text:
            captions[name] = text
    return Row(files, captions, pairs)


def _by_list(
    folder: Path,
    files: Mapping[str, Path],
    real: Mapping[str, str],
    listed: list[prompts.Prompt],
) -> Row:
    made = _by_name(files)
    there = [prompt for prompt in listed if prompt.id in made]
    if not there:
        raise UserError(
            f"{folder}: none of its clips is called as --prompts has them, such as {listed[0].id}"
        )
    if len(there) < len(listed):
        missing = next(prompt.id for prompt in listed if prompt.id not in made)
        print(
            f"note: {folder} has {len(there)} of the {len(listed)} clips that --prompts lists, "
            f"and not {missing}: only these are scored"
        )
    pairs = {}
    for prompt in there:
        name = next((name for name in (prompt.id, *prompt.names) if name in real), None)
        if name is not None:
            pairs[prompt.id] = real[name]
    captions = {prompt.id: prompt.text for prompt in there}
    return Row({prompt.id: files[made[prompt.id]] for prompt in there}, captions, pairs)


def _by_name(files: Mapping[str, Path]) -> dict[str, str]:
    """Ids of clips by themselves, and by their last part where that is of one clip alone."""
    names = collections.Counter(path.stem for path in files.values())
    alone = {path.stem: name for name, path in files.items() if names[path.stem] == 1}
    return alone | {name: name for name in files}


def captions_of_reference(row: Row, reference: Mapping[str, Path]) -> dict[str, str]:
    """Captions of real clips: those of the generated clips that they pair with, or their own."""
    both = row.pairs.keys() & row.captions.keys()
    captions = {row.pairs[name]: row.captions[name] for name in both}
    for name, path in reference.items():
        if name not in captions and (text := prompts.sidecar(path)):
            captions[name] = text
    return captions


class Labelled(NamedTuple):
    """Clips to fit a probe to."""

    files: dict[str, Path]
    labels: dict[str, str]
    sha256: str
    """Of all of them, as `scores.digest` has it."""


def labelled(
    folder: Path, field: str, reference: Mapping[str, Path], captions: Iterable[str]
) -> Labelled:
    """The clips of --probe whose sidecars have the field, and what they have there.

    Raises `UserError` for fewer than two labels, for labels that none of the generated clips'
    captions names, and for clips that are in the reference as well.
    """
    files = scores.find_audio(folder)
    values = {name: prompts.fields(path).get(field) for name, path in files.items()}
    labels = {
        name: value.strip()
        for name, value in values.items()
        if isinstance(value, str) and value.strip()
    }
    if len(set(labels.values())) < 2:
        raise UserError(
            f"--probe {folder}: needs clips of two labels at least, under {field!r} in the .json "
            "beside each"
        )
    known = sorted(set(labels.values()))
    if not any(probe.named_label(known, caption) for caption in captions):
        raise UserError(
            f"--probe {folder}: no caption names a label of its clips, such as {known[0]!r}; name "
            "another --probe-field, or leave out --probe"
        )
    files = {name: files[name] for name in labels}
    hashes = scores.hashes(files)
    if both := set(hashes.values()) & set(scores.hashes(reference).values()):
        raise UserError(
            f"--probe {folder}: {len(both)} of its clips are in --reference as well, which "
            "would tell nothing: name other clips"
        )
    return Labelled(files, labels, scores.digest_of(hashes))
