"""What every checker does: run the learner's function on inputs, compare, and say ✓, "not yet" or what differed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np


def verdict(
    name: str,
    function: Callable,
    cases: Iterable[Mapping[str, Any]],
    right: Callable,
    slips: Mapping[str, Callable] | None = None,
) -> None:
    """Prints whether a function agrees with the right one on every case.

    Args:
        name: The exercise's name.
        function: The learner's function.
        cases: Keyword arguments of one call each; the function gets copies.
        right: The reference, an independent computation.
        slips: `{what went wrong: function that goes wrong so}`. Where the learner's answers are a slip's in every
            case, the slip is named.
    """
    cases = list(cases)
    answers: list[Any] = []
    for case in cases:
        try:
            answer = function(**copy.deepcopy(dict(case)))
        except NotImplementedError:
            answer = None
        except Exception as error:
            print(f"✗ {name}: your function raised {type(error).__name__}: {error}\n{_shown(case)}")
            return
        answers.append(None if answer is ... else answer)
    # None in every case is a stub; in some, a path without `return`, which differs like any other wrong answer.
    if all(answer is None for answer in answers):
        print(f"… {name}: not yet. Complete the function and run the cell again.")
        return
    expected = [right(**copy.deepcopy(dict(case))) for case in cases]
    wrong = [i for i in range(len(cases)) if not same(answers[i], expected[i])]
    if not wrong:
        print(f"✓ {name}: right on {len(cases)} inputs.")
        return
    smallest = min(wrong, key=lambda i: len(_shown(cases[i])))
    print(f"✗ {name} differs on {len(wrong)} of {len(cases)} inputs. One of them:\n{_shown(cases[smallest])}")
    print(f"  expected: {_text(expected[smallest])}\n  got:      {_text(answers[smallest])}")
    if slip := _slip(cases, answers, slips or {}):
        print(f"  It looks as if {slip}.")


def number_verdict(name: str, answer: Any, right: float, praise: str, slips: Mapping[float, str], hint: str) -> None:
    """Prints whether a number that was worked out by hand is the right one.

    Args:
        name: The exercise's name.
        answer: The learner's number, or None or `...` while there is none.
        right: The right number; answers within 0.001 count.
        praise: How it is found, said with the ✓.
        slips: `{wrong number: what went wrong}`, numbers to two decimals.
        hint: What to say to any other number.
    """
    if answer is None or answer is ...:
        print(f"… {name}: not yet. Put your number in place of the dots.")
        return
    try:
        number = float(answer)
    except (TypeError, ValueError):
        print(f"✗ {name}: a number is needed. Got: {answer!r}")
        return
    if abs(number - right) < 1e-3:
        print(f"✓ {name}: {praise}")
        return
    print(f"✗ {name}: not {answer}; {slips.get(round(number, 2), hint)}.")


def same(answer: Any, expected: Any) -> bool:
    """Whether an answer has the expected value's shape and, to rounding, its numbers."""
    try:
        given, wanted = np.asarray(answer), np.asarray(expected)
        if given.shape != wanted.shape or given.dtype.kind not in "biuf":
            return False
        return bool(np.allclose(given.astype(float), wanted.astype(float), rtol=1e-4, atol=1e-5))
    except (TypeError, ValueError):
        return False


def _slip(cases: list, answers: list, slips: Mapping[str, Callable]) -> str:
    for what, function in slips.items():
        try:
            wrong = [function(**copy.deepcopy(dict(case))) for case in cases]
        except Exception:  # a slip that cannot be computed on these inputs is not the learner's
            continue
        if all(same(answer, value) for answer, value in zip(answers, wrong, strict=True)):
            return what
    return ""


def _shown(case: Mapping[str, Any]) -> str:
    return "\n".join(f"  {name} = {_text(value)}" for name, value in case.items())


def _text(value: Any) -> str:
    if isinstance(value, np.ndarray):
        value = value.astype(int) if value.dtype == bool else value
        with np.printoptions(precision=3, suppress=True, threshold=100):
            text = np.array2string(value, separator=", ")
        indented = text.replace("\n", "\n   ")
        return f"array of shape {value.shape}\n   {indented}" if value.ndim > 1 else text
    text = repr(value)
    return text if len(text) <= 300 else text[:300] + " …"
