"""The figures, in one visual language: arrays in, Axes out; readable in black and white, labelled, with units."""

from gemma_lora.base.lazy import lazy_names

_MODULES: dict[str, list[str]] = {
    "adapters": [
        "adapted_block",
        "adapter_diagram",
    ],
    "bitnet": [
        "bit_linear_diagram",
        "curves_with_levels",
        "spread_against",
        "ternary_zones",
    ],
    "failures": [
        "along_gradient",
        "check_grid",
        "dropped_units",
        "marked_rows",
        "moved_bars",
    ],
    "lora": [
        "against_rank",
        "energy_bands",
        "loss_against_rate",
        "stacked_memory",
    ],
    "matrices": [
        "break_even",
        "error_against_rank",
        "number_matrices",
        "pictures",
        "singular_values",
    ],
    "numbers": [
        "bit_layouts",
        "error_against_size",
        "error_maps",
        "histogram_with_ranges",
        "number_grids",
        "staircase",
        "value_bars",
    ],
    "ptq": [
        "accuracy_against_bits",
        "code_histograms",
        "decisions",
        "integer_layer",
        "perplexity_against_size",
    ],
    "qlora": [
        "asked_and_got",
        "measured_and_planned",
        "paired_losses",
        "value_rows",
    ],
    "scores": [
        "confusion_matrices",
        "confusion_matrix",
        "validation_losses",
    ],
    "sliders": [
        "explore",
    ],
    "style": [
        "save_figure",
        "show",
    ],
    "training": [
        "LiveLossCurve",
        "attention_mask",
        "before_after",
        "lora_diagram",
        "loss_curve",
        "memory_bars",
        "parameters_against_rank",
        "segment_maps",
        "share_bars",
    ],
    "transformer": [
        "attention_maps",
        "lines",
        "ranked_bars",
        "rotations",
        "token_strips",
        "transformer_block",
    ],
}
__getattr__, __dir__, __all__ = lazy_names(__name__, _MODULES)
