"""Makes a small text encoder for a small set of captions: a trained tokenizer, a random T5.

For runs that cannot fetch a pre-trained T5; such an encoder is trained along with the model
(`--text.finetune`).
"""

import itertools
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from magnet_jax import cli, errors
from magnet_jax.arguments import Between, Seed, check_fields
from magnet_jax.errors import UserError
from magnet_jax.io import files

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_SPACE = "▁"
_LONGEST_PIECE = 16
# every printable ASCII character that survives lower-casing: any English text can be spelled
_ALPHABET = [chr(c) for c in range(33, 127) if chr(c) == chr(c).lower()]
Size = Annotated[int, Between(1, 1_000_000)]


@dataclass(frozen=True, kw_only=True)
class Args:
    """Train a tokenizer on captions, draw a small T5 encoder, write both as one folder."""

    captions: Path
    """Folder of sidecar .json files."""
    out: Path
    """Folder to write; it must be new or empty."""
    vocab_size: int = 512
    """Most tokens the vocabulary may have."""
    width: Size = 128
    """Width of the text states."""
    layers: Size = 2
    """Number of layers."""
    heads: Size = 4
    """Attention heads of a layer."""
    head_size: Size = 32
    """Width of a head."""
    mlp_width: Size = 256
    """Width of the MLP."""
    seed: Seed = 0
    """Of the random weights."""


def read_texts(directory: Path) -> list[str]:
    """Descriptions and metadata of all sidecar .json files, as the data pipeline writes them."""
    from magnet_jax.data import pipeline

    if not directory.is_dir():
        raise UserError(f"--captions {directory}: no such folder")
    texts = []
    for path in sorted(directory.rglob("*.json")):
        try:
            info = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path}: not valid JSON ({error})") from None
        found = info.get("description") if isinstance(info, dict) else None
        captions = found if isinstance(found, list) else [found]
        if captions and all(isinstance(caption, str) for caption in captions):
            texts += [*captions, *pipeline.field_texts(info)]
    if not texts:
        raise UserError(f"--captions {directory}: no .json with a 'description' in it")
    return texts


def train_tokenizer(texts: list[str], vocab_size: int) -> "Tokenizer":
    """A unigram tokenizer laid out as T5's, which ignores case and accents.

    The vocabulary is at most `vocab_size`; fewer if the texts yield no more pieces.
    """
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
    from tokenizers.models import Unigram

    from magnet_jax.model import t5

    special = [t5.PAD, t5.END, t5.UNKNOWN]
    room = vocab_size - len(special)
    if room < 1 + len(_ALPHABET):
        least = len(special) + 1 + len(_ALPHABET)
        raise UserError(f"--vocab-size {vocab_size}: {least} is the least, for the alphabet alone")
    # a small model sees too few words to learn that 'Piano' is 'piano'
    normalizer = normalizers.Sequence(
        [
            normalizers.NFKD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex("[‘’]"), "'"),
            normalizers.Replace(Regex("[“”]"), '"'),
            normalizers.Replace(Regex("[–—]"), "-"),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
        ]
    )
    splitter = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="always"),
            pre_tokenizers.Punctuation(behavior="isolated"),  # 'piano,' is 'piano' and ','
        ]
    )
    words = Counter()
    for text in texts:
        split = splitter.pre_tokenize_str(normalizer.normalize_str(text))
        words.update(word for word, _ in split)
    scores = learn_pieces(words, room)

    vocabulary = [(token, 0.0) for token in special] + scores
    tokenizer = Tokenizer(Unigram(vocabulary, unk_id=special.index(t5.UNKNOWN)))
    tokenizer.add_special_tokens(special)
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.Metaspace(replacement=_SPACE, prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {t5.END}",
        pair=f"$A {t5.END} $B {t5.END}",
        special_tokens=[(t5.END, special.index(t5.END))],
    )
    return tokenizer


def learn_pieces(words: Counter[str], size: int) -> list[tuple[str, float]]:
    """At most `size` pieces of words with their log-probabilities, the likeliest first.

    The unigram model of Kudo 2018 (arXiv 1804.10959) with the best segmentation in place of all:
    from every word and repeated substring down, dropping the pieces whose loss costs least. The
    tokenizers library's own trainer gives other scores each time, and of a few hundred texts 140
    pieces in place of 512, as it has none that only one word contains.
    """
    letters = sorted({_SPACE, *_ALPHABET, *"".join(words)})
    if len(letters) > size:
        raise UserError(f"--vocab-size: the captions alone have {len(letters)} different letters")
    counts = Counter()
    for word, count in words.items():
        for i, j in itertools.combinations(range(min(len(word), 64) + 1), 2):
            if j - i <= _LONGEST_PIECE:
                counts[word[i:j]] += count
    seeds = [p for p, count in counts.items() if len(p) > 1 and (count > 1 or p in words)]
    seeds.sort(key=lambda p: (-counts[p] * len(p), p))
    counts = Counter({p: counts[p] for p in seeds[: 32 * size]} | {c: counts[c] for c in letters})

    while True:
        for _ in range(2):
            scores = _log_shares(counts)
            counts = Counter(dict.fromkeys(letters, 0))
            for word, count in words.items():
                for piece in _best_split(word, scores):
                    counts[piece] += count
        scores = _log_shares(counts)
        if len(scores) <= size:
            return sorted(scores.items(), key=lambda item: (-item[1], item[0]))

        costs = {p: counts[p] * _loss_without(p, scores) for p in list(scores) if len(p) > 1}
        costliest = sorted(costs, key=lambda p: (-costs[p], p))
        kept = costliest[: max(size - len(letters), int(0.8 * len(costs)))]
        counts = Counter({p: counts[p] for p in kept} | {c: counts[c] for c in letters})


def _loss_without(piece: str, scores: dict[str, float]) -> float:
    """How much less likely the piece's text is when others have to spell it."""
    own = scores.pop(piece)
    loss = own - sum(scores[p] for p in _best_split(piece, scores))
    scores[piece] = own
    return loss


def _log_shares(counts: Counter[str]) -> dict[str, float]:
    """Log-probabilities; a piece never seen (a letter) counts as half an occurrence."""
    total = sum(counts.values())
    return {piece: math.log(max(count, 0.5) / total) for piece, count in counts.items()}


def _best_split(word: str, scores: dict[str, float]) -> list[str]:
    """The likeliest sequence of pieces that spells the word (Viterbi)."""
    best = [(0.0, 0)] + [(-math.inf, 0)] * len(word)  # likelihood up to here, where its last began
    for end in range(1, len(word) + 1):
        for begin in range(max(0, end - _LONGEST_PIECE), end):
            score = scores.get(word[begin:end])
            if score is not None and best[begin][0] + score > best[end][0]:
                best[end] = (best[begin][0] + score, begin)
    pieces, end = [], len(word)
    while end:
        pieces.append(word[best[end][1] : end])
        end = best[end][1]
    return pieces[::-1]


def make(args: Args) -> None:
    """Writes the encoder's folder; raises `UserError` for a folder or sizes that do not fit."""
    check_fields(args, "--")
    files.check_new_folder("--out", args.out)
    import jax  # which is slow to load

    from magnet_jax.convert import t5_files
    from magnet_jax.model import t5

    texts = read_texts(args.captions)
    tokenizer = train_tokenizer(texts, args.vocab_size)
    config = t5.T5Config(
        d_model=args.width,
        d_kv=args.head_size,
        d_ff=args.mlp_width,
        num_layers=args.layers,
        num_heads=args.heads,
        vocab_size=tokenizer.get_vocab_size(),
    )
    params = t5.init(config, jax.random.key(args.seed))
    with files.replacing(args.out) as folder:
        t5_files.save(folder, config, params, tokenizer)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{args.out}: {config.vocab_size} tokens from {len(texts)} texts, {count:,} parameters")


def main(words: Sequence[str] | None = None) -> None:
    make(cli.parse(Args, words, prog="python -m launch.make.text_encoder"))


if __name__ == "__main__":
    with errors.reported():
        main()
