"""How errors show values, and tell what is wrong with one."""

from collections.abc import Callable
from typing import Any


def short(value: Any, show: Callable[[Any], str] = repr) -> str:
    """A value as an error shows it, cut where it is long."""
    try:
        return cut(show(value), 100)
    except ValueError:  # a whole number of thousands of digits
        return f"a {type(value).__name__} too long to show"


def cut(text: str, length: int) -> str:
    """The text, or its beginning where it is longer."""
    return text if len(text) <= length else f"{text[:length]}... ({len(text):,} characters)"


def explain(error: Any, section_at: Callable[[tuple[Any, ...]], Any]) -> str:
    """One line: the dotted key, what it holds, what is allowed.

    Args:
        error: of pydantic.
        section_at: the model at a location.
    """
    loc = error["loc"]
    key = ".".join(short(part, str) for part in _without_readers(loc))
    if error["type"] == "extra_forbidden":
        return f"{key} is not a known key; known here: {', '.join(section_at(loc[:-1]).model_fields)}"
    if error["type"] == "missing":
        return f"{key} is missing"
    if error["type"] == "value_error":
        return f"{key + ': ' if key else ''}{error['ctx']['error']}"
    if error["type"] == "invalid_key":
        return f"{key} is no text; keys must be names"
    return f"{key or 'the whole'} = {short(error['input'])}: {error['msg'][0].lower()}{error['msg'][1:]}"


def _without_readers(loc: tuple[Any, ...]) -> tuple[Any, ...]:
    """A pydantic location without the readers, which it names behind the dataset, and behind each dataset of a mix."""
    if loc[0:1] != ("data",):
        return loc
    return (*loc[:2], *loc[3:5], *loc[6:]) if loc[2:4] == ("mix", "of") else loc[:2] + loc[3:]
