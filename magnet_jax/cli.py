"""Command lines for dataclasses: tyro's help, and one line for whatever is wrong."""

import contextlib
import dataclasses
import difflib
import io
import re
import typing
from collections.abc import Sequence
from typing import Any

import tyro

from magnet_jax.errors import UserError


def setting_names(cls: type, prefix: str = "--") -> list[str]:
    """The options of a dataclass and of those within it, as tyro spells them."""
    names = []
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        notes = getattr(hint, "__metadata__", ())
        arg = next((note for note in notes if hasattr(note, "prefix_name")), None)
        option = "--" if arg and arg.prefix_name is False else prefix
        option += (arg and arg.name or name).replace("_", "-")
        hint = getattr(hint, "__origin__", hint) if notes else hint
        nested = dataclasses.is_dataclass(hint)
        names += setting_names(hint, option + ".") if nested else [option]
    return names


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
    if description is not None:  # (tyro runs lines together: each command gets a paragraph)
        description = re.sub(r" \\\n\s+", " ", description)
        description = re.sub(r"(?<!\n)\n(?=python -m )", "\n\n", description)
    complaint = io.StringIO()
    keywords = {} if default is tyro.MISSING else {"default": default}
    try:
        with contextlib.redirect_stderr(complaint):
            parsed, unknown = tyro.cli(
                cls,
                args=args,
                prog=prog,
                description=description,
                return_unknown_args=True,
                **keywords,
            )
    except SystemExit as exit_:
        if not exit_.code:  # help was asked for and given
            raise
        raise UserError(_in_one_line(complaint.getvalue(), prog)) from None
    if unknown:
        known = setting_names(type(parsed))
        near = difflib.get_close_matches(unknown[0].split("=")[0], known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"see {prog} --help"
        raise UserError(f"unknown setting {unknown[0]}: {hint}")
    return parsed


def _in_one_line(complaint: str, prog: str) -> str:
    """What tyro says in a box, without the help of the options, which it adds."""
    complaint = complaint.partition("│ ───")[0]
    # A missing option stands at the margin, and its help is indented further.
    if missing := re.findall(r"^│ {5}(\S+)", complaint, re.MULTILINE):
        return f"{', '.join(missing)}: must be given; see {prog} --help"
    text = " ".join(re.sub("[╭╮╰╯│─]", " ", complaint).split())
    text = re.sub(r"^(Parsing error|Value error|Invalid choice|Missing \w+) ", "", text)
    return re.sub(r" Got errors:.*", "", text)
