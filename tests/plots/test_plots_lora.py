"""plots/lora.py: what is drawn is what was given, whatever the scale."""

import numpy as np
import pytest

from gemma_lora import plots

CURVES = {"all": {1: 0.4, 4: 0.2, 16: 0.1}, "qv": {4: 0.3, 16: 0.25}}


def test_stacked_bars_lie_end_to_end_and_their_sum_is_written():
    parts = {"weights": 2e9, "gradients": 1e9, "averages": 4e9}
    ax = plots.stacked_memory({"small": {"full": {"weights": 24}}, "large": {"full": parts, "LoRA": {"weights": 2e9}}})
    bars = [(bar.get_x(), bar.get_width()) for bar in ax.patches]
    assert bars == [(0, 2), (2, 1), (3, 4), (0, 2)]  # in GB
    assert [text.get_text() for text in ax.texts] == ["7 GB", "2 GB"]
    assert ax.get_xlabel() == "memory (GB)" and ax.get_xlim()[1] > 7
    first = ax.figure.axes[0]
    assert first.get_xlabel() == "memory (bytes)" and first.texts[0].get_text() == "24 bytes"


def test_the_same_part_has_the_same_face_in_every_bar():
    ax = plots.stacked_memory({"one": {"full": {"a": 1, "b": 2}, "LoRA": {"b": 2, "a": 1}}})
    faces = [(bar.get_facecolor(), bar.get_hatch()) for bar in ax.patches]
    assert faces[0] == faces[3] and faces[1] == faces[2] and faces[0] != faces[1]


def test_values_stand_at_their_ranks_and_levels_in_the_first_panel():
    ax = plots.against_rank({"loss": CURVES, "share": CURVES}, levels={"full": 0.15}, form="{:.1f}")
    first, second = ax.figure.axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in second.lines}
    assert drawn == {name: [[rank, value] for rank, value in points.items()] for name, points in CURVES.items()}
    assert [line.get_label() for line in first.lines][-1] == "full"
    assert [text.get_text() for text in first.texts] == ["0.4", "0.2", "0.1"]
    assert [label.get_text() for label in second.get_xticklabels()] == ["1", "4", "16"]


def test_a_power_of_the_rank_is_a_straight_line_on_log_axes():
    ax = plots.against_rank({"size": {"falls": {rank: 8 / rank for rank in (1, 2, 4)}}}, log=True)
    pixels = ax.transData.transform(ax.lines[0].get_xydata())
    assert np.ptp(np.diff(pixels[:, 0])) < 1e-6 and np.ptp(np.diff(pixels[:, 1])) < 1e-6


def test_the_best_rate_is_named():
    ax = plots.loss_against_rate({"LoRA": {1e-3: 0.2, 1e-4: 0.5, 5e-3: 0.9}, "full": {1e-4: 0.3, 1e-5: 0.4}})
    assert [text.get_text() for text in ax.texts] == ["best: 0.001", "best: 0.0001"]
    assert ax.lines[0].get_xdata().tolist() == [1e-4, 1e-3, 5e-3]  # sorted
    low, high = ax.get_ylim()
    assert low < 0.2 and high >= 0.9


@pytest.mark.parametrize("most", [4, 16, 64])
def test_energy_bands_reach_all_directions(most):
    energy = np.linspace(1 / most, 1, most)
    band = {"low": energy**2, "median": energy, "high": energy**0.5}
    ax = plots.energy_bands({"rank": band}, share=0.9)
    assert ax.lines[0].get_xydata().tolist() == [[k, k / most] for k in range(1, most + 1)]
    assert ax.get_xticks().max() == most and ax.texts[0].get_text() == "90%"
