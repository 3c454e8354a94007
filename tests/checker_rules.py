"""What holds for every lesson's checkers; `tests/test_checks*.py` give the answers and inherit the tests."""

import pytest

from gemma_lora import checks


def stub(*args, **kwargs): ...


def not_implemented(*args, **kwargs):
    raise NotImplementedError


def raises(*args, **kwargs):
    raise IndexError("list index out of range")


def sometimes_nothing(right):
    """A path without `return`: every second call gives None."""
    calls = []

    def function(**case):
        calls.append(case)
        return right(**case) if len(calls) % 2 else None

    return function


def said_by(capsys, name, function):
    assert getattr(checks, name)(function) is None
    return capsys.readouterr().out


def exported(lesson):
    """The exported checkers that a lesson's module holds."""
    return {name for name in checks.__all__ if getattr(checks, name).__module__ == f"gemma_lora.checks.{lesson}"}


class CheckerRules:
    """Tests of one lesson's checkers: ✓ for right answers however they are written, and for nothing else.

    A subclass sets `LESSON`, `BY_HAND` (the exercise whose answer is a number), `RIGHT` (`{checker: right functions}`)
    and `WRONG` (`{checker: (wrong function, what has to be said)}`).
    """

    LESSON: str
    BY_HAND: str
    RIGHT: dict
    WRONG: dict

    def pytest_generate_tests(self, metafunc):
        named = metafunc.fixturenames
        if "said" in named:
            cases = [(name, function, said) for name, wrong in self.WRONG.items() for function, said in wrong]
            metafunc.parametrize(("name", "function", "said"), cases)
        elif "function" in named:
            cases = [(name, function) for name, functions in self.RIGHT.items() for function in functions]
            metafunc.parametrize(("name", "function"), cases)
        elif "name" in named:
            metafunc.parametrize("name", self.RIGHT)

    def test_every_checker_is_tested(self):
        assert exported(self.LESSON) - {self.BY_HAND} == {*self.RIGHT} == {*self.WRONG}
        assert all(len(wrong) >= 2 for wrong in self.WRONG.values())

    @pytest.mark.parametrize("unanswered", [stub, not_implemented, lambda **case: ...])
    def test_an_unanswered_exercise_is_not_yet(self, capsys, name, unanswered):
        text = said_by(capsys, name, unanswered)
        assert "not yet" in text and "✓" not in text

    def test_a_right_answer_passes(self, capsys, name, function):
        assert said_by(capsys, name, function).startswith(f"✓ {name}")

    def test_a_wrong_answer_does_not_and_the_slip_is_named(self, capsys, name, function, said):
        text = said_by(capsys, name, function)
        assert text.startswith("✗") and "✓" not in text and "not yet" not in text
        assert said in text

    def test_an_exception_and_a_missing_return_are_told_with_the_inputs(self, capsys, name):
        text = said_by(capsys, name, raises)
        assert "✗" in text and "IndexError: list index out of range" in text
        assert " = " in text  # the inputs
        text = said_by(capsys, name, sometimes_nothing(self.RIGHT[name][0]))
        assert "✗" in text and "got:      None" in text

    @pytest.mark.parametrize("value", ["text", {"a": 1}, [[1], [1, 2]], float("nan"), object()])
    def test_an_answer_of_another_kind_is_wrong_not_an_error(self, capsys, name, value):
        assert "✗" in said_by(capsys, name, lambda **case: value)

    @pytest.mark.parametrize("answer", [None, ...])
    def test_no_number_by_hand_is_not_yet(self, capsys, answer):
        assert "not yet" in said_by(capsys, self.BY_HAND, answer)
