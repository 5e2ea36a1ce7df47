"""What users give, held to the types that the code declares: one line for whatever is wrong.

`checked` does it for a function's arguments, `check_fields` for a dataclass. The types carry their
limits, as in `Annotated[float, Between(0, 1)]`, so that a limit stands in one place; or a function
that brings a value and its name to what is wanted, as in `Annotated[np.ndarray, as_array]`.
"""

import dataclasses
import functools
import inspect
import math
import os
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from magnet_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Between:
    """Limits of a number; both belong to it, but for `low` where `above` is set."""

    low: float
    high: float
    above: bool = False
    words: str = ""
    """What the number must do, where the limits alone would read badly."""

    def holds(self, value: float) -> bool:
        return (self.low < value if self.above else self.low <= value) and value <= self.high


Index = Annotated[int, Between(0, 2**63 - 1)]
Seed = Annotated[int, Between(0, 2**31 - 1)]
# Longer clips, and more of them at once, take more memory than any machine has.
Seconds = Annotated[
    float, Between(0, 600, above=True, words="be a positive number, and at most 600")
]
MOST_CLIPS = 1024
# A note for `Annotated`: an option, or a group of them, that --help-all alone shows.
RARE = "rarely used"
Count = Annotated[int, Between(1, MOST_CLIPS)]


def check(hint: Any, value: Any, name: str) -> Any:
    """The value as the type `hint` has it.

    Numbers may be NumPy's, or arrays and tensors without an axis; a number with a fraction is no
    whole one, and a truth value is no number.

    Raises `UserError`, which calls the value `name`.
    """
    if typing.get_origin(hint) in (typing.Union, types.UnionType) and value is not None:
        others = [option for option in typing.get_args(hint) if option is not type(None)]
        hint = others[0] if len(others) == 1 else hint
    for note in getattr(hint, "__metadata__", ()):
        if isinstance(note, types.FunctionType):
            return note(value, name)
    try:
        return _converted(hint, value)
    except ValueError:
        raise UserError(f"{name} must {wanted(hint)}, not {shown(value)}") from None


def check_fields(instance: Any, prefix: str) -> None:
    """Brings the fields of a dataclass to their types; messages put `prefix` before the names.

    After the prefix '--' names are spelled as options.
    """
    for name, hint in _hints(type(instance)).items():
        spelled = _option_of(name, hint) if prefix == "--" else name
        value = check(hint, getattr(instance, name), prefix + spelled)
        object.__setattr__(instance, name, value)  # which works on frozen ones as well


def _option_of(name: str, hint: Any) -> str:
    """How the command line calls a field: by its name, or as a note of tyro's says."""
    notes = getattr(hint, "__metadata__", ())
    return next(filter(None, (getattr(n, "name", None) for n in notes)), name.replace("_", "-"))


def checked(function: Callable) -> Callable:
    """Brings the arguments of each call to the types that `function` declares.

    Raises `UserError` for what does not fit, and for arguments that are unknown or missing.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args, **keywords):
        try:
            bound = signature.bind(*args, **keywords)
        except TypeError as error:
            raise UserError(f"{function.__name__}: {error}") from None
        hints = _hints(function)
        for name, value in bound.arguments.items():
            left_out = value is None and signature.parameters[name].default is None
            if name in hints and not left_out:
                bound.arguments[name] = check(hints[name], value, name)
        return function(*bound.args, **bound.kwargs)

    return call


def as_array(value: Any, name: str) -> np.ndarray:
    """Numbers as a NumPy array; bfloat16, which NumPy lacks, as float32.

    Raises `UserError`, which calls them `name`.
    """
    try:
        array = np.asarray(value)
    except Exception as error:  # ragged lists, tensors on accelerators or with gradients
        tensor = hasattr(value, "detach")
        hint = f"; give {name}.detach().cpu().float()" if tensor else ""
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{name} cannot be made a NumPy array ({reason}){hint}") from None
    if array.dtype.name == "bfloat16":
        return array.astype(np.float32)
    if array.dtype.kind not in "biufc":
        raise UserError(f"{name} must be an array of numbers, not {shown(value)}")
    return array


def as_name(value: Any, name: str) -> str | Path:
    """A path, or another name of a folder, that a file system can take.

    Raises `UserError`, which calls it `name`.
    """
    path = check(str | Path, value, name)
    encoded = os.fsencode(path)
    if not encoded or b"\0" in encoded or any(len(part) > 255 for part in encoded.split(b"/")):
        raise UserError(f"{name} must be a name that a file can have, not {shown(value)}")
    return path


def as_rate(value: Any, name: str) -> int:
    """Samples per second, a whole number also where a library gives it as a float: 44100.0.

    Raises `UserError`, which calls it `name`.
    """
    try:
        rate = _scalar(float, (), Between(1, 10_000_000), value)
        return int(_required(rate.is_integer(), rate))
    except ValueError:
        range_ = "be a whole number from 1 to 10000000"
        raise UserError(f"{name} must {range_}, not {shown(value)}") from None


@functools.cache
def _hints(owner: Any) -> dict[str, Any]:
    return typing.get_type_hints(owner, include_extras=True)


def _unpacked(hint: Any) -> tuple[Any, tuple, Between | None]:
    """What a type is of, its parts, and the limits that it carries."""
    limits = None
    if typing.get_origin(hint) is Annotated:
        hint, *notes = typing.get_args(hint)
        # A type with limits that is given others has these, which come last.
        limits = next((note for note in reversed(notes) if isinstance(note, Between)), None)
    return typing.get_origin(hint) or hint, typing.get_args(hint), limits


def _converted(hint: Any, value: Any) -> Any:
    """The value as the type has it; raises `ValueError` where it does not fit."""
    origin, options, limits = _unpacked(hint)
    if origin in (typing.Union, types.UnionType):
        return _first_fit(options, value)
    if origin is tuple and options[1:] != (...,):
        _required(isinstance(value, list | tuple) and len(value) == len(options), value)
        return tuple(_converted(one, item) for one, item in zip(options, value))
    if origin is tuple:
        return _items(options[0], value)
    if origin is Callable:
        return _required(callable(value), value)
    if origin in (str, Path):
        return _text(origin, value)
    if origin in (bool, int, float, Literal):
        return _scalar(origin, options, limits, value)
    if isinstance(origin, type) and origin is not Any:
        return _required(isinstance(value, origin), value)
    return value  # of Any


def _required(condition: bool, value: Any) -> Any:
    if not condition:
        raise ValueError
    return value


def _first_fit(options: tuple, value: Any) -> Any:
    for option in options:
        try:
            return _converted(option, value)
        except ValueError:
            continue
    raise ValueError


def _items(hint: Any, values: Any) -> tuple:
    if hasattr(values, "ndim"):
        _required(values.ndim == 1, values)
    else:
        _required(isinstance(values, list | tuple | range), values)
    return tuple(_converted(hint, value) for value in values)


def _text(kind: type, value: Any) -> Any:
    """A text or a path; half of a surrogate pair stands in neither."""
    _required(isinstance(value, str if kind is str else str | os.PathLike), value)
    os.fsencode(value)  # raises a UnicodeError, which is a ValueError
    return kind(value)


def _scalar(kind: Any, options: tuple, limits: Between | None, value: Any) -> Any:
    if hasattr(value, "ndim") and hasattr(value, "item"):
        _required(value.ndim == 0, value)
        try:
            value = value.item()
        except Exception:  # of a tensor without data, say
            raise ValueError from None
        value = float(value) if isinstance(value, np.floating) else value  # of long doubles
    if kind is Literal:
        return _required(any(type(value) is type(o) and value == o for o in options), value)
    if kind is bool:
        return _required(type(value) is bool, value)
    _required(isinstance(value, int if kind is int else int | float), value)
    _required(
        not isinstance(value, bool) and (isinstance(value, int) or math.isfinite(value)), value
    )
    _required(limits is None or limits.holds(value), value)
    try:
        return kind(value)
    except OverflowError:  # an int beyond all floats
        raise ValueError from None


def wanted(hint: Any) -> str:
    """What a value of the type must do, in words: 'be ...' or 'lie ...'."""
    origin, options, limits = _unpacked(hint)
    if origin in (typing.Union, types.UnionType):
        first, *others = (wanted(o) for o in options if o is not type(None))
        if first.startswith("be "):
            others = [other.removeprefix("be ") for other in others]
        return " or ".join([first, *others])
    if origin is Literal:
        return f"be one of {', '.join(map(str, options))}" if options[1:] else f"be {options[0]!r}"
    if origin is tuple and options[1:] != (...,):
        return f"be {len(options)} values that must {', '.join(map(wanted, options))}"
    if origin is tuple:
        return f"be a list whose items must {wanted(options[0])}"
    if origin is Callable:
        return "be a function"
    if origin in (int, float) and limits is not None:
        return _within(origin, limits)
    names = {bool: "True or False", int: "a whole number", float: "a number", str: "a text",
             Path: "a path"}  # fmt: skip
    return f"be {names.get(origin) or 'a ' + getattr(origin, '__name__', str(origin))}"


def _within(kind: type, limits: Between) -> str:
    low, high = (f"{x:.10g}" for x in (limits.low, limits.high))
    if limits.words:
        return limits.words
    if kind is int and limits.low > 0:
        return f"be a whole number from {low} to {high}"
    whole = " and be a whole number" if kind is int else ""
    return (
        f"lie above {low} and up to {high}"
        if limits.above
        else (f"lie between {low} and {high}{whole}")
    )


def shown(value: Any) -> str:
    """The value on one line, and not all of a long one."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # whatever the object's own code does
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:80]}..."


def check_samples(wav_BCN: np.ndarray, name: str) -> None:
    """Raises `UserError`, which calls them `name`, for samples that are no audio [B, C, N]."""
    _, channels, count = wav_BCN.shape
    if channels > count:
        raise UserError(
            f"{name} has {channels} channels of {count} samples: channels come before samples "
            "here, unlike in soundfile; transpose it"
        )
    if not np.isfinite(wav_BCN).all():
        raise UserError(f"{name} holds NaN or infinite samples")


Array = Annotated[np.ndarray, as_array]
Rate = Annotated[int, as_rate]
