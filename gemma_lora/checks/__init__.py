"""The exercises' checkers: `from gemma_lora import checks`, then `checks.<exercise>(your_function)`.

A checker prints its verdict and returns nothing, and it never raises: an unanswered exercise is "not yet", and
Run All goes on.
"""

from gemma_lora.checks.lesson_01 import (
    affine_by_hand,
    block_round_trip,
    channel_scales,
    fold_batch_norm,
    packed_bytes,
    scale_and_zero_point,
    symmetric_codes,
)
from gemma_lora.checks.lesson_08 import (
    json_match,
    lora_count_by_hand,
    lora_parameters,
    loss_weights,
    merge,
    segment_mask,
)

__all__ = [
    # lesson 01
    "affine_by_hand",
    "block_round_trip",
    "channel_scales",
    "fold_batch_norm",
    "packed_bytes",
    "scale_and_zero_point",
    "symmetric_codes",
    # lesson 08
    "json_match",
    "lora_count_by_hand",
    "lora_parameters",
    "loss_weights",
    "merge",
    "segment_mask",
]
