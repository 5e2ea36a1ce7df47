"""What each study varies and what the paper found: the rows of its table."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

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
    place: float | str
    """On the picture's horizontal axis."""
    cell: str
    """Of the folders of its cells, without the seed: what is made alike has one name in all
    studies."""
    model: str | None
    """Of `MODELS`, or `HYBRID`; None is --checkpoint."""
    options: tuple[str, ...] = ()
    """Of launch.sample, without the rescorer's path."""
    line: str = ""
    """Of the picture: rows of one line are joined; '' where nothing lies between them."""
    rescorer: str | None = None
    """A second model, as `model`."""
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
            rows.append(Setting(label, span, name, name, line=words, paper={"fad": fad}))
    for span in PAPERS_SPANS:
        name = f"magnet-span{span}-paper"
        rows.append(Setting(f"span {span}, {FIRST_FULL}", span, name, name, line=FIRST_FULL))
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
        rows.append(_sampled(label, label, own_steps, (first, last), paper=scores))
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
        rows.append(_sampled(label, count, schedule, own_guidance, line=line, paper=scores))
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
    papers = ((3.7, 1.18, 0.30), (3.3, 1.12, 0.31), (3.1, 1.29, 0.31))
    magnet, rescored, alone = (dict(zip(("fad", "kl", "clap"), row)) for row in papers)
    rows = (
        Setting("MAGNeT", "MAGNeT", MAGNET, MAGNET, paper=magnet),
        Setting(
            "MAGNeT, rescored",
            "rescored",
            f"{MAGNET}-rescored{weight:g}",
            MAGNET,
            ("--rescorer-weight", str(weight)),
            rescorer=HYBRID,
            paper=rescored,
        ),
        _begun("autoregressive", "autoregressive", None)._replace(paper=alone),
    )
    return Study(
        "rescoring",
        "Rescoring (Table 3)",
        "model",
        rows,
        "Table 3, MAGNeT small, and Table 1, MusicGen small, which is the rescorer: 300 M "
        "parameters each, clips of 30 s.",
    )


def hybrid(prompt_seconds: Sequence[float], clip_seconds: float) -> Study:
    """Fig. 2c; the whole clip as prompt comes last."""
    rows = [_begun(f"{s:g} s", s, s) for s in sorted(prompt_seconds)]
    rows.append(_begun(f"{clip_seconds:g} s (the whole clip)", clip_seconds, None))
    return Study(
        "hybrid",
        "Prompts of a hybrid (Fig. 2c)",
        "seconds generated one step after another",
        tuple(row._replace(line="hybrid") for row in rows),
        "Fig. 2c prints no numbers. In it FAD falls as the prompt grows, and from a prompt of 1 s "
        "on, of clips of 30 s, it is below the autoregressive model's.",
    )


def _sampled(
    label: str,
    place: float | str,
    steps: Sequence[int],
    guidance: tuple[float, float],
    **more: Any,
) -> Setting:
    """A given model with these decoding steps and this guidance."""
    first, last = guidance
    cell = f"given-steps{'-'.join(map(str, steps))}-guidance{first:g}to{last:g}"
    options = ("--decode.steps", *map(str, steps), "--decode.max-guidance", str(first),
               "--decode.min-guidance", str(last))  # fmt: skip
    return Setting(label, place, cell, None, options, **more)


def _begun(label: str, place: float | str, seconds: float | None) -> Setting:
    """A hybrid that makes so much of a clip one step after another; None is all of it."""
    cell = f"{HYBRID}-whole" if seconds is None else f"{HYBRID}-prompt{seconds:g}"
    # launch.sample takes more than the clip's length for all of it.
    options = ("--prompt-seconds", "600" if seconds is None else f"{seconds:g}")
    return Setting(label, place, cell, HYBRID, options)
