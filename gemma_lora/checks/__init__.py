"""The exercises' checkers: `from gemma_lora import checks`, then `checks.<exercise>(your_function)`.

A checker prints its verdict and returns nothing, and it never raises: an unanswered exercise is "not yet", and
Run All goes on.
"""

from gemma_lora.base.lazy import lazy_names

_MODULES: dict[str, list[str]] = {
    "lesson_00": [
        "share_right",
    ],
    "lesson_01": [
        "affine_by_hand",
        "block_round_trip",
        "channel_scales",
        "fold_batch_norm",
        "packed_bytes",
        "scale_and_zero_point",
        "symmetric_codes",
    ],
    "lesson_02": [
        "bias_codes",
        "integer_layer",
        "perplexity_by_hand",
        "perplexity_from_logits",
        "qat_step",
        "straight_through_gradient",
    ],
    "lesson_03": [
        "best_of_rank",
        "eliminate",
        "largest_saving_rank",
        "rank_by_hand",
        "rank_for_energy",
        "rank_with_tolerance",
        "update_spectrum",
    ],
    "lesson_04": [
        "attention_by_hand",
        "attention_weights",
        "block_parameters",
        "normalize",
        "rotate_at",
        "window_mask",
    ],
    "lesson_05": [
        "choose_rank",
        "common_rank",
        "gradient_of_a",
        "gradient_of_b",
        "lora_forward",
        "merge_rslora",
        "training_bytes_by_hand",
    ],
    "lesson_06": [
        "adapted_step",
        "adapter_count_by_hand",
        "bottleneck_adapter",
        "largest_bottleneck",
        "merged_layer",
    ],
    "lesson_07": [
        "bits_a_weight_by_hand",
        "blockwise_levels",
        "decode_scales",
        "gradient_to_the_input",
        "nearest_level",
        "unpack_nibbles",
    ],
    "lesson_08": [
        "json_match",
        "lora_count_by_hand",
        "lora_parameters",
        "loss_weights",
        "merge",
        "points_to_gain",
        "segment_mask",
    ],
    "lesson_09": [
        "deployed_output",
        "keep_wide",
        "packed_megabytes_by_hand",
        "standard_errors_apart",
        "surviving_share",
        "widest_that_fits",
    ],
    "lesson_10": [
        "add_and_subtract",
        "bit_linear",
        "latent_gradient",
        "pack_five",
        "packed_gigabytes_by_hand",
        "ternarize",
    ],
    "lesson_12": [
        "measured_slope",
        "mended_mean",
        "mended_step",
        "reported_loss_by_hand",
        "rounded_away",
        "share_that_moved",
    ],
}
__getattr__, __dir__, __all__ = lazy_names(__name__, _MODULES)
