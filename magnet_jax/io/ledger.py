"""What work was begun with, in one small file: who goes on with it must say the same.

`claim` writes the file, or holds the settings to it. Settings are JSON, and those within others
are named with dots: 'decode.steps'. A place that is no folder uses `note` and `check`.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from magnet_jax.errors import UserError
from magnet_jax.io.files import few, not_half_written, write_text
from magnet_jax.io.trees import flatten

_ADVICE = "use the same, or name another --out"
_MOST = 40  # characters that are shown of a value


def claim(
    path: Path,
    settings: Mapping[str, Any],
    *,
    free: Collection[str] = (),
    where: str = "",
    advice: str = _ADVICE,
) -> bool:
    """Notes in a file what work is begun with; True if it was not there before.

    A kill leaves no file or a whole one. Who may begin at the same time holds a lock.

    Args:
      path: the file.
      settings: what is to be the same whenever the work goes on.
      free: names of settings that are noted, but may change.
      where: what messages call the work; by default its folder, as --out.
      advice: what messages say can be done.

    Raises:
      UserError: the file notes other settings, is damaged, or cannot be read or written.
    """
    where = where or f"--out {path.parent}"
    try:
        found = path.read_bytes()
    except FileNotFoundError:
        with not_half_written(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, note(settings))
        return True
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    check(found, settings, free=free, where=where, name=path.name, advice=advice)
    return False


def note(settings: Mapping[str, Any]) -> str:
    """What a file notes of settings."""
    return json.dumps(settings, indent=2) + "\n"


def check(
    found: bytes | str,
    settings: Mapping[str, Any],
    *,
    where: str,
    name: str,
    free: Collection[str] = (),
    advice: str = _ADVICE,
) -> None:
    """Raises `UserError` for settings that are not those noted in the file `name`; see `claim`."""
    try:
        before = json.loads(found)
        changes = changed(before, settings, free)
    except (ValueError, AttributeError, RecursionError):
        raise UserError(f"{where}: its {name} is damaged; name another --out") from None
    if changes:
        told = few(list(changes.values()), 3)
        raise UserError(f"{where}: begun with other settings: {told}; {advice}")


def changed(
    before: Mapping[str, Any], now: Mapping[str, Any], free: Collection[str] = ()
) -> dict[str, str]:
    """The names of settings that differ, each with 'name (was x, now y)'.

    before: as it was read of JSON; a setting that it lacks is the same as null.
    """
    flat_before, flat_now = flatten(before, separator="."), flatten(_plain(now), separator=".")
    return {
        name: f"{name} (was {_shown(flat_before, name)}, now {_shown(flat_now, name)})"
        for name in dict.fromkeys([*flat_now, *flat_before])
        if name not in free and flat_before.get(name) != flat_now.get(name)
    }


def _plain(settings: Mapping[str, Any]) -> Any:
    """As JSON has it: lists for tuples."""
    return json.loads(json.dumps(settings))


def _shown(settings: Mapping[str, Any], name: str) -> str:
    if name not in settings:
        return "not given"
    text = json.dumps(settings[name], ensure_ascii=False)
    return text if len(text) <= _MOST else f"{text[: _MOST - 3]}..."
