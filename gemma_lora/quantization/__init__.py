"""Numbers in few bits on plain arrays: integers with scales, calibration, NF4, ternary, packed matrices."""

from gemma_lora.base.lazy import lazy_names

_MODULES: dict[str, list[str]] = {
    "calibration": [
        "code_range",
        "symmetric_scale",
        "affine_parameters",
        "calibrate",
        "minmax_range",
        "percentile_range",
        "mse_range",
        "entropy_range",
    ],
    "integers": ["QuantizedTensor", "quantize", "dequantize", "fake_quantize"],
    "nf4": [],
    "packed": [
        "Parts",
        "Encoding",
        "NF4",
        "Int8",
        "Int4",
        "GGUFBlocks",
        "GGUF_KINDS",
        "SCHEMES",
        "encoding_for",
        "packed_product",
        "Int8Rows",
        "Bfloat16Rows",
    ],
    "ternary": [
        "TRITS_A_BYTE",
        "ternary_codes",
        "activation_codes",
        "ternary_quantize",
        "activation_quantize",
        "pack_ternary",
        "unpack_ternary",
        "pack_two_bits",
        "unpack_two_bits",
        "digits_of",
    ],
}
__getattr__, __dir__, __all__ = lazy_names(__name__, _MODULES)
