"""What each study varies and what the paper found: the rows of its table."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

SPANS = (1, 3, 5)
PAPERS_SPANS = (3,)
GUIDANCES = ((1.0, 1.0), (3.0, 3.0), (10.0, 1.0), (20.0, 1.0))
FIRST_STEPS = (5, 10, 20, 50, 100)
OTHER_STEPS = (1, 5, 10, 20)
PROMPT_SECONDS = (0.0, 0.5, 1.0, 2.0)

MAGNET, HYBRID = "magnet-span3-local", "hybrid"
# What each model that is trained changes in the config, by the name of its runs, without the seed.
MODELS = {
    **{f"magnet-span{n}-local": {"span_length": n} for n in SPANS},
    **{f"magnet-span{n}-full": {"span_length": n, "local_context": 0} for n in SPANS},
    # As the paper has it; the first codebook of the recipe's models sees near frames alone.
    **{f"magnet-span{n}-paper": {"span_length": n, "first_context": 0} for n in PAPERS_SPANS},
}
CONTEXTS = ("restricted context", "full context")
FIRST_FULL = "restricted but in the first codebook"


class Setting(NamedTuple):
    """A row of a study: a model, and how it is sampled."""

    label: str
    """In the table."""
    line: str
    """Of the picture: rows of one line are joined; '' where nothing lies between them."""
    place: float | str
    """On the picture's horizontal axis."""
    cell: str
    """Of the folders of its cells, without the seed: what is made alike has one name in all
    studies."""
    model: str | None
    """Of `MODELS`, or `HYBRID`; None is --checkpoint."""
    options: tuple[str, ...] = ()
    """Of launch.sample, without the rescorer's path."""
    rescorer: str | None = None
    """The same, of a second model."""
    paper: Mapping[str, float] = {}
    """Scores in the paper by their names here."""


class Study(NamedTuple):
    """All that is compared in one table."""

    name: str
    title: str
    axis: str
    """What is varied, for the picture."""
    settings: tuple[Setting, ...]
    paper: str
    """Where the paper's numbers are from, or why there are none: a sentence or two."""

    @property
    def models(self) -> list[str]:
        """What is trained for it, each once."""
        asked = [name for row in self.settings for name in (row.model, row.rescorer) if name]
        return list(dict.fromkeys(asked))


def spans() -> Study:
    """Table 2."""
    paper = {1: (2.13, 3.07), 3: (0.61, 0.82), 5: (0.84, 1.13)}
    rows = []
    for span in SPANS:
        for context, words, fad in zip(("local", "full"), CONTEXTS, paper[span]):
            name = f"magnet-span{span}-{context}"
            label = f"span {span}, {words}"
            rows.append(Setting(label, words, span, name, name, paper={"fad": fad}))
    for span in PAPERS_SPANS:
        name = f"magnet-span{span}-paper"
        rows.append(Setting(f"span {span}, {FIRST_FULL}", FIRST_FULL, span, name, name))
    return Study(
        "spans",
        "Span length and restricted context (Table 2)",
        "frames in a masked span",
        tuple(rows),
        "Table 2: a model of 300 M parameters, clips of 10 s.",
    )


def guidance(own_steps: Sequence[int]) -> Study:
    """Table 6, for a model whose decoding steps are `own_steps`."""
    paper = {
        (1, 1): (3.95, 0.79, 0.13),
        (3, 3): (0.99, 0.60, 0.28),
        (10, 1): (0.61, 0.56, 0.31),
        (20, 1): (0.68, 0.56, 0.31),
    }
    rows = []
    for first, last in GUIDANCES:
        label = f"{first:g} to {last:g}"
        scores = dict(zip(("fad", "kl", "clap"), paper[first, last]))
        options = _decoding(own_steps, (first, last))
        rows.append(Setting(label, "", label, _cell(own_steps, (first, last)), None, options,
                            paper=scores))  # fmt: skip
    return Study(
        "guidance",
        "Guidance (Table 6)",
        "guidance at the first and the last step",
        tuple(rows),
        "Table 6: a model of 300 M parameters, clips of 10 s.",
    )


def steps(num_codebooks: int, own_guidance: tuple[float, float]) -> Study:
    """Fig. 7, for a model whose guidance is `own_guidance`."""
    schedules = {("first codebook", n): (n, *[10] * (num_codebooks - 1)) for n in FIRST_STEPS}
    schedules |= {("other codebooks", n): (20, *[n] * (num_codebooks - 1)) for n in OTHER_STEPS}
    paper = {(20, 10, 10, 10): 0.61, (10, 10, 10, 10): 0.65, (20, 5, 5, 5): 0.61}
    rows = []
    for (line, count), schedule in schedules.items():
        label = f"{line}: {count} ({', '.join(map(str, schedule))})"
        scores = {"fad": paper[schedule]} if schedule in paper else {}
        options = _decoding(schedule, own_guidance)
        rows.append(
            Setting(label, line, count, _cell(schedule, own_guidance), None, options, paper=scores)
        )
    return Study(
        "steps",
        "Decoding steps (Fig. 7)",
        "decoding steps of a codebook",
        tuple(rows),
        "Those that the text to Fig. 7 and Table 6 name, of a model of 300 M parameters and clips "
        "of 10 s; for (20, 1, 1, 1) it has an FAD 8 % above that of (20, 10, 10, 10).",
    )


def rescoring(weight: float) -> Study:
    """Table 3, and the autoregressive model alone."""
    rescored = Setting(
        "MAGNeT, rescored", "", "rescored", f"{MAGNET}-rescored{weight:g}", MAGNET,
        ("--rescorer-weight", str(weight)), HYBRID, {"fad": 3.3, "kl": 1.12, "clap": 0.31},
    )  # fmt: skip
    alone = {"fad": 3.7, "kl": 1.18, "clap": 0.30}
    return Study(
        "rescoring",
        "Rescoring (Table 3)",
        "model",
        (
            Setting("MAGNeT", "", "MAGNeT", MAGNET, MAGNET, paper=alone),
            rescored,
            Setting("autoregressive", "", "autoregressive", _prompted(None), HYBRID,
                    _prompt_words(None), paper={"fad": 3.1, "kl": 1.29, "clap": 0.31}),
        ),
        "Table 3, MAGNeT small, and Table 1, MusicGen small, which is the rescorer: 300 M "
        "parameters each, clips of 30 s.",
    )  # fmt: skip


def hybrid(prompt_seconds: Sequence[float], clip_seconds: float) -> Study:
    """Fig. 2c; the whole clip as prompt comes last."""
    rows = []
    for seconds in (*sorted(prompt_seconds), None):
        place = clip_seconds if seconds is None else seconds
        whole = " (the whole clip)" if seconds is None else ""
        rows.append(Setting(f"{place:g} s{whole}", "hybrid", place, _prompted(seconds), HYBRID,
                            _prompt_words(seconds)))  # fmt: skip
    return Study(
        "hybrid",
        "Prompts of a hybrid (Fig. 2c)",
        "seconds generated one step after another",
        tuple(rows),
        "Fig. 2c prints no numbers. In it FAD falls as the prompt grows, and from a prompt of 1 s "
        "on, of clips of 30 s, it is below the autoregressive model's.",
    )


def _decoding(steps: Sequence[int], guidance: tuple[float, float]) -> tuple[str, ...]:
    first, last = guidance
    return (
        "--decode.steps", *map(str, steps),
        "--decode.max-guidance", str(first), "--decode.min-guidance", str(last),
    )  # fmt: skip


def _cell(steps: Sequence[int], guidance: tuple[float, float]) -> str:
    first, last = guidance
    return f"given-steps{'-'.join(map(str, steps))}-guidance{first:g}to{last:g}"


def _prompted(seconds: float | None) -> str:
    return f"{HYBRID}-whole" if seconds is None else f"{HYBRID}-prompt{seconds:g}"


def _prompt_words(seconds: float | None) -> tuple[str, ...]:
    # (launch.sample takes more than the clip's length for all of it)
    return ("--prompt-seconds", "600" if seconds is None else f"{seconds:g}")
