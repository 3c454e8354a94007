"""plots/qlora.py: what is drawn is what was given, and what was not measured is said so."""

import numpy as np
import pytest

from gemma_lora import plots

PANELS = {
    "exact match (%)": {"LoRA": [70.0, 74.0, 72.0], "QLoRA": [71.0]},
    "peak memory (GB)": {"LoRA": [3.5, 3.6, 3.4], "QLoRA": [2.5]},
}
NAMES = ["LoRA", "QLoRA", "full"]


def texts(ax):
    return [text.get_text() for text in ax.texts]


def test_value_rows_draw_means_and_each_of_several_measurements():
    last = plots.value_rows(PANELS, NAMES, reference="LoRA", form="{:.1f}")
    first, second = last.figure.axes
    assert second is last and [ax.get_xlabel() for ax in (first, second)] == list(PANELS)
    dots = [line for line in first.lines if line.get_markersize() == 5]
    assert [tuple(line.get_xydata()[0]) for line in dots] == [(72.0, 0), (71.0, 1)]
    (rings,) = [line for line in first.lines if line.get_markersize() == 7 and len(line.get_xdata()) == 3]
    assert rings.get_xdata().tolist() == [70, 74, 72]
    assert {"72.0", "71.0"} <= set(texts(first)) and {"3.5", "2.5"} <= set(texts(second))
    assert [label.get_text() for label in first.get_yticklabels()] == NAMES
    low, high = first.get_ylim()
    assert low > high  # the first name is on top


def test_a_name_without_a_measurement_is_said_to_be_missing():
    first = plots.value_rows(PANELS, NAMES, missing="not run").figure.axes[0]
    (said,) = [text for text in first.texts if text.get_text() == "not run"]
    assert said.get_position()[1] == NAMES.index("full")


@pytest.mark.parametrize("panels", [{"loss": {}}, {"loss": {"LoRA": []}}])
def test_nothing_measured_is_a_picture_too(panels, tmp_path):
    ax = plots.value_rows(panels, NAMES, reference="LoRA")
    assert texts(ax) == ["not run yet"] * 3
    plots.save_figure(ax, tmp_path / "rows.png")
    assert (tmp_path / "rows.png").stat().st_size > 1000


def test_whiskers_are_as_long_as_the_errors():
    ax = plots.value_rows(PANELS, NAMES, errors={"exact match (%)": {"QLoRA": 4.5}}).figure.axes[0]
    (bars,) = [container for container in ax.containers]
    (segment,) = bars.lines[2][0].get_segments()
    assert segment[:, 0].tolist() == [66.5, 75.5] and set(segment[:, 1]) == {1}


def test_paired_losses_show_both_and_their_difference():
    below = plots.paired_losses({"float32": [2.0, 1.0, 0.5], "NF4": [2.2, 1.1, 0.45]})
    above = below.figure.axes[0]
    assert [line.get_label() for line in above.lines] == ["float32", "NF4"]
    heights = [bar.get_height() for bar in below.patches]
    assert np.allclose(heights, [0.2, 0.1, -0.05]) and "NF4 less float32" in below.get_xlabel()
    assert above.get_ylim()[0] == 0


def test_measured_stands_beside_planned_where_there_is_a_plan():
    ax = plots.measured_and_planned({"LoRA": 3e9, "GGUF": 2.5e9}, {"LoRA": 3.3e9})
    assert [round(bar.get_width(), 3) for bar in ax.patches] == [3.0, 3.3, 2.5]
    assert texts(ax) == ["3.00", "3.30", "2.50"]
    assert ax.get_legend_handles_labels()[1] == ["measured", "planned"]


def test_the_means_of_what_rounding_left_are_drawn():
    asked = np.linspace(-0.9, 0.9, 900)
    ax = plots.asked_and_got(asked, {"kept": asked, "lost": np.zeros(900)}, "steps")
    first, last = ax.figure.axes
    kept, lost = (panel.lines[-1].get_xydata() for panel in (first, last))
    assert np.allclose(kept[:, 0], kept[:, 1]) and np.allclose(lost[:, 1], 0) and len(kept) == 9
    assert first.get_title(loc="left") == "kept" and last.get_xlabel() == "added (steps)"
