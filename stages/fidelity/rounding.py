"""The digits that results keep: beyond, they depend on how a linear algebra library adds up on this processor."""

from typing import Any

DIGITS = 6


def significant(value: float) -> str:
    """A number to six significant digits, as text."""
    return f"{value:.{DIGITS}g}"


def rounded(value: Any) -> Any:
    """A JSON value whose floats, however deep inside it, have six significant digits; whole numbers keep all."""
    if isinstance(value, float):
        return float(significant(value))
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return [rounded(inner) for inner in value] if isinstance(value, list | tuple) else value
