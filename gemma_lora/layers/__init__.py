"""A layer seen as a matrix, how its product is formed, the loss, rematerialization, BitNet's layers."""

from gemma_lora.base.lazy import lazy_names

_MODULES: dict[str, list[str]] = {
    "bitnet": [
        "ternary_fake_quantize",
        "activation_fake_quantize",
        "ternary_matmul",
        "NormLinear",
        "BitLinear",
        "PackedBitLinear",
        "freeze",
        "freeze_model",
    ],
    "gated_gelu": [],
    "linear": [
        "einsum_axes",
        "is_matrix_product",
        "matrix_of",
        "kernel_of",
        "stored",
        "kernel_shape",
        "matrix_shape",
        "kernel_matrix",
        "as_matrix",
        "is_one_product",
        "is_plain",
        "input_axes",
        "output_axes",
        "batch_axes",
        "in_rows",
    ],
    "loss": ["NEGLIGIBLE", "table_rows", "chunked_cross_entropy", "fitting_chunk", "token_scores"],
    "mixed_precision": ["frozen_product", "low_rank_product", "batched_product"],
    "products": [
        "Matrix",
        "Kernel",
        "Rounded",
        "Packed",
        "LayerCall",
        "Precision",
        "EXACT",
        "product_of",
        "pytree",
        "static",
    ],
    "remat": ["recomputed"],
    "surgery": ["replace"],
}
__getattr__, __dir__, __all__ = lazy_names(__name__, _MODULES)
