"""Post-training quantization of a whole model: its kernels rounded to a small format and decoded again, in place.

Nothing is trained. The model computes in its own dtype, with kernels that a small format can write, so that what it
then scores is the price of the format. The bytes are those of the packed format, scales counted.

Every kernel is handed to the quantizer as a matrix (d_out, d_in) with **a row per output**, as GGUF files keep it:
`axis=0` is then per channel, and blocks of the last axis are runs of one output's inputs. Keras's `Dense` keeps
(d_in, d_out).

Reference: Nagel et al. 2021, https://arxiv.org/abs/2106.08295, section 3 (post-training quantization). There a layer's
bias, normalization and range are also corrected; here weights are rounded and nothing else.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from gemma_lora.base.keras_on_jax import keras
from gemma_lora.layers.linear import einsum_axes
from gemma_lora.layers.surgery import swap
from gemma_lora.lora.apply import TARGETS
from gemma_lora.quantization import nf4
from gemma_lora.quantization.integers import dequantize, quantize

#: A matrix (d_out, d_in) -> the matrix as it comes back, and the bytes of its packed form.
Quantizer = Callable[[np.ndarray], tuple[np.ndarray, int]]

#: What `kinds` may name: a Gemma block's linear layers, and the table that is also the last layer.
KINDS = (*TARGETS, "embedding")


class Kernel(NamedTuple):
    """A linear layer's kernel, and how it is seen as a matrix with a row per output."""

    kind: str  # among KINDS, or the layer's name
    layer: keras.layers.Layer
    variable: Any
    to_matrix: Callable[[np.ndarray], np.ndarray]  # as stored -> (d_out, d_in)
    to_kernel: Callable[[np.ndarray], np.ndarray]  # the inverse


# --- formats -----------------------------------------------------------------------------------------------


def integers(bits: int, symmetric: bool = True, axis: int | None = None, block_size: int | None = None) -> Quantizer:
    """A quantizer to integers with scales, for `quantize_kernels`.

    Args:
        bits, symmetric, axis, block_size: As in `quantization.quantize`, of a matrix (d_out, d_in): `axis=0` is per
            channel.

    Returns:
        A function of a matrix that gives `(x̂, bytes)`.

    Example:

    >>> decoded, size = integers(8, axis=0)(np.array([[-127, 50], [254, 3]], np.float32))
    >>> decoded.tolist(), size  # scales 1 and 2: 3 has no code in the second row
    ([[-127.0, 50.0], [254.0, 4.0]], 12)
    """

    def quantizer(matrix: np.ndarray) -> tuple[np.ndarray, int]:
        tensor = quantize(matrix, bits, symmetric, axis, block_size)
        return dequantize(tensor), tensor.nbytes

    return quantizer


def floats(dtype: str) -> Quantizer:
    """A quantizer to shorter floats, such as `"bfloat16"` or `"float16"`.

    Args:
        dtype: A float dtype that JAX knows.

    Returns:
        A function of a matrix that gives `(x̂, bytes)`.

    Example:

    >>> decoded, size = floats("bfloat16")(np.array([[0.1, 1.0]], np.float32))
    >>> decoded.tolist(), size
    ([[0.10009765625, 1.0]], 4)
    """
    import jax.numpy as jnp

    short = jnp.dtype(dtype)

    def quantizer(matrix: np.ndarray) -> tuple[np.ndarray, int]:
        return matrix.astype(short).astype(np.float32), matrix.size * short.itemsize

    return quantizer


def nf4_blocks(block_size: int = nf4.BLOCK_SIZE, double_quant: bool = False) -> Quantizer:
    """A quantizer to NF4, which has scales for blocks only.

    Args:
        block_size, double_quant: As in `nf4.quantize`.

    Returns:
        A function of a matrix that gives `(x̂, bytes)`.

    Example:

    >>> decoded, size = nf4_blocks()(np.ones((2, 64), np.float32))
    >>> decoded.shape, size
    ((2, 64), 72)
    """

    def quantizer(matrix: np.ndarray) -> tuple[np.ndarray, int]:
        tensor = nf4.quantize(matrix, block_size, double_quant)
        return nf4.dequantize(tensor), tensor.nbytes

    return quantizer


# --- kernels -----------------------------------------------------------------------------------------------


def kernels(model: keras.layers.Layer, kinds: Sequence[str] | None = None) -> list[Kernel]:
    """The kernels of a model's linear layers, each once.

    Args:
        model: Any built Keras model.
        kinds: Which: names among query, key, value, attention_output, gate, up, down (a Gemma's linear layers) and
            embedding. None: every `Dense` and `EinsumDense`, whatever its name, and no embedding.

    Returns:
        A list of `Kernel`.

    Raises:
        ValueError: If a kind is unknown, or the model has no kernel of a kind, or none at all.

    Example:

    >>> model = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(2, name="first")])
    >>> [(kernel.kind, kernel.to_matrix(np.asarray(kernel.variable)).shape) for kernel in kernels(model)]
    [('first', (2, 3))]
    """
    unknown = [kind for kind in kinds or () if kind not in KINDS]
    if unknown or (kinds is not None and not kinds):
        raise ValueError(f"`kinds` must name some layers among {', '.join(KINDS)}. Received: kinds={kinds!r}")
    found: dict[int, Kernel] = {}
    for layer in model._flatten_layers():
        kernel = _kernel_of(layer)
        if kernel is not None and (kernel.kind in kinds if kinds else kernel.kind != "embedding"):
            found.setdefault(id(kernel.variable), kernel)
    missing = set(kinds or ()) - {kernel.kind for kernel in found.values()}
    if missing or not found:
        raise ValueError(f"The model has no linear layer of kind {', '.join(sorted(missing)) or 'Dense'}.")
    return list(found.values())


class QuantizedKernels:
    """What `quantize_kernels` did, and the way back; as a context it restores at the end.

    Invariants: `parameters` counts the kernels' numbers and `nbytes` the bytes of their packed form. The model holds
    the decoded kernels until `restore`, and its own afterwards, bit by bit.
    """

    def __init__(self) -> None:
        self.parameters = 0
        self.nbytes = 0
        self._saved: list[tuple[Any, Any]] = []

    @property
    def bits_a_weight(self) -> float:
        """Bits of the packed form over numbers, scales counted."""
        return 8 * self.nbytes / self.parameters

    def restore(self) -> None:
        """Gives the model its own kernels back. A second call does nothing."""
        while self._saved:
            variable, value = self._saved.pop()
            variable.assign(value)

    def __enter__(self) -> QuantizedKernels:
        return self

    def __exit__(self, *error: object) -> None:
        self.restore()


def quantize_kernels(
    model: keras.layers.Layer, quantizer: Quantizer, kinds: Sequence[str] | None = None
) -> QuantizedKernels:
    """Replaces a model's kernels by their quantized and decoded values, in place.

    `kernel ← decode(encode(kernel))`, one kernel at a time; biases, normalizations and whatever is not named stay.

    Args:
        model: Any built Keras model.
        quantizer: A function of a float32 matrix (d_out, d_in) that gives `(x̂, bytes)`, such as `integers(4, axis=0)`.
        kinds: As in `kernels`.

    Returns:
        A `QuantizedKernels`: sizes, `restore()`, and a context that restores.

    Raises:
        ValueError: As in `kernels`, or if the quantizer changes a matrix's shape. The model is then as it was.

    Example:

    >>> model = keras.Sequential([keras.layers.Input((64,)), keras.layers.Dense(10)])
    >>> with quantize_kernels(model, integers(4, block_size=64)) as quantized:
    ...     quantized.bits_a_weight
    4.5
    """
    done = QuantizedKernels()
    try:
        for kernel in kernels(model, kinds):
            original = kernel.variable.value
            matrix = kernel.to_matrix(np.asarray(original, np.float32))  # (d_out, d_in)
            decoded, size = quantizer(matrix)
            if decoded.shape != matrix.shape:
                raise ValueError(f"`quantizer` must keep the shape {matrix.shape}. Received: {decoded.shape}")
            done._saved.append((kernel.variable, original))
            kernel.variable.assign(kernel.to_kernel(decoded))
            done.parameters += matrix.size
            done.nbytes += size
    except BaseException:
        done.restore()
        raise
    return done


# --- activations -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def mapped_inputs(
    model: keras.layers.Layer, function: Callable[[Kernel, Any], Any], kinds: Sequence[str] | None = None
) -> Iterator[None]:
    """Within this context, what goes into a linear layer is `function(kernel, x)` and not x.

    A function that returns x unchanged watches a model at work; one that rounds x quantizes its activations.

    Args:
        model: Any built Keras model.
        function: Called with the layer's `Kernel` and its input, a tensor (…, d_in), which may be traced.
        kinds: As in `kernels`, without embedding, whose input are tokens.

    Raises:
        ValueError: As in `kernels`, or if `kinds` names embedding.

    Example:

    >>> model = keras.Sequential([keras.layers.Input((2,)), keras.layers.Dense(3, use_bias=False)])
    >>> with mapped_inputs(model, lambda kernel, x: 0 * x):
    ...     print(float(abs(model(np.ones((1, 2), "float32"))).max()))
    0.0
    """
    if kinds is not None and "embedding" in kinds:
        raise ValueError(f"`kinds` must not name embedding: its inputs are tokens. Received: kinds={kinds!r}")
    mapped = {id(kernel.layer): _MappedInput(kernel, function) for kernel in kernels(model, kinds)}
    swap(model, lambda layer: mapped.get(id(layer), layer))
    try:
        yield
    finally:
        swap(model, lambda layer: layer.base if isinstance(layer, _MappedInput) else layer)


class _MappedInput(keras.layers.Layer):
    """A linear layer whose input goes through a function first."""

    def __init__(self, kernel: Kernel, function: Callable[[Kernel, Any], Any]):
        super().__init__(name=kernel.layer.name, dtype=kernel.layer.dtype_policy)
        self.base, self.kernel, self.function = kernel.layer, kernel, function
        self.built = True

    def call(self, inputs, training=None):
        return self.base(self.function(self.kernel, inputs), training=training)


def _kernel_of(layer: keras.layers.Layer) -> Kernel | None:
    """A layer's kernel, or None where it is no linear layer."""
    names = {name: kind for kind, name in TARGETS.items()}
    if isinstance(layer, keras.layers.Embedding):
        return Kernel("embedding", layer, layer._embeddings, lambda kernel: kernel, lambda matrix: matrix)
    if isinstance(layer, keras.layers.Dense):
        return Kernel(names.get(layer.name, layer.name), layer, layer._kernel, np.transpose, np.transpose)
    if isinstance(layer, keras.layers.EinsumDense):
        return _einsum_kernel(names.get(layer.name, layer.name), layer)
    return None


def _einsum_kernel(kind: str, layer: keras.layers.EinsumDense) -> Kernel:
    _, contracted, output, letters = einsum_axes(layer.equation)
    order = [letters.index(axis) for axis in output + contracted]  # outputs first: a row each
    sizes = [layer._kernel.shape[place] for place in order]
    d_out = math.prod(sizes[: len(output)])

    def to_matrix(kernel):
        return kernel.transpose(order).reshape(d_out, -1)  # (d_out, d_in)

    def to_kernel(matrix):
        return matrix.reshape(sizes).transpose(np.argsort(order))

    return Kernel(kind, layer, layer._kernel, to_matrix, to_kernel)
