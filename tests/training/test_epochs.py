"""As many passes as show about 1,200 lines: one at least, six at most."""

import pytest

from gemma_lora.training.epochs import LINES_SHOWN, MOST_EPOCHS, default_epochs


@pytest.mark.parametrize(
    ("lines", "epochs"), [(1, 6), (150, 6), (200, 6), (240, 5), (300, 4), (600, 2), (2200, 1), (10**6, 1)]
)
def test_few_lines_are_shown_more_often(lines, epochs):
    assert default_epochs(lines) == epochs


def test_about_as_many_lines_are_shown_where_neither_bound_holds():
    for lines in range(LINES_SHOWN // MOST_EPOCHS, LINES_SHOWN):
        assert abs(lines * default_epochs(lines) - LINES_SHOWN) <= lines / 2


def test_no_lines_are_refused():
    with pytest.raises(ValueError, match="`lines`.*lines=0"):
        default_epochs(0)
