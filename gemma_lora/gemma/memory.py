"""Where the bytes of fine-tuning go: weights, gradients, optimizer, activations, logits, quantization constants.

Everything is arithmetic on a model's shape; nothing is loaded. Counts of parameters are exact. Bytes of activations
are those that this project's training keeps for the backward pass, counted array by array in `activation_floats`.

Reference: Rajbhandari et al. 2020, "ZeRO" (https://arxiv.org/abs/1910.02054), section 3, for the parts; Korthikanti
et al. 2022, https://arxiv.org/abs/2205.05198, section 4.1, for counting activations. Both count half precision and
dropout masks, which are not here.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from gemma_lora.base.settings import DEFAULTS

#: Bytes of a number, and bits of a weight with its constants (blocks of 64; NF4's scales themselves in 8 bits).
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
BITS = {"int8": 8.0, "int4": 4.0, "nf4": 4.0}
CONSTANT_BITS = {"int8": 0.0, "int4": 32 / 64, "nf4": 8 / 64 + 32 / (64 * 256)}
METHODS = ("full", "lora", "qlora")
#: What a process holds before any weight, measured on Linux: Python, KerasHub, JAX, compiled programs.
PROCESS_BYTES = 850_000_000
#: Adam's two moments; arrays of the size of the logits that a plain cross-entropy holds (logits, softmax, its
#: gradient).
MOMENTS, FULL_LOGITS = 2, 3


@dataclasses.dataclass(frozen=True)
class Configuration:
    """The shape of a decoder-only transformer.

    Invariants: `heads` is a multiple of `key_value_heads`. `hidden` is the MLP's width between its products. `family`
    is "gemma", "gemma2", "gemma3" or "gpt"; the first three have tied embeddings, a gated MLP and no biases.
    """

    name: str
    family: str
    layers: int
    width: int
    heads: int
    key_value_heads: int
    head_size: int
    hidden: int
    vocabulary: int
    positions: int = 0  # learned position embeddings: GPT's

    def matrices(self) -> dict[str, tuple[int, int]]:
        """A block's linear layers: `{name: (d_in, d_out)}`."""
        inner, key_value = self.heads * self.head_size, self.key_value_heads * self.head_size
        shapes = {
            "query": (self.width, inner),
            "key": (self.width, key_value),
            "value": (self.width, key_value),
            "attention_output": (inner, self.width),
            "gate": (self.width, self.hidden),
            "up": (self.width, self.hidden),
            "down": (self.hidden, self.width),
        }
        if self.family == "gpt":
            del shapes["gate"]
        return shapes


def _gemma(
    family: str, name: str, layers: int, width: int, heads: int, key_value_heads: int, head_size: int, hidden: int
) -> Configuration:
    vocabulary = 262_144 if family == "gemma3" else 256_000
    return Configuration(name, family, layers, width, heads, key_value_heads, head_size, hidden, vocabulary)


#: By KerasHub's preset names, and a model of GPT-3's shape (Brown et al. 2020, table 2.1). `configuration_of` reads
#: any Gemma.
CONFIGURATIONS: dict[str, Configuration] = {
    configuration.name: configuration
    for configuration in (
        # layers, width, heads, key-value heads, head size, hidden
        _gemma("gemma", "gemma_2b_en", 18, 2048, 8, 1, 256, 16384),
        _gemma("gemma", "gemma_7b_en", 28, 3072, 16, 16, 256, 24576),
        _gemma("gemma2", "gemma2_2b_en", 26, 2304, 8, 4, 256, 9216),
        _gemma("gemma2", "gemma2_9b_en", 42, 3584, 16, 8, 256, 14336),
        _gemma("gemma2", "gemma2_27b_en", 46, 4608, 32, 16, 128, 36864),
        _gemma("gemma3", "gemma3_270m", 18, 640, 4, 1, 256, 2048),
        _gemma("gemma3", "gemma3_1b", 26, 1152, 4, 1, 256, 6912),
        _gemma("gemma3", "gemma3_4b_text", 34, 2560, 8, 4, 256, 10240),
        _gemma("gemma3", "gemma3_12b_text", 48, 3840, 16, 8, 256, 15360),
        _gemma("gemma3", "gemma3_27b_text", 62, 5376, 32, 16, 128, 21504),
        Configuration("gpt3_175b", "gpt", 96, 12288, 96, 96, 128, 49152, vocabulary=50257, positions=2048),
    )
}


def configuration_of(backbone: Any, name: str = "model") -> Configuration:
    """The configuration of a KerasHub Gemma 1, 2 or 3 backbone.

    Args:
        backbone: `GemmaBackbone` or `Gemma3Backbone`.
        name: A name for tables.
    """
    family = "gemma3" if type(backbone).__name__ == "Gemma3Backbone" else "gemma"
    if family == "gemma" and backbone.use_post_attention_norm:
        family = "gemma2"
    return Configuration(
        name,
        family,
        backbone.num_layers,
        backbone.hidden_dim,
        backbone.num_query_heads,
        backbone.num_key_value_heads,
        backbone.head_dim,
        # KerasHub's blocks of Gemma 1 and 2 halve this number; Gemma 3's take it as it is.
        backbone.intermediate_dim if family == "gemma3" else backbone.intermediate_dim // 2,
        backbone.vocabulary_size,
    )


# --- parameters --------------------------------------------------------------------------------------------


def parameters(configuration: Configuration) -> int:
    """The number of parameters, embeddings counted once.

    Example:

    >>> parameters(CONFIGURATIONS["gemma3_270m"])
    268098176
    """
    return configuration.layers * _block_parameters(configuration) + _outside_blocks(configuration)


def linear_parameters(configuration: Configuration) -> int:
    """The number of weights in the blocks' linear layers: what LoRA stands beside and QLoRA quantizes."""
    return configuration.layers * sum(d_in * d_out for d_in, d_out in configuration.matrices().values())


def _block_parameters(c: Configuration) -> int:
    matrices = c.matrices().values()
    products = sum(d_in * d_out for d_in, d_out in matrices)
    if c.family == "gpt":
        return products + sum(d_out for _, d_out in matrices) + 4 * c.width  # biases; two norms with scale and shift
    norms = {"gemma": 2 * c.width, "gemma2": 4 * c.width, "gemma3": 4 * c.width + 2 * c.head_size}
    return products + norms[c.family]


def _outside_blocks(c: Configuration) -> int:
    """Embeddings, learned positions, the last norm."""
    return (c.vocabulary + c.positions) * c.width + c.width * (2 if c.family == "gpt" else 1)


def target_names(configuration: Configuration, targets: str | Sequence[str]) -> tuple[str, ...]:
    """Checks LoRA's targets, `"all-linear"` or names of the configuration's linear layers: each once, in order."""
    names = tuple(configuration.matrices())
    if targets == "all-linear":
        return names
    chosen = (targets,) if isinstance(targets, str) else tuple(targets)
    if not chosen or any(name not in names for name in chosen):
        raise ValueError(
            f"`targets` must name layers among {', '.join(names)}, or be 'all-linear'. Received: targets={targets!r}"
        )
    return tuple(name for name in names if name in chosen)


def lora_parameters(
    configuration: Configuration, rank: int, targets: str | Sequence[str] = DEFAULTS.targets, dora: bool = False
) -> int:
    """The trainable numbers of LoRA: `rank · (d_in + d_out)` for each target in each block, and DoRA's d_out more.

    Args:
        configuration: The model's shape.
        rank: Integer of at least 1.
        targets: `"all-linear"`, or any of query, key, value, attention_output, gate, up, down.
        dora: Whether there is a magnitude for each output.

    Returns:
        An integer.

    Raises:
        ValueError: If an argument is not as above.

    Example:

    >>> lora_parameters(CONFIGURATIONS["gpt3_175b"], rank=1, targets=("query", "value"))
    4718592

    Reference:
        Hu et al. 2021, https://arxiv.org/abs/2106.09685, section 4.2 and table 4 (4.7 million: rank 1 on query and
        value).
    """
    _integer("rank", rank)
    shapes = configuration.matrices()
    factors = configuration.layers * sum(rank * sum(shapes[name]) for name in target_names(configuration, targets))
    return factors + (configuration.layers * _outputs(configuration, targets) if dora else 0)


def _outputs(c: Configuration, targets: str | Sequence[str]) -> int:
    """The targets' outputs in one block: DoRA's magnitudes."""
    shapes = c.matrices()
    return sum(shapes[name][1] for name in target_names(c, targets))


# --- bytes -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes of one training step, part by part; `total` is their sum.

    `process` is what Python and its libraries hold on a CPU; on an accelerator they are in the host's memory, and it
    is 0.
    """

    configuration: Configuration
    method: str
    trainable: int
    weights: int
    constants: int
    copies: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    process: int

    PARTS = ("weights", "constants", "copies", "gradients", "optimizer", "activations", "logits", "process")

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """`{part: bytes}` in the order of `PARTS`."""
        return {name: getattr(self, name) for name in self.PARTS}


def activation_floats(
    configuration: Configuration, row_length: int, targets: str | Sequence[str] = "all-linear"
) -> int:
    """Numbers that one block keeps for the backward pass, a token.

    Eight arrays as wide as the model (the residual stream before each half; what goes into and comes out of the
    norms), three of the queries' size and four of the keys' (before and after norm and rotation, and the attention's
    result), and two of the attention weights' (before and after the softmax). Of the MLP's hidden width gate and up,
    and what goes into `down` if that is among the trained `targets`: `gated_gelu` needs no more. In a GPT, up,
    its activation and a copy.
    """
    c = configuration
    attention = 3 * c.heads * c.head_size + 4 * c.key_value_heads * c.head_size + 2 * c.heads * row_length
    hidden = 3 if c.family == "gpt" or targets == "all-linear" or "down" in targets else 2
    return 8 * c.width + attention + hidden * c.hidden


def plan(
    configuration: Configuration,
    method: str = "lora",
    rank: int = DEFAULTS.rank,
    targets: str | Sequence[str] = DEFAULTS.targets,
    dora: bool = False,
    rows: int = DEFAULTS.rows,
    row_length: int = DEFAULTS.row_length,
    dtype: str = "float32",
    quantization: str = "nf4",
    remat: bool = False,
    mixed_precision: bool = False,
    full_logits: bool = False,
    accelerator: bool = False,
) -> Plan:
    """Computes where the bytes of a training step go.

    Args:
        configuration: The model's shape, from `CONFIGURATIONS` or `configuration_of`.
        method: `"full"` trains all weights, `"lora"` A and B, `"qlora"` A and B beside quantized linear layers and
            an embedding in int8 rows.
        rank, targets, dora: LoRA's, see `lora_parameters`. DoRA also keeps the squares of the columns' norms, and each
            target's output from before it is scaled.
        rows, row_length: A batch is `rows` × `row_length` tokens.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`, of weights that are not quantized, of activations and, in full
            fine-tuning, of gradients. Adam's moments, A and B and their gradients are float32.
        quantization: `"nf4"`, `"int4"` or `"int8"`, with `method="qlora"`.
        remat: Whether activations inside a block are computed again in the backward pass.
        mixed_precision: Whether bfloat16 copies of the weights are kept beside float32 ones (`FineTuner`'s setting). A
            CPU without bfloat16 products, where it does not pay, takes more: XLA (jax 0.10.2) widens the kernels again.
        full_logits: Whether the loss forms all logits, as a plain cross-entropy does.
        accelerator: Whether the process's own memory is elsewhere, on a host.

    Returns:
        A `Plan`.

    Raises:
        ValueError: If an argument is not as above.

    Example:

    >>> plan(CONFIGURATIONS["gemma3_270m"], method="full").optimizer == 8 * 268098176
    True
    """
    c = configuration
    for name, value, known in (
        ("method", method, METHODS),
        ("dtype", dtype, tuple(BYTES)),
        ("quantization", quantization, tuple(BITS)),
    ):
        if value not in known:
            raise ValueError(f"`{name}` must be one of {', '.join(known)}. Received: {name}={value!r}")
    for name, number in (("rank", rank), ("rows", rows), ("row_length", row_length)):
        _integer(name, number)
    size, tokens = BYTES[dtype], rows * row_length
    everything = parameters(c)
    trainable = everything if method == "full" else lora_parameters(c, rank, targets, dora)
    weights, constants = _weight_bytes(c, method, quantization, size)
    scaled = _outputs(c, targets) if dora and method != "full" else 0
    adapter = 0 if method == "full" else BYTES["float32"] * (trainable + c.layers * scaled)
    one_block = activation_floats(c, row_length, "all-linear" if method == "full" else targets) + scaled
    floats = c.layers * c.width + one_block if remat else c.layers * one_block
    logits = FULL_LOGITS * BYTES["float32"] * c.vocabulary if full_logits else BYTES["float32"] * 2 * c.width
    # Mixed precision holds every frozen kernel and the embedding beside the weights.
    rounded = linear_parameters(c) + c.vocabulary * c.width if mixed_precision and method == "lora" else 0
    return Plan(
        c,
        method,
        trainable,
        weights=weights + adapter,
        constants=constants,
        copies=BYTES["bfloat16"] * rounded,
        gradients=(size if method == "full" else BYTES["float32"]) * trainable,
        optimizer=MOMENTS * BYTES["float32"] * trainable,
        activations=size * floats * tokens,
        logits=logits * tokens,
        process=0 if accelerator else PROCESS_BYTES,
    )


def _weight_bytes(c: Configuration, method: str, quantization: str, size: int) -> tuple[int, int]:
    """`(weights, constants)` of the base model in bytes."""
    everything, linear = parameters(c), linear_parameters(c)
    if method != "qlora":
        return size * everything, 0
    embedding = c.vocabulary * c.width  # int8, one float32 scale a row
    packed = round(linear * BITS[quantization] / 8)
    columns = c.layers * sum(d_out for _, d_out in c.matrices().values()) if quantization == "int8" else 0
    constants = round(linear * CONSTANT_BITS[quantization] / 8) + 4 * (columns + c.vocabulary)
    return packed + embedding + size * (everything - linear - embedding), constants


def most_rows(configuration: Configuration, memory: int, **named: Any) -> int:
    """The most rows a batch can have within so many bytes.

    Args:
        configuration: The model's shape.
        memory: Integer, bytes.
        **named: `plan`'s other arguments, without `rows`.

    Returns:
        An integer; 0 where not even one row fits.
    """
    one, two = (plan(configuration, rows=rows, **named).total for rows in (1, 2))
    return 0 if one > memory else 1 + (memory - one) // (two - one)  # every part is linear in the rows


def parse_bytes(text: str) -> int:
    """Reads a size such as "16GB", "7.5 GiB" or "800 MB"; a bare number is in GB.

    Returns:
        Bytes: 10^9 a GB, 2^30 a GiB.

    Raises:
        ValueError: If the text is no size above zero.

    Example:

    >>> parse_bytes("16GB"), parse_bytes("1 GiB")
    (16000000000, 1073741824)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text, re.IGNORECASE)
    if not match or float(match[1]) == 0:
        raise ValueError(f"expected a size such as 16GB or 8GiB, got {text!r}")
    power = "kmgt".index(match[2].lower() or "g") + 1
    return round(float(match[1]) * (1024 if match[3] else 1000) ** power)


def _integer(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"`{name}` must be an integer of at least 1. Received: {name}={value!r}")
