"""Checkers of lesson 08's exercises. Each compares with a computation of its own, in numpy."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np

from gemma_lora.checks.verdict import number_verdict, verdict

_SEED = 8


def lora_count_by_hand(answer: int | None) -> None:
    """Checks the number of LoRA parameters at rank 8 on query and value in Gemma 3 270M.

    Args:
        answer: The number, or None or `...` while there is none.
    """
    query, value, blocks, rank = (640, 1024), (640, 256), 18, 8
    right = blocks * rank * (sum(query) + sum(value))
    slips: dict[float, str] = {
        right // blocks: "that is one block; there are 18",
        blocks * rank * sum(query): "that is the query alone; the value projection has a pair too",
        blocks * rank * sum(value): "that is the value projection alone; the query has a pair too",
        blocks * (640 * 1024 + 640 * 256): "those are the kernels; A and B are counted instead",
        2 * right: "that counts every matrix twice: A has d_in · rank numbers and B has rank · d_out",
        right // rank: "that is rank 1; A has 8 columns and B has 8 rows",
    }
    praise = f"{right:,} parameters, {right / 268_098_176:.2%} of the model."
    hint = "for each block and target: A has d_in · rank numbers, B has rank · d_out"
    number_verdict("lora_count_by_hand", answer, right, praise, slips, hint)


def lora_parameters(function: Callable) -> None:
    """Checks `function(shapes, rank, blocks)`: LoRA's parameters, `shapes` being a block's `(d_in, d_out)` pairs."""
    rng = np.random.default_rng(_SEED)
    cases = [
        {
            "shapes": [(int(a), int(b)) for a, b in rng.integers(2, 3000, (rng.integers(1, 8), 2))],
            "rank": int(rng.integers(1, 65)),
            "blocks": int(rng.integers(2, 40)),
        }
        for _ in range(20)
    ]

    def right(shapes, rank, blocks):
        return sum(np.zeros((d_in, rank)).size + np.zeros((rank, d_out)).size for d_in, d_out in shapes) * blocks

    slips = {
        "the blocks are not counted": lambda shapes, rank, blocks: rank * sum(map(sum, shapes)),
        "the kernel's size is in it": lambda shapes, rank, blocks: blocks * sum(a * b for a, b in shapes),
        "B is forgotten": lambda shapes, rank, blocks: blocks * rank * sum(a for a, _ in shapes),
        "A is forgotten": lambda shapes, rank, blocks: blocks * rank * sum(b for _, b in shapes),
        "only the first target is counted": lambda shapes, rank, blocks: blocks * rank * sum(shapes[0]),
    }
    verdict("lora_parameters", function, cases, right, slips)


def loss_weights(function: Callable) -> None:
    """Checks `function(prompt_length, answer_length)`: the loss weight at each position, next token as target."""
    rng = np.random.default_rng(_SEED)
    cases = [{"prompt_length": int(p), "answer_length": int(a)} for p, a in rng.integers(1, 9, (20, 2))]

    def right(prompt_length, answer_length):
        is_answer = [False] * prompt_length + [True] * answer_length
        return np.array([*is_answer[1:], False], float)  # a position is weighed as the token that follows it

    def part(prompt, answer, first):
        weights = np.zeros(prompt + answer)
        weights[max(first, 0) :] = 1.0
        return weights

    slips = {
        "the weights lie on the answer's own tokens, not one position earlier, where they are predicted": (
            lambda prompt_length, answer_length: part(prompt_length, answer_length, prompt_length)
        ),
        "the prompt carries loss too": lambda prompt_length, answer_length: np.array(
            [1.0] * (prompt_length + answer_length - 1) + [0.0]
        ),
        "every position carries loss": lambda prompt_length, answer_length: np.ones(prompt_length + answer_length),
        "the last position carries loss, though nothing follows it": (
            lambda prompt_length, answer_length: part(prompt_length, answer_length, prompt_length - 1)
        ),
        "the weights are shifted the wrong way": (
            lambda prompt_length, answer_length: part(prompt_length, answer_length, prompt_length + 1)
        ),
    }
    verdict("loss_weights", function, cases, right, slips)


def segment_mask(function: Callable) -> None:
    """Checks `function(segment_ids, window)`: (T, T) booleans, True where token t may attend to token s."""
    rng = np.random.default_rng(_SEED)
    cases = []
    for _ in range(20):
        lengths = rng.integers(1, 5, rng.integers(2, 4))
        ids = np.concatenate([np.repeat(np.arange(1, len(lengths) + 1), lengths), np.zeros(rng.integers(1, 4), int)])
        cases.append({"segment_ids": ids, "window": int(rng.integers(2, 5))})

    def built(segment_ids, window, rules):
        size = len(segment_ids)
        mask = np.zeros((size, size), bool)
        for t in range(size):
            for s in range(size):
                tests = {
                    "causal": s <= t,
                    "same": segment_ids[s] == segment_ids[t],
                    "real": segment_ids[s] > 0,
                    "window": abs(t - s) < window,
                    "wide": abs(t - s) <= window,
                }
                mask[t, s] = all(tests[rule] for rule in rules)
        return mask

    def with_rules(*rules):
        return lambda segment_ids, window: built(segment_ids, window, rules)

    slips = {
        "a token sees tokens that come after it": with_rules("same", "real", "window"),
        "padding is seen": with_rules("causal", "same", "window"),
        "an example sees its neighbours": with_rules("causal", "real", "window"),
        "the window is left out": with_rules("causal", "same", "real"),
        "the window is one too wide: it counts the token itself": with_rules("causal", "same", "real", "wide"),
        "rows and columns are exchanged": lambda segment_ids, window: (
            built(segment_ids, window, ("causal", "same", "real", "window")).T
        ),
    }
    verdict("segment_mask", function, cases, with_rules("causal", "same", "real", "window"), slips)


def merge(function: Callable) -> None:
    """Checks `function(kernel, lora_a, lora_b, alpha)`: the kernel that does what kernel and update do together."""
    rng = np.random.default_rng(_SEED)
    cases: list[dict[str, Any]] = []
    for _ in range(20):
        rank = int(rng.integers(2, 5))
        d_in, d_out = (int(size) for size in rng.integers(2, 6, 2))
        shapes = {"kernel": (d_in, d_out), "lora_a": (d_in, rank), "lora_b": (rank, d_out)}
        cases.append({name: rng.normal(size=shape) for name, shape in shapes.items()})
        cases[-1]["alpha"] = float(rng.integers(1, 40)) + 0.5  # never 1 or the rank: the scaling must show

    def right(kernel, lora_a, lora_b, alpha):
        # What the merged layer must do to each unit vector: the frozen path plus the scaled detour.
        rows = np.eye(len(kernel))
        return np.stack([row @ kernel + ((row @ lora_a) * (alpha / len(lora_b))) @ lora_b for row in rows])

    slips = {
        "the update is scaled by alpha, not by alpha / rank": lambda kernel, lora_a, lora_b, alpha: (
            kernel + alpha * lora_a @ lora_b
        ),
        "the update is not scaled by alpha / rank": lambda kernel, lora_a, lora_b, alpha: kernel + lora_a @ lora_b,
        "the scaling is alpha / sqrt(rank), which is rsLoRA's": lambda kernel, lora_a, lora_b, alpha: (
            kernel + alpha / np.sqrt(len(lora_b)) * lora_a @ lora_b
        ),
        "alpha is divided by d_in; the rank is A's second axis": lambda kernel, lora_a, lora_b, alpha: (
            kernel + alpha / len(lora_a) * lora_a @ lora_b
        ),
        "the update is returned without the kernel": lambda kernel, lora_a, lora_b, alpha: (
            alpha / len(lora_b) * lora_a @ lora_b
        ),
        "the update is taken away, not added": lambda kernel, lora_a, lora_b, alpha: (
            kernel - alpha / len(lora_b) * lora_a @ lora_b
        ),
        "the merged kernel is transposed; ours is (d_in, d_out)": lambda kernel, lora_a, lora_b, alpha: (
            (kernel + alpha / len(lora_b) * lora_a @ lora_b).T
        ),
    }
    verdict("merge", function, cases, right, slips)


def json_match(function: Callable) -> None:
    """Checks `function(answer, reference)`: True where an answer is a JSON object equal to the reference's."""
    rng = np.random.default_rng(_SEED)
    pairs: list[tuple[str, str]] = []
    for _ in range(12):
        fields: dict[str, Any] = {"date": f"20{rng.integers(10, 30)}-0{rng.integers(1, 10)}-1{rng.integers(10)}"}
        fields |= {"amount": f"{rng.integers(1, 900)}.{rng.integers(10, 100)}", "currency": "EUR", "merchant": "Café É"}
        last = rng.permutation(list(fields))[0]
        other = {name: fields[name] for name in rng.permutation(list(fields))}
        answers = [
            json.dumps(fields),
            json.dumps(other, indent=1, ensure_ascii=False),  # another order, white space, no escapes
            json.dumps(fields | {last: "other"}),  # one field wrong
            json.dumps({name: value for name, value in fields.items() if name != last}),  # one missing
            json.dumps(fields | {"note": ""}),  # one too many
            json.dumps(fields)[:-1],  # cut off
            json.dumps([fields]),  # not an object
            "Total: " + json.dumps(fields),  # text before it
        ]
        pairs += [(answer, json.dumps(fields)) for answer in answers]
    cases = [{"answer": answer, "reference": reference} for answer, reference in pairs]

    def right(answer, reference):
        try:
            given = json.loads(answer)
        except ValueError:
            return False
        wanted = json.loads(reference)
        return isinstance(given, dict) and sorted(given.items()) == sorted(wanted.items())

    def by_fields(answer, reference):
        try:
            given = json.loads(answer)
            return all(given.get(name) == value for name, value in json.loads(reference).items())
        except (ValueError, AttributeError):
            return False

    slips = {
        "texts are compared, not objects: order and white space do not matter": lambda answer, reference: (
            answer == reference
        ),
        "a field too many passes": by_fields,
    }
    verdict("json_match", function, cases, right, slips)


def points_to_gain(function: Callable) -> None:
    """Checks `function(kinds, right, kind)`: points of exact match over all lines that a kind's wrong answers cost.

    `kinds` is an array of text and `right` one of booleans, both (lines,); `kind` is one of the kinds.
    """
    rng = np.random.default_rng(_SEED)
    names = np.array(["no year", "month first", "other"])
    cases: list[dict[str, Any]] = []
    for _ in range(8):
        kinds = np.concatenate([names, rng.choice(names, int(rng.integers(3, 20)), p=(0.2, 0.2, 0.6))])
        often = rng.uniform(0.2, 0.9, len(names))
        right = rng.random(len(kinds)) < often[[list(names).index(kind) for kind in kinds]]
        right[rng.integers(len(right))] = False
        cases += [{"kinds": kinds, "right": right, "kind": str(kind)} for kind in names]

    def reference(kinds, right, kind):
        mended = [bool(ok) or of == kind for of, ok in zip(kinds, right, strict=True)]
        return 100 * (sum(mended) - sum(map(bool, right))) / len(kinds)

    slips = {
        "it is the kind's share of wrong answers; a point is a hundredth of all lines": lambda kinds, right, kind: (
            100 * np.mean(~right[kinds == kind])
        ),
        "it is divided by the number of wrong answers, not of lines": lambda kinds, right, kind: (
            100 * np.sum(~right & (kinds == kind)) / np.sum(~right)
        ),
        "the answers that are right already are counted as a gain": lambda kinds, right, kind: (
            100 * np.mean(kinds == kind)
        ),
        "the right answers are counted, not the wrong ones": lambda kinds, right, kind: (
            100 * np.mean(right & (kinds == kind))
        ),
        "exact match afterwards is returned; the gain is what is added": lambda kinds, right, kind: (
            100 * np.mean(right | (kinds == kind))
        ),
        "a share is returned; there are 100 points": lambda kinds, right, kind: np.mean(~right & (kinds == kind)),
    }
    verdict("points_to_gain", function, cases, reference, slips)
