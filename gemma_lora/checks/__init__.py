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
from gemma_lora.checks.lesson_03 import (
    best_of_rank,
    eliminate,
    largest_saving_rank,
    rank_by_hand,
    rank_for_energy,
    rank_with_tolerance,
    update_spectrum,
)
from gemma_lora.checks.lesson_04 import (
    attention_by_hand,
    attention_weights,
    block_parameters,
    normalize,
    rotate_at,
    window_mask,
)
from gemma_lora.checks.lesson_05 import (
    choose_rank,
    common_rank,
    gradient_of_a,
    gradient_of_b,
    lora_forward,
    merge_rslora,
    training_bytes_by_hand,
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
    "affine_by_hand",
    "attention_by_hand",
    "attention_weights",
    "best_of_rank",
    "block_parameters",
    "block_round_trip",
    "channel_scales",
    "choose_rank",
    "common_rank",
    "eliminate",
    "fold_batch_norm",
    "gradient_of_a",
    "gradient_of_b",
    "json_match",
    "largest_saving_rank",
    "lora_count_by_hand",
    "lora_forward",
    "lora_parameters",
    "loss_weights",
    "merge",
    "merge_rslora",
    "normalize",
    "packed_bytes",
    "rank_by_hand",
    "rank_for_energy",
    "rank_with_tolerance",
    "rotate_at",
    "scale_and_zero_point",
    "segment_mask",
    "symmetric_codes",
    "training_bytes_by_hand",
    "update_spectrum",
    "window_mask",
]
