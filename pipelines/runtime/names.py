"""Names that a person types: the nearest one for a slip, and the whole of one by how it begins."""

import difflib
from collections.abc import Iterable, Sequence

from ddpm_core.errors import InputError


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """The nearest of some names as a part of a sentence, nothing if none is near."""
    near = difflib.get_close_matches(given, list(known), n=1, cutoff=0.6)
    return f" (did you mean {near[0]}?)" if near else ""


def by_prefix(given: str, known: Sequence[str], what: str) -> str | None:
    """The one of some names that is `given`, or begins with it, or whose fingerprint does: the part behind the last dash. None if
    there is none. Raises InputError if there are several."""
    if given in known or not given:
        return given or None
    matching = [name for name in known if name.startswith(given) or name.rpartition("-")[2].startswith(given)]
    if len(matching) > 1:
        raise InputError(f"{what} {given!r} may be {' or '.join(sorted(matching))}: give more of its name")
    return matching[0] if matching else None
