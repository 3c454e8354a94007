"""The figures, in one visual language: arrays in, Axes out; readable in black and white, labelled, with units."""

from gemma_lora.plots.adapters import (
    adapted_block,
    adapter_diagram,
)
from gemma_lora.plots.bitnet import (
    bit_linear_diagram,
    curves_with_levels,
    spread_against,
    ternary_zones,
)
from gemma_lora.plots.failures import (
    along_gradient,
    check_grid,
    dropped_units,
    marked_rows,
    moved_bars,
)
from gemma_lora.plots.lora import (
    against_rank,
    energy_bands,
    loss_against_rate,
    stacked_memory,
)
from gemma_lora.plots.matrices import (
    break_even,
    error_against_rank,
    number_matrices,
    pictures,
    singular_values,
)
from gemma_lora.plots.numbers import (
    bit_layouts,
    error_against_size,
    error_maps,
    histogram_with_ranges,
    number_grids,
    staircase,
    value_bars,
)
from gemma_lora.plots.ptq import (
    accuracy_against_bits,
    code_histograms,
    decisions,
    integer_layer,
    perplexity_against_size,
)
from gemma_lora.plots.qlora import (
    asked_and_got,
    measured_and_planned,
    paired_losses,
    value_rows,
)
from gemma_lora.plots.sliders import (
    explore,
)
from gemma_lora.plots.style import (
    save_figure,
    show,
)
from gemma_lora.plots.training import (
    LiveLossCurve,
    attention_mask,
    before_after,
    lora_diagram,
    loss_curve,
    memory_bars,
    parameters_against_rank,
    segment_maps,
    share_bars,
)
from gemma_lora.plots.transformer import (
    attention_maps,
    lines,
    ranked_bars,
    rotations,
    token_strips,
    transformer_block,
)

__all__ = [
    "LiveLossCurve",
    "accuracy_against_bits",
    "adapted_block",
    "adapter_diagram",
    "against_rank",
    "along_gradient",
    "asked_and_got",
    "attention_maps",
    "attention_mask",
    "before_after",
    "bit_layouts",
    "bit_linear_diagram",
    "break_even",
    "check_grid",
    "code_histograms",
    "curves_with_levels",
    "decisions",
    "dropped_units",
    "energy_bands",
    "error_against_rank",
    "error_against_size",
    "error_maps",
    "explore",
    "histogram_with_ranges",
    "integer_layer",
    "lines",
    "lora_diagram",
    "loss_against_rate",
    "loss_curve",
    "marked_rows",
    "measured_and_planned",
    "memory_bars",
    "moved_bars",
    "number_grids",
    "number_matrices",
    "paired_losses",
    "parameters_against_rank",
    "perplexity_against_size",
    "pictures",
    "ranked_bars",
    "rotations",
    "save_figure",
    "segment_maps",
    "share_bars",
    "show",
    "singular_values",
    "spread_against",
    "stacked_memory",
    "staircase",
    "ternary_zones",
    "token_strips",
    "transformer_block",
    "value_bars",
    "value_rows",
]
