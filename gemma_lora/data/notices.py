"""What a user should know about how lines were read: one sentence of each kind, with how many lines it concerns."""

from __future__ import annotations

from collections.abc import Iterable

#: A kind of note, by name -> its sentence. `{details}` are the names or texts concerned, each with its lines; `{lines}`
#: is the number of lines, and `{first}` one of them.
KINDS = {
    "unused": "Not used for training, as neither prompt nor answer: {details}.",
    "numbers": "Numbers became text in {lines}, such as {example} (first {first}).",
    "trimmed": "White space around turns was taken off in {lines}, as Gemma's chat template does (first {first}).",
    "markers": "Chat markers around the text were taken off in {lines}, for the template brings its own: {details} "
    "(first {first}).",
    "behind": "Turns after the last one with weight 1 were left out in {lines}, for nothing is learned from them "
    "(first {first}).",
}
_SHOWN = 12  # names that a sentence lists


class Notices:
    """Collects notes on lines, and free sentences.

    Example:

    >>> notices = Notices()
    >>> notices.add_line("a.jsonl:1", [("unused", "'id'")])
    >>> notices.add_line("a.jsonl:2", [("unused", "'id'"), ("unused", "'source'")])
    >>> notices.sentences()
    ("Not used for training, as neither prompt nor answer: 'id' (2 lines), 'source' (1 line).",)
    """

    def __init__(self) -> None:
        self._lines: dict[str, list[str]] = {}
        self._details: dict[str, dict[str, int]] = {}
        self._said: list[str] = []

    def say(self, sentence: str) -> None:
        """Adds a sentence; one that is there already is not repeated."""
        if sentence not in self._said:
            self._said.append(sentence)

    def add_line(self, where: str, notes: Iterable[tuple[str, str]]) -> None:
        """Adds what was noted on one line: pairs of a kind of `KINDS` and a detail."""
        notes = list(dict.fromkeys(notes))
        for kind in dict.fromkeys(kind for kind, _ in notes):
            self._lines.setdefault(kind, []).append(where)
        for kind, detail in notes:
            details = self._details.setdefault(kind, {})
            details[detail] = details.get(detail, 0) + 1

    def sentences(self) -> tuple[str, ...]:
        """All notes: one sentence a kind, then the free ones."""
        return (*(self._sentence(kind) for kind in KINDS if kind in self._lines), *self._said)

    def _sentence(self, kind: str) -> str:
        counts, lines = self._details[kind], self._lines[kind]
        shown = [f"{detail} ({_count(count)})" for detail, count in list(counts.items())[:_SHOWN]]
        if len(counts) > _SHOWN:
            shown.append(f"and {len(counts) - _SHOWN} more")
        known = {"details": ", ".join(shown), "example": next(iter(counts)), "first": lines[0]}
        return KINDS[kind].format(lines=_count(len(lines)), **known)


def _count(lines: int) -> str:
    return f"{lines} line{'' if lines == 1 else 's'}"
