"""Whether an answer is its reference: as text, or as a JSON object, field by field. No JAX."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any


def parse_object(text: str) -> dict[str, Any] | None:
    """The JSON object a text consists of, or None if it is anything else.

    `NaN` and `Infinity` are not JSON. An object that names a field twice is refused too, at any depth: which of the
    two values a reader takes is not defined (RFC 8259, section 4).

    Example:

    >>> parse_object('{"a": 1}'), parse_object("[1]"), parse_object('{"a": NaN}'), parse_object('{"a": 1, "a": 1}')
    ({'a': 1}, None, None, None)
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_json)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a field is named twice")
    return found


def _no_json(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def json_equal(one: Any, other: Any) -> bool:
    """Whether two parsed JSON values are the same value of the same JSON type, at any depth.

    JSON has one type of numbers, so 1 equals 1.0. `true` is no number, and text is none either: in Python `True == 1`.

    Example:

    >>> json_equal({"a": [1]}, {"a": [1.0]}), json_equal(True, 1), json_equal("1", 1)
    (True, False, False)
    """
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(json_equal(value, other[name]) for name, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(json_equal, one, other))
    return one == other


def is_match(answer: str, reference: str) -> bool:
    """Whether an answer equals its reference: as JSON objects where the reference is one, else as stripped text."""
    expected = parse_object(reference)
    if expected is None:
        return answer.strip() == reference.strip()
    try:
        return json_equal(parse_object(answer), expected)
    except RecursionError:  # nested more deeply than Python calls
        return answer.strip() == reference.strip()


def exact_match(answers: Sequence[str], references: Sequence[str]) -> float:
    """The share of answers that equal their reference, 0 to 1.

    Args:
        answers: Generated texts.
        references: The right ones. A JSON object is compared field by field, order and white space aside.

    Raises:
        ValueError: If the lengths differ or are 0.

    Example:

    >>> exact_match(['{"a": 1,  "b": 2}', "x"], ['{"b": 2, "a": 1}', "y"])
    0.5
    """
    check_lengths(answers, references)
    return sum(map(is_match, answers, references)) / len(answers)


def check_lengths(answers: Sequence[str], references: Sequence[str]) -> None:
    """Raises `ValueError` if the lengths differ or are 0."""
    if len(answers) != len(references) or not len(answers):
        raise ValueError(
            f"`answers` and `references` must be equally many, and some. Received: {len(answers)}, {len(references)}"
        )


def fields_right(answer: str, reference: str) -> dict[str, bool]:
    """For each field of a reference object, whether the answer has it right; empty where the reference is no object."""
    given = parse_object(answer) or {}
    return {
        field: field in given and json_equal(given[field], value)
        for field, value in (parse_object(reference) or {}).items()
    }


def field_scores(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """For each field of the reference objects, the share of answers that have it right.

    Returns:
        `{field: share}` in the references' order; empty where the references are not objects.
    """
    lines: dict[str, list[bool]] = {}
    for answer, reference in zip(answers, references, strict=True):
        for field, right in fields_right(answer, reference).items():
            lines.setdefault(field, []).append(right)
    return {field: sum(rights) / len(rights) for field, rights in lines.items()}
