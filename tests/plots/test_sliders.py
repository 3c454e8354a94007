"""`plots.explore`: the picture follows the sliders, and a page that runs nothing has one all the same."""

import sys

import ipywidgets
import pytest

from gemma_lora import plots


@pytest.fixture
def shown(monkeypatch):
    """What `display` was given: `(data, metadata)` of each call."""
    calls = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw, metadata: calls.append((data, metadata)))
    return calls


@pytest.fixture
def boxes(monkeypatch):
    """The boxes of widgets that are made."""
    made = []

    class Box(ipywidgets.VBox):
        def __init__(self, children):
            super().__init__(children)
            made.append(self)

    monkeypatch.setattr("ipywidgets.VBox", Box)
    return made


def draw(height, width):
    return plots.pictures({f"{height} by {width}": [[0.5] * width] * height}, columns=1)


def test_the_output_is_a_widget_and_a_picture_with_alt_text(shown, boxes):
    plots.explore(draw, "A grey box.", height=[1, 2], width=[3, 4])
    ((data, metadata),) = shown
    assert data["image/png"].startswith(b"\x89PNG") and data["text/plain"] == "A grey box."
    assert metadata["image/png"]["alt"] == "A grey box."
    assert "application/vnd.jupyter.widget-view+json" in data
    assert boxes[0].children[-1].value == data["image/png"]


def test_the_picture_follows_the_sliders(shown, boxes):
    asked = []

    def noted(**values):
        asked.append(values)
        return draw(**values)

    plots.explore(noted, "A grey box.", start={"width": 4}, height=[1, 2], width=[3, 4, 5])
    height, width, image = boxes[0].children
    assert asked == [{"height": 1, "width": 4}]
    before = image.value
    height.value, width.value = 2, 5
    assert asked[1:] == [{"height": 2, "width": 4}, {"height": 2, "width": 5}]
    assert image.value != before


@pytest.mark.parametrize(
    "named, said",
    [({}, "one or more sliders"), ({"rank": []}, "a value or more"), ({"rank": [1], "start": {"rank": 2}}, "rank=2")],
)
def test_bad_arguments(named, said):
    with pytest.raises(ValueError, match=said):
        plots.explore(draw, "A grey box.", **named)


def test_ipywidgets_7_has_no_bundle_of_its_own_and_is_shown_all_the_same(shown, monkeypatch):
    class Box:
        model_id = "abc"

        def __init__(self, children):
            pass

    monkeypatch.setattr("ipywidgets.VBox", Box)
    plots.explore(draw, "A grey box.", height=[1, 2], width=[3])
    ((data, _),) = shown
    assert data["application/vnd.jupyter.widget-view+json"]["model_id"] == "abc" and data["image/png"]


def test_without_ipywidgets_there_is_the_picture(shown, monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    plots.explore(draw, "A grey box.", start={"height": 2}, height=[1, 2], width=[3])
    ((data, metadata),) = shown
    assert set(data) == {"image/png", "text/plain"} and metadata["image/png"]["alt"] == "A grey box."
