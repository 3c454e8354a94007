"""Replay: text that the base model wrote itself, mixed in among the training lines, so that it forgets less.

Trained on short answers alone, a model soon gives them everywhere. Text drawn from the base model holds it in place:
the gradient of its loss is, on average, that of the divergence KL(base || model), which is zero as long as nothing is
forgotten. Measured in `benchmarks/forgetting.py`.

Reference: Robins 1995, "Catastrophic forgetting, rehearsal and pseudorehearsal", Connection Science 7(2), for the idea
of rehearsing what the network itself gives.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from gemma_lora.base.settings import REPLAY_SHARE
from gemma_lora.data.encoding import Encoded


def default_share(epochs: int) -> float:
    """The share of replay where nobody says it: none for a single pass, in which little is forgotten.

    Example:

    >>> default_share(1), default_share(4)
    (0.0, 0.1)
    """
    return REPLAY_SHARE if epochs > 1 else 0.0


def with_replay(
    encoded: Encoded, texts: Sequence[np.ndarray], share: float, epoch: int = 0, most: int = 2**31
) -> Encoded:
    """Training lines with replay among them.

    Args:
        encoded: The lines.
        texts: Token ids of the base model's own text, one int array a text, `<bos>` first (`base_text` draws them).
        share: Float in [0, 1): the share of all tokens that are replay, as near as whole texts come to it.
        epoch: Integer; each epoch goes on in the texts where the last one stopped, and begins again at their end.
        most: Integer, the most tokens of a text; longer ones are cut.

    Returns:
        An `Encoded` with the texts behind the lines, every token but `<bos>` carrying loss; the lines themselves if
        `share` is 0.

    Raises:
        ValueError: If `share` is not as above, or there is no text of two tokens or more.

    Example:

    >>> lines = Encoded([np.arange(9)], [np.ones(9, bool)])
    >>> len(with_replay(lines, [np.arange(4)], share=0.5).tokens)
    3
    """
    if not 0 <= share < 1:
        raise ValueError(f"`share` must be at least 0 and below 1. Received: share={share!r}")
    if not share:
        return encoded
    usable = [np.asarray(text, np.int32)[:most] for text in texts if len(text[:most]) > 1]
    if not usable:
        raise ValueError("`texts` must hold at least one text of two tokens or more.")
    wanted = share / (1 - share) * sum(map(len, encoded.tokens))
    per_epoch = max(1, round(wanted / np.mean([len(text) for text in usable])))
    taken = [usable[number % len(usable)] for number in range(epoch * per_epoch, (epoch + 1) * per_epoch)]
    masks = [np.arange(len(text)) > 0 for text in taken]
    return dataclasses.replace(encoded, tokens=[*encoded.tokens, *taken], loss_mask=[*encoded.loss_mask, *masks])
