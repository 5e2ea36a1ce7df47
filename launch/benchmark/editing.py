"""How well a MAGNeT edits: real clips with holes, with wrong tokens, and what an edit costs."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from launch.benchmark.options import Editing, balanced
from launch.benchmark.peaks import seconds_of
from launch.compile import hlo
from magnet_jax.config import DecodeConfig, EditConfig
from magnet_jax.decode import canvas, likelihood, placement, rescore, sampler, sampling
from magnet_jax.decode.tokens_of_text import tokenize_texts
from magnet_jax.edit import free
from magnet_jax.errors import UserError
from magnet_jax.evaluation import metrics
from magnet_jax.io import exact
from magnet_jax.io.files import replacing_file

if TYPE_CHECKING:
    from magnet_jax.api import MAGNeT

PLACES = (0.25, 0.75)  # of a window, where its holes lie
PLANTED = 0.05  # share of the first codebook's spans that are made wrong
RATHER = {"above": ("hidden", "shown"), "anneal": ("rate", "count"), "steps": ("auto", "all")}
ORDERS = ("confidence", "random", "halton")


class Study(NamedTuple):
    """What all measurements share: a row for each place of each clip, place by place."""

    model: "MAGNeT"
    decode: DecodeConfig
    texts: list[str]
    codes_BKT: np.ndarray
    names: list[str]  # of the clips
    seed: int

    @property
    def num_clips(self) -> int:
        return len(self.names)

    def holes(self, seconds: float) -> np.ndarray:
        """bool [B, T], True in the hole of each row, which is of whole spans."""
        num_frames, span = self.codes_BKT.shape[-1], self.model.loaded.config.model.span_length
        count = max(1, round(seconds * self.model.frame_rate / span)) * span
        if count > num_frames * min(PLACES) * 2:
            raise UserError(f"--holes {seconds:g}: half of the model's window is the most")
        firsts = [round((p * num_frames - count / 2) / span) * span for p in PLACES]
        first_B1 = np.repeat(firsts, self.num_clips)[:, None]
        frame_T = np.arange(num_frames)
        return (frame_T >= first_B1) & (frame_T < first_B1 + count)

    def nll(self, codes_BKT, hole_BT, *, above: str = "hidden", groups: int = 1) -> np.ndarray:
        """Nats a token [B, K] of what stands in holes, hidden whole or span by span in groups."""
        reader = rescore.from_model(self.model.loaded, self.model.loaded)
        config = self.model.loaded.config.model
        group_G1T = likelihood.interleaved(hole_BT.shape[-1], config.span_length, groups)
        log_BKT = likelihood.log_probabilities(
            reader, self.texts, codes_BKT, group_G1T & hole_BT, mask_id=config.mask_id, above=above
        )
        return -log_BKT.sum(-1) / hole_BT.sum(-1, keepdims=True)

    def decoded(self, hole_BT, editing: EditConfig | None, **settings: Any) -> np.ndarray:
        """The clips with their holes filled; without `editing`, clips of which nothing is given."""
        given_BKT = np.repeat(~hole_BT[:, None], self.codes_BKT.shape[1], axis=1)
        return sampling.generate(
            self.model.loaded,
            self.texts,
            num_frames=hole_BT.shape[-1],
            decoding=dataclasses.replace(self.decode, **settings),
            seed=self.seed,
            given=canvas.Canvas(self.codes_BKT, given_BKT) if editing else None,
            editing=editing,
        ).codes_BKT

    def by_clip(self, values_B: np.ndarray) -> metrics.Score:
        """The mean of all rows, with an interval over clips."""
        values_C = values_B.reshape(len(PLACES), -1).mean(0)
        return metrics.mean(values_C, resamples=1000, seed=self.seed)


def opened(args: Editing) -> Study:
    """The model and the tokens of the clips, spread over the folder."""
    from magnet_jax import api  # its parts are slow to load

    model = api.MAGNeT.get_pretrained(args.checkpoint)
    window = round(model.loaded.config.data.segment_seconds * model.frame_rate)
    files = sorted(p for p in args.audio.glob("*") if p.suffix in (".wav", ".flac"))
    found = []
    for path in files:
        source = exact.read(path)
        if len(source.samples_NC) * model.frame_rate >= window * source.sample_rate:
            found.append((path, source))
    if len(found) < args.clips:
        raise UserError(
            f"--audio {args.audio}: has {len(found)} clips of {window / model.frame_rate:g} s, and "
            f"--clips asks for {args.clips}"
        )
    picked = [found[i] for i in np.linspace(0, len(found) - 1, args.clips).round().astype(int)]
    codes, texts = [], []
    for path, source in tqdm(picked, "clips", leave=False):
        wav_CN = source.as_float().T.astype(np.float32)
        codes.append(model._encode(wav_CN, source.sample_rate)[:, :window])
        about = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        texts.append(about["description"])
    decode = dataclasses.replace(model.generation, steps=balanced(args.steps, model.generation))
    codes_BKT = np.concatenate([np.stack(codes)] * len(PLACES)).astype(np.int32)
    names = [path.name for path, _ in picked]
    return Study(model, decode, texts * len(PLACES), codes_BKT, names, args.seed)


def reading(study: Study, hole_BT: np.ndarray) -> dict[str, Any]:
    """How likely the true tokens of a hole are, with their own sides and with another clip's."""
    nll_BK = {above: study.nll(study.codes_BKT, hole_BT, above=above) for above in RATHER["above"]}
    other_BKT = study.codes_BKT.reshape(len(PLACES), study.num_clips, *study.codes_BKT.shape[1:])
    other_BKT = np.roll(other_BKT, 1, axis=1).reshape(study.codes_BKT.shape)
    strange_BKT = np.where(hole_BT[:, None], study.codes_BKT, other_BKT)
    more_BK = study.nll(strange_BKT, hole_BT) - nll_BK["hidden"]
    return {
        "nll": {above: values_BK.mean(0).tolist() for above, values_BK in nll_BK.items()},
        "shown_costs": study.by_clip((nll_BK["shown"] - nll_BK["hidden"]).mean(1)),
        "strange_sides_cost": [study.by_clip(more_B) for more_B in more_BK.T],
    }


def ways() -> dict[str, tuple[EditConfig, dict[str, Any]]]:
    """The default, and each setting changed by itself."""
    usual = EditConfig()
    found = {"default": (usual, {})}
    for name, values in RATHER.items():
        for value in values:
            if value != getattr(usual, name):
                found[f"{name} {value}"] = dataclasses.replace(usual, **{name: value}), {}
    return found | {f"order {o}": (usual, {"order": o}) for o in ORDERS if o != DecodeConfig.order}


def filling(study: Study, hole_BT: np.ndarray, blank_BKT: np.ndarray) -> dict[str, Any]:
    """What is decoded into holes, beside what was there and what is no edit."""
    true_BT = study.codes_BKT[:, 0]

    def judged(codes_BKT: np.ndarray) -> dict[str, Any]:
        right_BT = (codes_BKT[:, 0] == true_BT) & hole_BT
        inside_BKT = np.where(hole_BT[:, None], codes_BKT, study.codes_BKT)
        nll_BK = study.nll(inside_BKT, hole_BT, groups=4)
        kinds = [len(set(codes_KT[0][hole_T])) for codes_KT, hole_T in zip(codes_BKT, hole_BT)]
        return {
            "accuracy": study.by_clip(right_BT.sum(-1) / hole_BT.sum(-1)),
            "nll": study.by_clip(nll_BK.mean(-1)),
            "nll_first": study.by_clip(nll_BK[:, 0]),
            "kinds": float(np.mean(kinds / hole_BT.sum(-1))),
        }

    found = {"what was there": judged(study.codes_BKT)}
    for name, (editing, settings) in tqdm(ways().items(), "ways", leave=False):
        found[name] = judged(study.decoded(hole_BT, editing, **settings))
    shifted_BKT = np.roll(study.codes_BKT, 1, axis=0)
    return found | {"generated without the clip": judged(blank_BKT), "another": judged(shifted_BKT)}


def repairing(study: Study, picture: Path | None) -> dict[str, Any]:
    """Wrong tokens in the first codebook: whether they are found, and what becomes of them."""
    model, span = study.model, study.model.loaded.config.model.span_length
    count = study.num_clips
    codes_CKT, texts = study.codes_BKT[:count], study.texts[:count]
    rng = np.random.default_rng(study.seed)
    units = -(-codes_CKT.shape[-1] // span)
    wrong_CU = rng.random((count, units)).argsort(-1) < round(PLANTED * units)
    wrong_CT = np.repeat(wrong_CU, span, axis=-1)[:, : codes_CKT.shape[-1]]
    planted_CKT = codes_CKT.copy()
    planted_CKT[:, 0] = np.where(
        wrong_CT, rng.integers(0, model.loaded.config.model.codebook_size, wrong_CT.shape),
        codes_CKT[:, 0],
    )  # fmt: skip
    before_CKT = model.confidence(planted_CKT, texts)
    starts = np.arange(0, codes_CKT.shape[-1], span)
    doubt_CU = -np.add.reduceat(before_CKT[:, 0], starts, axis=-1)
    aucs = [
        metrics.tag_auc(doubt_U[:, None], wrong_U[:, None], resamples=0, seed=0).value
        for doubt_U, wrong_U in zip(doubt_CU, wrong_CU)
    ]
    model.generation = study.decode
    edit = model.repair(
        model.generate_audio(planted_CKT), model.sample_rate, texts, worst=0.1,
        tokens=planted_CKT, seed=study.seed,
    )  # fmt: skip
    after_CKT = model.confidence(edit.tokens_BKT, texts)
    worst_CKT = np.stack([free.worst(log_KT, 0.1, span) for log_KT in before_CKT])
    back_CT = edit.tokens_BKT[:, 0] == codes_CKT[:, 0]
    if picture is not None:
        from magnet_jax.edit import picture as drawing

        drawing.draw(
            picture, edit.clips[0].source.as_float().T, edit.as_float(0), edit.sample_rate,
            edit.changed[0], before_CKT[0], model.frame_rate,
        )  # fmt: skip

    def mean(values_C) -> metrics.Score:
        return metrics.mean(values_C, resamples=1000, seed=study.seed)

    return {
        "auc": mean(aucs),
        "planted_among_worst": float(worst_CKT[:, 0][wrong_CT].mean()),
        "gain": mean((after_CKT - before_CKT).mean((1, 2))),
        "clips_changed": int((edit.tokens_BKT != planted_CKT).any((1, 2)).sum()),
        "planted_away": float((edit.tokens_BKT[:, 0] != planted_CKT[:, 0])[wrong_CT].mean()),
        "planted_brought_back": float(back_CT[wrong_CT].mean()),
        "others_lost": float(1 - back_CT[~wrong_CT].mean()),
    }


def cost(study: Study) -> dict[str, Any]:
    """FLOPs and seconds from a text to the tokens of 2 s within a clip, and to those of it all."""
    first = study._replace(texts=study.texts[:1], codes_BKT=study.codes_BKT[:1])
    hole_BT = study.holes(min(2.0, study.codes_BKT.shape[-1] / 2 / study.model.frame_rate))[:1]
    found = {}
    for name, editing in (("an edit of 2 s", EditConfig()), ("the whole clip", None)):
        free_BT = hole_BT if editing else np.ones_like(hole_BT)
        batch = sampling.Batch(
            text=tokenize_texts(study.model.loaded, first.texts, None),
            sample_B=np.arange(1),
            seed=study.seed,
            canvas=canvas.Canvas(first.codes_BKT, np.repeat(~free_BT[:, None], 4, axis=1)),
            decoding=study.decode,
            editing=editing,
        )
        inputs, made_for = sampling.make_program(
            study.model.loaded, batch, placement.Execution(), platform=jax.default_backend(),
            mesh=None,
        )  # fmt: skip
        text = sampler.sample.lower(inputs, sampler=made_for).compile().as_text()
        calls = [seconds_of(lambda e=editing: first.decoded(hole_BT, e)) for _ in range(4)]
        found[name] = {
            "steps": sum(part.stage.size for part in inputs.schedule),
            "flops": hlo.work(text).flops,
            "seconds": min(calls[1:]),
        }
    return found


def shown(score: metrics.Score | float, digits: int = 2) -> str:
    """A figure, with its interval if it has one."""
    if not isinstance(score, metrics.Score):
        return f"{score:.{digits}f}"
    return f"{score.value:.{digits}f} ({score.low:.{digits}f} to {score.high:.{digits}f})"


def print_hole(seconds: float, read: dict[str, Any], filled: dict[str, Any]) -> None:
    print(f"\nhole of {seconds:g} s: nats a token of what was there, codebook by codebook")
    for above, nll_K in read["nll"].items():
        print(f"  above {above:8}", " ".join(f"{nll:6.3f}" for nll in nll_K))
    print("  shown costs", shown(read["shown_costs"], 3))
    print("  another clip's sides cost", ", ".join(map(shown, read["strange_sides_cost"])))
    print(f"  | {'decoded':26} | right, % | nats | nats, codebook 1 | unlike tokens |")
    print("  | --- | --- | --- | --- | --- |")
    for name, row in filled.items():
        right = metrics.Score(*(100 * x for x in row["accuracy"]))
        cells = shown(right, 1), shown(row["nll"]), shown(row["nll_first"]), shown(row["kinds"])
        print(f"  | {name:26} | {' | '.join(cells)} |", flush=True)


def measure(args: Editing) -> None:
    """Prints the figures as they come."""
    study = opened(args)
    args = dataclasses.replace(args, steps=study.decode.steps)
    print(f"{args.checkpoint}; steps {args.steps}; {', '.join(study.names)}", flush=True)
    found = {"arguments": dataclasses.asdict(args), "clips": study.names, "holes": {}}
    found["cost"] = cost(study)
    for name, row in found["cost"].items():
        print(
            f"{name:16} {row['steps']:3} steps {row['flops'] / 1e9:8.1f} GFLOP "
            f"{row['seconds']:7.2f} s"
        )
    found["repair"] = repairing(study, args.picture)
    for name, value in found["repair"].items():
        print(f"{name:22} {shown(value, 3)}", flush=True)
    blank_BKT = study.decoded(study.holes(args.holes[0]), None)
    for seconds in args.holes:
        hole_BT = study.holes(seconds)
        read, filled = reading(study, hole_BT), filling(study, hole_BT, blank_BKT)
        found["holes"][seconds] = {"read": read, "decoded": filled}
        print_hole(seconds, read, filled)
    if args.json is not None:
        with replacing_file(args.json) as file:
            file.write_text(json.dumps(found, indent=2, default=str) + "\n", encoding="utf-8")
