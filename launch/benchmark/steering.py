"""Whether blends, texts over time and negative texts steer, by a tagger's ear, and what they cost.

Two texts that name an instrument each are blended, follow one another, and are led away from. Two
judges hear the clips: the tagger, by the tag that a text names, and a probe that is fitted to clips
of either text by itself, of other random numbers, and so knows how this model plays both.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
import soxr

from launch.benchmark.editing import shown
from launch.benchmark.options import Texts, balanced
from launch.compile import hlo
from magnet_jax.decode import canvas, placement, sampler, sampling
from magnet_jax.decode.tokens_of_text import tokenize_texts
from magnet_jax.errors import UserError
from magnet_jax.evaluation import metrics, probe, tagger
from magnet_jax.evaluation.tagger import Tagger
from magnet_jax.io.files import replacing_file
from magnet_jax.prompts import Description, Prompt

if TYPE_CHECKING:
    from magnet_jax.api import MAGNeT

RESAMPLES = 1000
FIT = 2**15  # sample number from which the probe's clips have theirs


class Heard(NamedTuple):
    """How much of the second text rather than of the first is in each of N clips, from 0 to 1."""

    probe_N: np.ndarray
    tag_N: np.ndarray


class Judge(NamedTuple):
    """Who hears one text or the other."""

    tagger: Tagger
    tags: tuple[int, int]  # that the two texts name
    probe: probe.Probe
    sample_rate: int

    def hear(self, wavs: Sequence[np.ndarray]) -> Heard:
        probes, tags = [], []
        for wav_N in wavs:
            tagged = listened(self.tagger, wav_N, self.sample_rate)
            logits_2 = (tagged.embeddings_PE @ self.probe.weights_EC + self.probe.biases_C).mean(0)
            first, second = tagged.probabilities_PL[:, list(self.tags)].mean(0)
            probes.append(1 / (1 + np.exp(np.clip(logits_2[0] - logits_2[1], -50, 50))))
            tags.append(second / (first + second))
        return Heard(np.array(probes), np.array(tags))


def listened(ears: Tagger, wav_N: np.ndarray, sample_rate: int) -> tagger.Tagged:
    if sample_rate != tagger.SAMPLE_RATE:
        wav_N = soxr.resample(wav_N, sample_rate, tagger.SAMPLE_RATE)
    return tagger.tag(ears, wav_N)


def described(args: Texts) -> dict[str, Description]:
    """What is made, by what it is called."""
    a, b = args.texts
    blends = {
        f"{1 - share:g} of the first, {share:g} of the second": Prompt([(a, 1 - share), (b, share)])
        for share in args.shares
    }
    half = args.seconds / 2
    return {
        "the first": a,
        **blends,
        "the second": b,
        "neither named": args.neither,
        "neither named, not the first": Prompt(args.neither, negative=a),
        "neither named, not the second": Prompt(args.neither, negative=b),
        "the first, then the second": Prompt([(0, a), (half, b)], fade=args.fade),
        "the second, then the first": Prompt([(0, b), (half, a)], fade=args.fade),
    }


def made(args: Texts, model: "MAGNeT", text: Description, first: int = 0) -> list[np.ndarray]:
    """Clips of a text, mono, whose numbers begin at `first`."""
    clips = []
    for number in range(0, args.clips, args.batch_size):
        generated = model.clips(
            [text] * args.batch_size, num_frames=model.num_frames, seed=args.seed,
            first_sample=first + number,
        )  # fmt: skip
        clips += list(generated.wav_BCN.mean(1))
    return clips[: args.clips]


def judge_of(args: Texts, model: "MAGNeT") -> Judge:
    """The tagger, and a probe of clips of each text alone."""
    ears = tagger.load()
    tags = []
    for text in args.texts:
        named = np.flatnonzero(metrics.named_tags(text, ears.tags))
        if not len(named):
            raise UserError(
                f"--texts {text!r}: names no tag of the tagger ({', '.join(ears.tags)})"
            )
        tags.append(int(named[0]))
    clips, labels = {}, {}
    for label, text in zip("ab", args.texts):
        for i, wav_N in enumerate(made(args, model, text, FIT)):
            clips[f"{label}{i}"] = listened(ears, wav_N, model.sample_rate).embeddings_PE
            labels[f"{label}{i}"] = label
    return Judge(ears, tuple(tags), probe.fit(clips, labels), model.sample_rate)


def score(values_N: np.ndarray, seed: int) -> metrics.Score:
    return metrics.mean(values_N, resamples=RESAMPLES, seed=seed)


def rows(args: Texts, model: "MAGNeT") -> Iterator[tuple[str, Heard]]:
    """What is heard in the clips of each description; of texts over time, in either half."""
    judge = judge_of(args, model)
    for name, text in described(args).items():
        wavs = made(args, model, text)
        if "then" in name:
            middle = len(wavs[0]) // 2
            yield f"{name}: first half", judge.hear([wav_N[:middle] for wav_N in wavs])
            yield f"{name}: second half", judge.hear([wav_N[middle:] for wav_N in wavs])
        else:
            yield name, judge.hear(wavs)


def differences(found: dict[str, Heard]) -> dict[str, tuple[str, str]]:
    """Pairs of rows whose second should have more of the second text, clip by clip."""
    pairs = {
        "not the first": ("neither named", "neither named, not the first"),
        "not the second, turned round": ("neither named, not the second", "neither named"),
    }
    for order, turned in (("first, then the second", False), ("second, then the first", True)):
        halves = f"the {order}: first half", f"the {order}: second half"
        pairs[f"the {order}"] = halves[::-1] if turned else halves
    names = list(found)[: list(found).index("the second") + 1]
    pairs |= {f"{low} -> {high}": (low, high) for low, high in zip(names, names[1:])}
    return pairs


def costs(args: Texts, model: "MAGNeT") -> dict[str, float]:
    """FLOPs from texts to the tokens of one clip, of the compiled program's own count."""
    a, b = args.texts
    asked = {
        "one text": a,
        "a blend of two": Prompt([(a, 0.5), (b, 0.5)]),
        "two texts over time": Prompt([(0, a), (args.seconds / 2, b)]),
        "a negative text": Prompt(a, negative=b),
        "a blend and a negative text": Prompt([(a, 0.5), (b, 0.5)], negative=args.neither),
    }
    config, found = model.loaded.config.model, {}
    for name, text in asked.items():
        batch = sampling.Batch(
            text=tokenize_texts(model.loaded, [text]),
            sample_B=np.arange(1),
            seed=args.seed,
            canvas=canvas.blank(1, config.num_codebooks, model.num_frames),
            decoding=model.generation,
        )
        inputs, made_for = sampling.make_program(
            model.loaded, batch, placement.Execution(), platform=jax.default_backend(), mesh=None
        )
        program = sampler.sample.lower(inputs, sampler=made_for).compile()
        found[name] = hlo.work(program.as_text()).flops
    return found


def measure(args: Texts) -> None:
    """Prints the figures as they come."""
    from magnet_jax import api  # its parts are slow to load

    model = api.MAGNeT.get_pretrained(args.checkpoint)
    args = dataclasses.replace(args, steps=balanced(args.steps, model.generation))
    model.set_generation_params(decoding_steps=args.steps, duration=args.seconds)
    print(f"{args.checkpoint}; steps {args.steps}; {args.clips} clips of {args.seconds:g} s a row")
    print("share of the second text that is heard, from 0 to 1, with 95 % intervals")
    print("| | probe | tag |\n| --- | --- | --- |", flush=True)
    heard = {}
    for name, row in rows(args, model):
        heard[name] = row
        cells = (shown(score(values_N, args.seed)) for values_N in row)
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    print("\nmore of it, clip by clip\n| | probe | tag |\n| --- | --- | --- |")
    paired = {
        name: [score(y - x, args.seed) for x, y in zip(heard[low], heard[high])]
        for name, (low, high) in differences(heard).items()
    }
    for name, both in paired.items():
        print(f"| {name} | {' | '.join(map(shown, both))} |", flush=True)
    flops = costs(args, model) if args.costs else {}
    for name, count in flops.items():
        print(f"{name:28} {count / 1e9:8.2f} GFLOP ({count / flops['one text']:.3f})", flush=True)
    if args.json is not None:
        everything: dict[str, Any] = {
            "arguments": dataclasses.asdict(args),
            "heard": {
                name: {k: v.tolist() for k, v in row._asdict().items()}
                for name, row in heard.items()
            },
            "differences": paired,
            "flops": flops,
        }
        with replacing_file(args.json) as file:
            file.write_text(json.dumps(everything, indent=2, default=str) + "\n", encoding="utf-8")
