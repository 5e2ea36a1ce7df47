"""Command lines for dataclasses: tyro's help, and one line for whatever is wrong.

It uses two private modules of tyro, whose release requirements.txt fixes: the events of what is
wrong, which tyro alone would print in boxes, and the rule that makes options of a dataclass.
"""

import dataclasses
import difflib
import functools
import inspect
import itertools
import re
import shutil
import sys
import textwrap
import typing
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, NamedTuple

import tyro
from tyro import _errors as events
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructTypeInfo
from tyro.constructors._struct_spec_dataclass import dataclass_rule

from magnet_jax import arguments
from magnet_jax.arguments import RARE
from magnet_jax.errors import UserError


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """' did you mean X?' of the known word that is nearest, or nothing."""
    known = list(known)
    group, _, name = word.lstrip("-").rpartition(".")
    # A name that holds the one given as a word, such as --optimizer.peak-lr of --optimizer.lr.
    holding = [
        other
        for other in known
        if name and name in re.split(r"[-.]", other) and other.lstrip("-").startswith(group)
    ]
    near = difflib.get_close_matches(word, holding or known, n=1, cutoff=0 if holding else 0.6)
    return f" did you mean {near[0]}?" if near else ""


def _members(cls: Any) -> Iterator[tuple[str, type]]:
    """The dataclasses of a union, each with the name of its subcommand; of one by itself, ''."""
    for member in typing.get_args(cls) if not isinstance(cls, type) else (cls,):
        names = [getattr(note, "name", None) for note in getattr(member, "__metadata__", ())]
        yield next(filter(None, names), ""), getattr(member, "__origin__", member)


class _Option(NamedTuple):
    """An option of a dataclass, or of one within it."""

    word: str  # as it is typed
    kind: Any
    is_rare: bool
    field: str  # such as data.batch_size


def _options(cls: type, prefix: str = "--", within: str = "") -> Iterator[_Option]:
    """Each option of a dataclass and of those within."""
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        notes = getattr(hint, "__metadata__", ())
        kind = hint.__origin__ if notes else hint
        named = [note for note in notes if getattr(note, "prefix_name", None) is False]
        option = "--" if named else prefix
        option += (named[0].name if named and named[0].name else name).replace("_", "-")
        if dataclasses.is_dataclass(kind):
            for one in _options(kind, option + ".", f"{within}{name}."):
                yield one._replace(is_rare=one.is_rare or RARE in notes)
        else:
            yield _Option(option, kind, RARE in notes, within + name)


def setting_names(cls: type) -> list[str]:
    """The options of a dataclass and of those within it, as tyro spells them."""
    return [option.word for option in _options(cls)]


def parse(
    cls: Any,
    args: Sequence[str] | None = None,
    *,
    prog: str,
    description: str | None = None,
    default: Any = tyro.MISSING,
) -> Any:
    """Reads a command line into `cls`, a dataclass or a union of dataclasses.

    Args:
      cls: what to read.
      args: the words; None is those of the process.
      prog, description: for the help.
      default: an instance whose values stand in for what is not given.

    Raises:
      UserError: an unknown option, with the nearest known one, or a value that does not fit.
    """
    words = list(sys.argv[1:] if args is None else args)
    asked = {"-h", "--help", "--help-all"} & set(words)
    hides = "--help-all" not in words
    words = ["--help" if word == "--help-all" else word for word in words]
    if asked:
        # tyro would run the lines together, and leave them as long as they get.
        within = {name for name, _ in _members(cls) if name} & set(words)
        text = "" if within else description or inspect.getdoc(cls) or ""
        _describe(text, hides=hides and _has_rare(cls))
    registry = ConstructorRegistry()
    registry.struct_rule(functools.partial(_fields, hides_rare=bool(asked) and hides))
    try:
        with events.on_parse_error(functools.partial(_refuse, cls, words)):
            return tyro.cli(
                cls,
                args=words,
                prog=prog,
                description="",
                registry=registry,
                **({} if default is tyro.MISSING else {"default": default}),
            )
    except UserError as error:
        raise UserError(_as_typed(cls, str(error))) from None


def _as_typed(cls: Any, message: str) -> str:
    """A message that begins with the name of a field, with its option in place of that."""
    field, space, rest = message.partition(" ")
    words = {one.field: one.word for _, member in _members(cls) for one in _options(member)}
    return f"{words[field]}{space}{rest}" if field in words and space else message


def _has_rare(cls: Any) -> bool:
    return any(option.is_rare for _, member in _members(cls) for option in _options(member))


def _describe(text: str, *, hides: bool) -> None:
    """Prints what a command does, as wide as the terminal; lines that are commands stay lines."""
    width = min(shutil.get_terminal_size().columns, 100)
    paragraphs = textwrap.dedent(text).strip().split("\n\n")
    paragraphs += ["--help-all shows the options that are rarely needed as well."] * hides
    for paragraph in filter(None, paragraphs):
        is_command = paragraph.lstrip().startswith("python -m")
        print(paragraph if is_command else textwrap.fill(paragraph, width), end="\n\n")


def _fields(info: StructTypeInfo, *, hides_rare: bool) -> StructConstructorSpec | None:
    """tyro's rule for dataclasses, with reflowed help, and no default where there is none."""
    spec = dataclass_rule(info)
    if spec is None:
        return None
    fields = []
    for field in spec.fields:
        kind: Any = field.type
        if hides_rare and RARE in getattr(kind, "__metadata__", ()):
            kind = tyro.conf.Suppress[kind]
        if field.default is None:  # and then nobody need say so
            kind = tyro.conf.DisallowNone[kind]
        if field.default is None or field.default in ("", ()):
            kind = Annotated[kind, tyro.conf.arg(help_behavior_hint="")]
        text = field.helptext
        text = functools.partial(_one_paragraph, text) if callable(text) else text
        fields.append(dataclasses.replace(field, type=kind, helptext=text))
    return dataclasses.replace(spec, fields=tuple(fields))


def _one_paragraph(read: Any) -> str | None:
    text = read()
    return text and " ".join(text.split())


# --- what is wrong, in one line ------------------------------------------------------------------


def _refuse(cls: Any, words: list[str], event: events.ParseErrorEvent) -> None:
    """Raises `UserError` in place of tyro's box."""
    unknown = getattr(event, "tokens", None) or getattr(event, "unrecognized_tokens", None)
    see = f"see {event.prog} --help"
    if unknown:
        raise UserError(_unknown(cls, unknown[0].partition("=")[0], see))
    if isinstance(event, events.MissingArgs):
        names = ", ".join(one.arg.display_name() for one in event.missing_arguments)
        raise UserError(f"{names}: must be given; {see}")
    if isinstance(event, events.MissingSubcommand):
        names = ", ".join(event.subcommand_spec.parser_from_name)
        raise UserError(f"give one of {names}; {see}")
    argument = getattr(event, "argument", None)
    if argument is None:
        return
    name = argument.display_name()
    given = _values(words, argument.lowered.name_or_flags)
    if not given and not name.startswith("-") and any(w.startswith("--") for w in words):
        raise UserError(f"{name}: must be given, by itself and without an option's name; {see}")
    if not given:
        raise UserError(f"{name}: a value is missing; {see}")
    near = did_you_mean(given, getattr(event, "choices", ()))
    wanted = arguments.wanted(argument.field.type)
    raise UserError(f"{name} must {wanted}, not {given!r}{':' * bool(near)}{near}")


def _unknown(cls: Any, word: str, see: str) -> str:
    commands = [name for name, _ in _members(cls) if name]
    if not word.startswith("-"):
        near = did_you_mean(word, commands)
        listed = f" there are {', '.join(commands)}" if commands else f" {see}"
        what = "command" if commands else "word"
        return f"unknown {what} {word}:{near or listed}"
    known = ["--help", "--help-all"]
    for _, member in _members(cls):
        for option, kind, *_ in _options(member):
            group, dot, name = option.removeprefix("--").rpartition(".")
            known += [option] + [f"--{group}{dot}no-{name}"] * (kind is bool)
    return f"unknown setting {word}:{did_you_mean(word, known) or f' {see}'}"


def _values(words: list[str], flags: Sequence[str]) -> str:
    """What was given to an option."""
    for i, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name.replace("_", "-") in flags:
            following = itertools.takewhile(lambda w: not w.startswith("--"), words[i + 1 :])
            return value if equals else " ".join(following)
    return ""
