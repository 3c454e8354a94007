"""Chat markers that a text brings along: taken off where they wrap a whole turn, text everywhere else.

Data that was made for another tool may already stand in `<start_of_turn>user …`, or end with `<eos>`. The template adds
its own, so training would see them twice, the second time as characters.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from gemma_lora.data.chats import Turn
from gemma_lora.data.fields import Notes

#: Names by which models end a turn or a text.
ENDS = (
    *("<eos>", "<end_of_turn>", "</s>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>"),
    *("<|end|>", "<|eom_id|>", "<|end_of_turn|>", "<turn|>"),
)
_END = re.compile(r"(?:\s*(" + "|".join(map(re.escape, ENDS)) + r"))+\s*\Z")
_FOREIGN = re.compile(
    r"\s*(?:<s>\s*)?(<\|im_start\|>|<\|begin_of_text\|>|<\|start_header_id\|>|<\|start\|>|<\|user\|>|<\|system\|>|<\|turn>"
    r"|\[INST\](?=[\s\S]*\[/INST\]))"
)
_USER = re.compile(r"\s*(?:<bos>\s*)?<start_of_turn>user\n([\s\S]*?)\s*<end_of_turn>\s*(?:<start_of_turn>model\s*)?\Z")
_USER_START = re.compile(r"\s*(?:<bos>\s*)?<start_of_turn>user\n")
_MODEL_START = re.compile(r"\s*<start_of_turn>model\n")
_BOS = re.compile(r"\s*<bos>(?=\S)")
_NEXT_TURN = re.compile(r"<end_of_turn>\s*<start_of_turn>")

_FOREIGN_REMEDY = "the {} stands in another model's chat markers already ({}). Give the plain text, or messages"
_SEVERAL_REMEDY = "the {} holds several turns in Gemma's chat markers (<start_of_turn>). Give them as messages"


def without_markers(turns: Sequence[Turn], notes: Notes) -> list[Turn]:
    """The turns without markers around their texts; what was taken off is noted.

    Args:
        turns: A line's turns.
        notes: Where to note the markers.

    Raises:
        ValueError: If a text holds several turns, or another model's markers.
    """
    ended = any(turn.role == "model" and _without_end(turn.text) != turn.text for turn in turns)
    found = []
    for turn in turns:
        text = _of_user(turn.text, ended) if turn.role == "user" else _of_model(turn.text)
        if text != turn.text:
            notes += [("markers", name) for name in _taken(turn.text, text)]
        found.append(turn._replace(text=text))
    return found


def _of_user(text: str, ended: bool) -> str:
    if foreign := _FOREIGN.match(text):
        raise ValueError(_FOREIGN_REMEDY.format("prompt", foreign[1]))
    if _USER_START.match(text):
        whole = _USER.match(text)
        if whole is None or _NEXT_TURN.search(whole[1]):
            raise ValueError(_SEVERAL_REMEDY.format("prompt"))
        return whole[1].strip()
    text = _without_bos(text)
    return _without_end(text) if ended else text


def _of_model(text: str) -> str:
    if foreign := _FOREIGN.match(text):
        raise ValueError(_FOREIGN_REMEDY.format("answer", foreign[1]))
    if start := _MODEL_START.match(text):
        text = text[start.end() :]
        if _NEXT_TURN.search(text):
            raise ValueError(_SEVERAL_REMEDY.format("answer"))
    return _without_end(_without_bos(text))


def _without_bos(text: str) -> str:
    """`<bos>` before a word is a marker, before a space a word itself."""
    return _BOS.sub("", text, count=1)


def _without_end(text: str) -> str:
    """The text without ends behind it; one that is nothing else stays, and so does HTML's `<s>…</s>`."""
    found = _END.search(text) if text.rstrip().endswith(">") else None
    if found is None or not text[: found.start()].strip() or ("<s>" in text and "</s>" in found[0]):
        return text
    return text[: found.start()].rstrip()


def _taken(before: str, after: str) -> list[str]:
    """The markers' names in what was taken off."""
    start = before.find(after)
    around = before[:start] + " " + before[start + len(after) :]
    return re.findall(r"<[^<>\s]+>", around)
