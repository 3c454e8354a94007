"""A chat line by line, at a terminal or through a pipe."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from typing import Protocol

from gemma_lora.base.files import GemmaLoraError

HELP = "/reset begins a new chat; /quit or Ctrl-D ends."


class Partner(Protocol):
    """What is talked to: a `Chat`."""

    def stream(self, text: str) -> Iterator[str]: ...

    def reset(self) -> None: ...


def converse(
    chat: Partner, ask: Callable[[], str | None], write: Callable[[str], None], note: Callable[[str], None] | None
) -> None:
    """One turn for each line, until there is none or one is `/quit`. `/reset` begins anew; empty lines are passed over.

    Args:
        chat: What is talked to.
        ask: Gives the next line without its end, or None.
        write: Takes an answer's text as it grows, control characters as visible signs, and a line's end behind it.
        note: Takes what is said to a reader who is there. None for a pipe: a turn that cannot be answered is then an
            error, and not the reader's next line.
    """
    while (line := ask()) is not None:
        command = line.strip()
        if command == "/quit":
            return
        if command == "/reset":
            chat.reset()
            if note is not None:
                note("A new chat.")
        elif command:
            try:
                pieces = chat.stream(line)
            except GemmaLoraError as error:
                if note is None:
                    raise
                note(f"{error}\n{HELP}")
                continue
            for piece in pieces:
                write(visible(piece))
            write("\n")


def asker(interactive: bool) -> Callable[[], str | None]:
    """A function that reads the next line of stdin, at a terminal with a sign before it and the keys for editing."""
    if interactive:
        try:
            import readline  # noqa: F401  # from then on `input` knows arrow keys and earlier lines
        except ImportError:
            pass

    def ask() -> str | None:
        try:
            if interactive:
                return input("> ")
            line = sys.stdin.readline()
        except EOFError:
            return None
        except UnicodeDecodeError as error:
            raise GemmaLoraError(f"stdin: not UTF-8 ({error.reason}). Give text as UTF-8.") from None
        return line.rstrip("\r\n") if line else None

    return ask


#: What a terminal may obey: control characters but a line's end and a tab, and signs that turn the writing direction.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    r"""A text with control characters as visible signs, so that it cannot move the cursor, set colours or titles.

    Example:

    >>> print(visible("a\x1b[2Jb\x07 \x9b"))
    a␛[2Jb␇ \x9b
    """
    return _CONTROL.sub(lambda match: _sign(match[0]), text)


def _sign(character: str) -> str:
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "␡"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
