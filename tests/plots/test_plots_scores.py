"""The confusion matrix shows every count, and names as they are written."""

import pytest

from gemma_lora.plots import confusion_matrices, confusion_matrix, save_figure

TABLE = {"rows": ["yes $x^", "no", "(no class)"], "columns": ["yes $x^", "no"], "counts": [[7, 1], [0, 12], [3, 0]]}


def test_every_count_but_zero_is_written_where_it_belongs():
    ax = confusion_matrix(TABLE["counts"], TABLE["rows"], TABLE["columns"], title="a_$b^")
    written = {(text.get_position()): text.get_text() for text in ax.texts}
    assert written == {(0, 0): "7", (1, 0): "1", (1, 1): "12", (0, 2): "3"}  # x is the right class, y the answer
    assert [label.get_text() for label in ax.get_yticklabels()] == TABLE["rows"]
    assert [label.get_text() for label in ax.get_xticklabels()] == TABLE["columns"]
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_title()) == ("right answer", "answer given", "a_$b^")
    shades = ax.images[0].get_array()
    assert shades[2, 0] == pytest.approx(0.3) and shades[:, 1].sum() == pytest.approx(1)


def test_many_long_names_are_shortened_and_numbers_left_out():
    names = [f"{n} a name that is far too long for a picture\nof classes" for n in range(40)]
    ax = confusion_matrix([[1] * 40] * 40, names, names)
    assert not ax.texts and all(len(label.get_text()) <= 24 for label in ax.get_xticklabels())


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, begins", [("a.png", b"\x89PNG"), ("a.svg", b"<?xml"), ("a.SVG", b"<?xml"), ("a", b"\x89PNG")]
)
def test_several_splits_are_saved_as_png_or_svg_whatever_they_are_called(tmp_path, name, begins):
    save_figure(confusion_matrices({"test $": TABLE, "test_unseen": TABLE}), tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(begins)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_the_lowest_validation_loss_is_marked():
    from gemma_lora.plots import validation_losses

    ax = validation_losses([0.5, 0.2, 0.4], before=3.0)
    line, mark = ax.lines
    assert line.get_xdata().tolist() == [0, 1, 2, 3] and line.get_ydata().tolist() == [3.0, 0.5, 0.2, 0.4]
    assert (mark.get_xdata().item(), mark.get_ydata().item()) == (2, 0.2)
    assert validation_losses([0.5, 0.2]).lines[0].get_xdata().tolist() == [1, 2]
