"""Builds the questions about the course: a passage and a question -> a short answer from the passage.

Deterministic: `passages.txt` and fixed seeds give the same bytes.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from random import Random

sys.path.append(str(Path(__file__).resolve().parents[1]))

import task_files

FOLDER = Path(__file__).resolve().parent
SPLITS = ("train", "validation", "test", "test_unseen")
#: The answer to a question that the passage does not answer.
NOT_SAID = "The passage does not say."
#: How a prompt is laid out, by turns.
LAYOUTS = ["{passage}\n\nQuestion: {question}", "Question: {question}\n\n{passage}", "{passage}\n{question}"]
#: Of a passage's questions so many go to validation and so many to test; the rest goes to train.
HELD_BACK = 2


@dataclass(frozen=True)
class Passage:
    """One passage with its questions: `(question, answer)`, the answer a part of the text or `NOT_SAID`."""

    name: str
    unseen: bool
    text: str
    questions: tuple[tuple[str, str], ...]


def read_passages() -> list[Passage]:
    """The passages of `passages.txt`: a title, the text, then `answer | question | question` line by line."""
    passages = []
    for block in (FOLDER / "passages.txt").read_text("utf-8").strip().split("\n\n"):
        title, text, *rows = block.split("\n")
        name, *marks = title.removeprefix("# ").split()
        questions = []
        for row in rows:
            answer, *asked = (part.strip() for part in row.split(" | "))
            questions += [(question, NOT_SAID if answer == "-" else answer) for question in asked]
        passages.append(Passage(name, "test" in marks, text, tuple(questions)))
    return passages


def asks_about(question: str, text: str) -> bool:
    """Whether a question may be about a text: two of its longer words, or their beginnings, stand in it."""
    words = {word[:5] for word in re.findall(r"[a-z]{5,}", question.lower())} - {"which", "there", "their", "where"}
    return sum(word in text.lower() for word in words) >= 2


def foreign(rng: Random, passage: Passage, others: list[Passage], count: int) -> list[tuple[str, str]]:
    """Questions of other passages, on subjects that this one does not touch."""
    found: list[tuple[str, str]] = []
    while len(found) < count:
        other = rng.choice(others)
        question, answer = rng.choice(other.questions)
        apart = answer != NOT_SAID and answer.lower() not in passage.text.lower()
        apart = apart and not asks_about(question, passage.text)
        if other is not passage and apart and (question, NOT_SAID) not in found:
            found.append((question, NOT_SAID))
    return found


def line(rng: Random, text: str, question: str, answer: str) -> dict[str, str]:
    """One line of a split."""
    return {"prompt": rng.choice(LAYOUTS).format(passage=text, question=question), "response": answer}


def build() -> dict[str, list[dict[str, str]]]:
    """All splits."""
    rng = Random("questions")
    passages = read_passages()
    made: dict[str, list[dict[str, str]]] = {split: [] for split in SPLITS}
    for unseen in (False, True):
        group = [passage for passage in passages if passage.unseen == unseen]
        for passage in group:
            questions = list(passage.questions) + foreign(rng, passage, group, 2)
            rng.shuffle(questions)
            for number, (question, answer) in enumerate(questions):
                place = ("test", "validation")[number % 2] if number < 2 * HELD_BACK else "train"
                split = "test_unseen" if unseen else place
                made[split].append(line(rng, passage.text, question, answer))
                if split == "train" and answer != NOT_SAID and rng.random() < 0.7:
                    made[split].append(line(rng, with_another(rng, passage, question, group), question, answer))
    for lines in made.values():
        rng.shuffle(lines)
    return made


def with_another(rng: Random, passage: Passage, question: str, group: list[Passage]) -> str:
    """The passage before or after another one, which the question cannot be about."""
    others = [other for other in group if other is not passage and not asks_about(question, other.text)]
    pair = [passage.text, rng.choice(others).text]
    rng.shuffle(pair)
    return "\n".join(pair)


def main(arguments: list[str] | None = None) -> int:
    """Builds or checks the files; returns the exit status."""
    return task_files.main(build, FOLDER, "Build the questions about the course.", arguments)


if __name__ == "__main__":
    sys.exit(main())
