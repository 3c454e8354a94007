"""A model card: what an exported model was made of, what it scored, how it is to be asked, and where it fails."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gemma_lora.base.settings import BUILTIN_NAME
from gemma_lora.data.templates import Template
from gemma_lora.exchange.chat_templates import strings_beside_tokens
from gemma_lora.gemma.load import BUILTIN_NOTE

#: What Google's terms ask to be handed on with every copy of a Gemma.
NOTICE = "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms\n"
_BUILTIN_HUB_NAME = "google/gemma-3-270m"
#: Settings that say how an adapter was trained.
_TRAINING = ("rank", "alpha", "targets", "rslora", "dora", "quantization", "learning_rate", "epochs", "limit", "seed")


def run_of(folder: Path | None) -> dict[str, Any]:
    """What a fine-tuning job wrote about an adapter: `{"metrics": …, "settings": …}`, as far as it is there.

    Args:
        folder: The adapter's folder. The files are in it, or in the run's folder around it.
    """
    found = {}
    for name in ("metrics", "settings"):
        for place in (folder, folder.parent) if folder else ():
            try:
                value = json.loads((place / f"{name}.json").read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue
            if isinstance(value, dict):
                found[name] = value
                break
    return found


def base_name(source: str | None) -> str:
    """What a model card calls a base model: a hub's or a preset's name, or a file's without its folders."""
    if source in (None, BUILTIN_NAME):
        return _BUILTIN_HUB_NAME if source else "A Gemma"
    text = str(source).removeprefix("hf://")
    return text if "://" in text or not Path(text).exists() else Path(text).name


def card(
    name: str,
    source: str | None,
    kind: str,
    template: Template,
    run: Mapping[str, Any],
    notes: Sequence[str] = (),
    adapted: bool = True,
) -> str:
    """The card as Markdown.

    Args:
        name: What the model is called.
        source: What `load_gemma` was given: the base model.
        kind: What the weights are stored in.
        template: The text around a prompt.
        run: What `run_of` gave.
        notes: Sentences on how the weights were made.
        adapted: Whether there is an adapter in it.

    Returns:
        Text that begins with the fields that model hubs read.
    """
    base = base_name(source)
    named = [f"base_model: {base}"] if "/" in base and "://" not in base else []
    head = ["---", *named, "license: gemma", "library_name: transformers", "pipeline_tag: text-generation"]
    head += ["tags: [gemma_lora, lora]", "---"]
    parts = [
        "\n".join(head),
        f"# {name}",
        f"{base}, fine-tuned with gemma_lora. The update is merged into the weights, which are stored as {kind}. "
        "This is a modified Gemma."
        if adapted
        else f"{base} as gemma_lora holds it, without an adapter. The weights are stored as {kind}.",
        _data(run.get("settings", {}), run.get("metrics", {})),
        _scores(run.get("metrics", {})),
        _prompt(template),
        _limits(source, run.get("metrics", {}), notes),
        "## Licence\n" + NOTICE.strip() + ". If you use or pass on this model, you accept those terms.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _data(settings: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    if not settings:
        return "## Data\nNothing is recorded about the lines that it was trained on. Write it here before you share it."
    digest = settings.get("data_sha256")
    lines = [f"## Data\nTrained on `{settings.get('data')}`" + (f" (SHA-256 {digest})." if digest else ".")]
    chosen = settings.get("chosen") or {}
    rows = {key: chosen.get(key, settings.get(key)) for key in _TRAINING}
    lines += [f"- {key.replace('_', ' ')}: {value}" for key, value in rows.items() if value not in (None, False)]
    if metrics.get("training_steps"):
        lines.append(f"- steps: {metrics['training_steps']}")
    return "\n".join(lines)


def _scores(metrics: Mapping[str, Any]) -> str:
    """A table with a row for each split and score, before and after."""
    after, before = metrics.get("after") or {}, metrics.get("before") or {}
    if not after:
        return "## Scores\nNone are recorded. `gemma-lora evaluate` scores an adapter on any file."
    lines = [
        "## Scores",
        "| split | lines | score | base model, with examples shown | this adapter |",
        "|" + "---|" * 5,
    ]
    for split, scores in after.items():
        for name, value in _named(scores).items():
            then = _named(before.get(split, {})).get(name)
            lines.append(
                f"| {split} | {scores.get('count', '–')} | {name} | {_shown(name, then)} | {_shown(name, value)} |"
            )
    english = metrics.get("english_perplexity")
    if english:
        lines.append(f"| English text | | perplexity | {english['before']:.1f} | {english['after']:.1f} |")
    lines.append(
        "\nThey were measured with the adapter beside the base model, before the weights were merged and stored."
    )
    return "\n".join(lines)


def _named(scores: Mapping[str, Any]) -> dict[str, float]:
    if scores.get("scores"):
        return {name: one["value"] for name, one in scores["scores"].items()}
    return {"exact match": scores["exact_match"]} if "exact_match" in scores else {}


def _shown(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if name == "loss" else f"{value:.1f}" if name == "chrF" else f"{100 * value:.1f} %"


def _prompt(template: Template) -> str:
    shown = json.dumps(template.prompt + template.response, ensure_ascii=False)
    text = [
        "## How to ask it",
        f"The text around a prompt and its answer was {shown} in training, behind `<bos>`; the chat template writes "
        "it. Answers were scored greedily (temperature 0).",
    ]
    if strings := strings_beside_tokens(template):
        quoted = ", ".join(json.dumps(one, ensure_ascii=False) for one in strings)
        text.append(f"An answer ends at a stop token, and before the text {quoted}, which must be given as `stop`.")
    return "\n".join(text)


def _limits(source: str | None, metrics: Mapping[str, Any], notes: Sequence[str]) -> str:
    lines = list(notes)
    if source == BUILTIN_NAME:
        lines.append(BUILTIN_NOTE)
    lines += metrics.get("warnings", [])
    lines += [
        "It was trained for one task. On other text it may be worse than the base model; the perplexity above says "
        "how much, where it was measured.",
        "Names of control tokens in a user's text become control tokens in most programs; gemma_lora keeps them text.",
    ]
    return "## Limits\n" + "\n".join(f"- {line}" for line in lines)
