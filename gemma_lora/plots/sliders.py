"""A picture that follows sliders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from gemma_lora.plots.style import picture


def explore(draw: Callable[..., Any], alt: str, start: dict[str, Any] | None = None, **choices: Sequence) -> None:
    """Shows a picture with a slider for each argument of the function that draws it.

    Beside the live widget the output holds the picture of the start as PNG: what a page that runs nothing shows, and
    a session without ipywidgets.

    Args:
        draw: Called with a value for each name in `choices`; returns Axes.
        alt: What the first picture shows, for readers who do not see it.
        start: `{name: value}`, where sliders start that do not start at their first value.
        **choices: `name=values`, the values that the slider called `name` goes through.

    Raises:
        ValueError: If there is no slider, one without values, or a start that is not among them.

    Example:

    >>> explore(lambda rank: draw(parts[rank]), alt="Stripes.", rank=range(1, 9))  # doctest: +SKIP
    """
    from IPython.display import display

    if not choices or not all(len(values) for values in choices.values()):
        raise ValueError(f"`choices` must be one or more sliders with a value or more each. Received: {choices!r}")
    first = {name: values[0] for name, values in choices.items()} | (start or {})
    if wrong := [name for name, value in first.items() if value not in choices.get(name, ())]:
        raise ValueError(f"`start` must be among each slider's values. Received: {wrong[0]}={first[wrong[0]]!r}")
    data, metadata = picture(draw(**first), alt)
    try:
        import ipywidgets
    except ImportError:
        display(data, raw=True, metadata=metadata)
        return
    controls = {
        name: ipywidgets.SelectionSlider(options=list(values), value=first[name], description=name)
        for name, values in choices.items()
    }
    image = ipywidgets.Image(value=data["image/png"], format="png")

    def redraw(_):
        axes = draw(**{name: control.value for name, control in controls.items()})
        image.value = picture(axes, alt)[0]["image/png"]

    for control in controls.values():
        control.observe(redraw, "value")
    display(_view(ipywidgets.VBox([*controls.values(), image])) | data, raw=True, metadata=metadata)


def _view(box: Any) -> dict[str, Any]:
    """What a notebook shows a widget by. ipywidgets 7, which Colab has, displays itself and has no method for it."""
    if hasattr(box, "_repr_mimebundle_"):
        return box._repr_mimebundle_()
    model = {"version_major": 2, "version_minor": 0, "model_id": box.model_id}
    return {"application/vnd.jupyter.widget-view+json": model}
