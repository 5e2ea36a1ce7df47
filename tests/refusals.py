"""Words of a command line that are refused: in one line, which names what was given."""

import contextlib
from collections.abc import Iterator, Sequence

import pytest

from magnet_jax.errors import UserError


@contextlib.contextmanager
def refused(words: Sequence[str], match: str) -> Iterator[None]:
    """Expects a `UserError` that matches, and names an option among the words, or its value."""
    with pytest.raises(UserError, match=match) as caught:
        yield
    line = str(caught.value)
    assert "\n" not in line
    names = [word.lstrip("-").split(".") for word in words if word.startswith("--")]
    values = [word for word in words if len(word) > 3 and not word.startswith("--")]
    plain = line.replace("_", "-")
    named = any(all(part in plain for part in name) for name in names)
    assert not words or named or any(value in line for value in values), line
