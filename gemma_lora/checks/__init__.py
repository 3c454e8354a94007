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
from gemma_lora.checks.lesson_02 import (
    bias_codes,
    integer_layer,
    perplexity_by_hand,
    perplexity_from_logits,
    qat_step,
    straight_through_gradient,
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
from gemma_lora.checks.lesson_06 import (
    adapted_step,
    adapter_count_by_hand,
    bottleneck_adapter,
    largest_bottleneck,
    merged_layer,
)
from gemma_lora.checks.lesson_07 import (
    bits_a_weight_by_hand,
    blockwise_levels,
    decode_scales,
    gradient_to_the_input,
    nearest_level,
    unpack_nibbles,
)
from gemma_lora.checks.lesson_08 import (
    json_match,
    lora_count_by_hand,
    lora_parameters,
    loss_weights,
    merge,
    segment_mask,
)
from gemma_lora.checks.lesson_10 import (
    add_and_subtract,
    bit_linear,
    latent_gradient,
    pack_five,
    packed_gigabytes_by_hand,
    ternarize,
)

__all__ = [
    "adapted_step",
    "adapter_count_by_hand",
    "add_and_subtract",
    "affine_by_hand",
    "attention_by_hand",
    "attention_weights",
    "best_of_rank",
    "bias_codes",
    "bit_linear",
    "bits_a_weight_by_hand",
    "block_parameters",
    "block_round_trip",
    "blockwise_levels",
    "bottleneck_adapter",
    "channel_scales",
    "choose_rank",
    "common_rank",
    "decode_scales",
    "eliminate",
    "fold_batch_norm",
    "gradient_of_a",
    "gradient_of_b",
    "gradient_to_the_input",
    "integer_layer",
    "json_match",
    "largest_bottleneck",
    "largest_saving_rank",
    "latent_gradient",
    "lora_count_by_hand",
    "lora_forward",
    "lora_parameters",
    "loss_weights",
    "merge",
    "merge_rslora",
    "merged_layer",
    "nearest_level",
    "normalize",
    "pack_five",
    "packed_bytes",
    "packed_gigabytes_by_hand",
    "perplexity_by_hand",
    "perplexity_from_logits",
    "qat_step",
    "rank_by_hand",
    "rank_for_energy",
    "rank_with_tolerance",
    "rotate_at",
    "scale_and_zero_point",
    "segment_mask",
    "straight_through_gradient",
    "symmetric_codes",
    "ternarize",
    "training_bytes_by_hand",
    "unpack_nibbles",
    "update_spectrum",
    "window_mask",
]
