"""What can be asked for: the fields of each request, for HTTP, the page and the engine alike."""

from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticSerializationError

from magnet_jax.config import Preset
from magnet_jax.errors import UserError
from magnet_jax.prompts import MOST_SECTIONS, MOST_TEXTS, Description, Prompt

Share = Annotated[float, Field(ge=0, le=1)]
Seconds = Annotated[float, Field(gt=0, le=3600)]
Seed = Annotated[int, Field(ge=0, le=2**31 - 1)]
Format = Literal["wav", "flac", "mp3"]
# A text and its weight; a second, and the text or the blend of texts from there on.
Weighted = Annotated[list[str | float], Field(min_length=2, max_length=2)]
Blend = Annotated[list[Weighted], Field(min_length=1, max_length=MOST_TEXTS)]
Timed = Annotated[list[float | str | Blend], Field(min_length=2, max_length=2)]
Region = Annotated[list[Annotated[float, Field(ge=0)] | None], Field(min_length=2, max_length=2)]


def alias(*names: str, **more: Any) -> Any:
    """A field that has other names as well, those of similar services."""
    return Field(validation_alias=AliasChoices(*names), **more)


class Request(BaseModel):
    """What all requests have in common. What is null, or left out, is the model's default."""

    # A misspelt field is an error; a number in quotes is not a number.
    model_config = ConfigDict(
        extra="forbid", strict=True, populate_by_name=True, allow_inf_nan=False
    )

    model: str | None = Field(None, description="One of /v1/models; null is the one there is.")
    seed: Seed | None = Field(
        None, description="Clip i depends on it, on i and on the request; null draws one."
    )
    preset: Preset | None = Field(None, description="Decoding steps by name.")
    steps: list[Annotated[int, Field(ge=1, le=1000)]] | None = Field(
        None, description="Decoding steps of each codebook."
    )
    temperature: Annotated[float, Field(ge=0, le=1e6)] | None = None
    top_p: Share | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    guidance: list[Annotated[float, Field(ge=-1000, le=1000)]] | None = Field(
        None,
        alias="guidance",
        validation_alias=AliasChoices("guidance", "guidance_scale"),
        min_length=1,
        max_length=2,
        description="Guidance where nothing is known of a clip, and where all is; one number is "
        "the first.",
    )
    blend: Blend | None = Field(None, description="Texts with weights, in place of one text.")
    timeline: list[Timed] | None = Field(
        None,
        min_length=1,
        max_length=MOST_SECTIONS,
        description="Seconds, the first one 0, and the text or the blend from there on.",
    )
    text_fade: Annotated[float, Field(ge=0, le=60)] = Field(
        1.0, description="Seconds in which one text of a timeline gives way to the next."
    )
    negative_prompt: str = Field("", description="What a clip is not to sound like.")
    response_format: Format = "wav"
    confidence: bool = Field(False, description="Tell how sure the model is, frame by frame.")
    deterministic: bool = Field(
        False, description="Make the clips one at a time: the last bit depends on no other request."
    )
    asynchronous: bool = Field(
        False,
        alias="async",
        validation_alias=AliasChoices("async", "asynchronous"),
        description="Answer with a job at once.",
    )

    @model_validator(mode="before")
    @classmethod
    def _known(cls, values: Any) -> Any:
        if isinstance(values, dict):
            if values.get("num_inference_steps") is not None:
                raise ValueError(
                    "num_inference_steps: steps are given for each codebook here: give steps, such "
                    "as [20, 10, 10, 10], or a preset"
                )
            values = {k: v for k, v in values.items() if k != "num_inference_steps"}
            for name in ("guidance", "guidance_scale"):
                if isinstance(values.get(name), int | float) and not isinstance(values[name], bool):
                    values[name] = [values[name]]
        return values

    @model_validator(mode="after")
    def _steps_or_preset(self) -> "Request":
        if self.preset is not None and self.steps is not None:
            raise ValueError("steps: give steps or a preset, not both")
        given = [name for name in ("input", "blend", "timeline") if getattr(self, name, None)]
        if len(given) > 1:
            raise ValueError(f"{given[1]}: give {given[0]} or {given[1]}, not both")
        try:
            self.description  # noqa: B018 (which says what is wrong)
        except UserError as error:
            raise ValueError(str(error)) from None
        try:
            self.model_dump_json()
        except PydanticSerializationError:
            raise ValueError("a text is not valid Unicode: it holds half a character") from None
        return self

    @property
    def description(self) -> Description | None:
        """What steers the clips; None, of an edit, is what is kept with the clip."""
        words = self.timeline or self.blend or getattr(self, "input", None)
        if not self.negative_prompt and (words is None or isinstance(words, str)):
            return words
        return Prompt(words, negative=self.negative_prompt, fade=self.text_fade)


class Result(BaseModel):
    """A clip of a job that is done."""

    model_config = ConfigDict(extra="forbid", strict=True)
    id: str
    index: Annotated[int, Field(ge=0, le=1000)] = 0


class Fresh(Request):
    """What all requests of new clips have in common."""

    n: Annotated[int, Field(ge=1)] = Field(1, description="Clips to make.")
    lufs: Annotated[float, Field(ge=-70, le=0)] | None = Field(
        -14.0, description="Loudness; null keeps the level that the model gives."
    )


class Generate(Fresh):
    """A clip of a text."""

    input: str = alias("input", "prompt", default="", description="The text; empty is none.")
    seconds: Seconds | None = alias("seconds", "audio_length", default=None)
    windows: Literal["sliding", "anchors", "joint"] = Field(
        "sliding", description="How clips longer than the model hears at once are made."
    )
    preview: bool = Field(
        False, description="Let the first codebook that sounds be heard as soon as it is there."
    )


class Loop(Fresh):
    """A loop of a text: a clip whose end leads to its beginning, as long as its bars."""

    input: str = alias("input", "prompt", default="", description="The text; empty is none.")
    bpm: Annotated[float, Field(ge=20, le=400)] | None = Field(
        None, description="Quarters a minute: the loop's length, which the model is not told."
    )
    bars: Annotated[int, Field(ge=1, le=1024)] | None = Field(
        None, description="As many of 8, 4, 2 or 1 as the model hears at once, where it is null."
    )
    beats_per_bar: Annotated[int, Field(ge=1, le=16)] = 4
    seconds: Seconds | None = alias(
        "seconds", "audio_length", default=None, description="The length, in place of bpm and bars."
    )
    response_format: Literal["wav", "flac"] = Field(
        "wav", description="MP3 would add silence to the loop."
    )
    start_file: str | None = Field(None, description="Id of an upload that loops begin with.")
    start_job: Result | None = Field(None, description="The same of a clip that was made here.")
    start_seconds: Seconds | None = None

    @model_validator(mode="after")
    def _one_start(self) -> "Loop":
        given = (self.start_file is not None) + (self.start_job is not None)
        if given > 1:
            raise ValueError("start_file: give start_file or start_job, not both")
        if not given and self.start_seconds is not None:
            raise ValueError("start_seconds: needs start_file or start_job")
        return self


class Source(Request):
    """What is edited: an uploaded file, or a clip of a job, whose tokens are known."""

    file: str | None = Field(None, description="Id of an upload.")
    job: Result | None = Field(None, description="A clip that was made here.")
    input: str | None = alias(
        "input",
        "prompt",
        default=None,
        description="Text of what is made anew; null is the clip's.",
    )
    edge: Literal["outside", "inside"] | None = Field(
        None,
        description="outside makes all of a region new and changes a little around it, inside "
        "changes no sample outside it.",
    )
    fade: Annotated[float, Field(ge=0, le=10)] | None = None
    side: Literal["fade", "keep"] | None = None

    @model_validator(mode="after")
    def _one_source(self) -> "Source":
        if (self.file is None) == (self.job is None):
            raise ValueError("file: give file, the id of an upload, or job, and not both")
        return self


class Inpaint(Source):
    """Makes regions anew."""

    regions: list[Region] = Field(
        min_length=1,
        max_length=100,
        description="Begin and end in seconds; an end of null is the clip's.",
    )
    codebooks: list[Annotated[int, Field(ge=0, le=100)]] | None = None


class Extend(Source):
    """Makes a clip longer."""

    before: Annotated[float, Field(ge=0, le=3600)] = 0.0
    after: Annotated[float, Field(ge=0, le=3600)] = 0.0
    context: Annotated[float, Field(gt=0, le=1e6)] | None = None


class Between(Source):
    """Joins two clips."""

    then_file: str | None = None
    then_job: Result | None = None
    seconds: Seconds

    @model_validator(mode="after")
    def _one_end(self) -> "Between":
        if (self.then_file is None) == (self.then_job is None):
            raise ValueError("then_file: give then_file or then_job, and not both")
        return self


class Restyle(Source):
    """Gives a clip another style, that of the text."""

    input: str | None = alias("input", "prompt", default=None, description="The new style.")
    strength: Share = 0.5
    how: Literal["spans", "replay"] = "spans"
    original: str | None = Field(None, description="For replay, the text that the clip has now.")

    @model_validator(mode="after")
    def _a_style(self) -> "Restyle":
        if not (self.input or self.blend or self.timeline):
            raise ValueError("input: give the new style, as input, blend or timeline")
        return self


class Vary(Source):
    """Makes siblings of a clip."""

    n: Annotated[int, Field(ge=1)] = 4
    variation: Share = 0.3


class Repair(Source):
    """Makes anew what the model finds least likely."""

    worst: Share = 0.1
    rounds: Annotated[int, Field(ge=1, le=10)] = 1


KINDS: dict[str, type[Request]] = {
    "generate": Generate,
    "loop": Loop,
    "inpaint": Inpaint,
    "extend": Extend,
    "between": Between,
    "restyle": Restyle,
    "vary": Vary,
    "repair": Repair,
}


def kind_of(request: Request) -> str:
    return next(kind for kind, cls in KINDS.items() if type(request) is cls)
