"""A `Dense` or `EinsumDense` layer as the matrix product that it is.

LoRA, quantization and mixed precision see each linear layer of a Gemma as `(tokens, d_in) @ (d_in, d_out)`. KerasHub
stores attention's kernels with one axis for the heads, and feeds and gives arrays of three or four axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from gemma_lora.base.keras_on_jax import keras, ops


def einsum_axes(equation: str) -> tuple[str, str, str, str]:
    """Splits an `EinsumDense` equation into the axes of a matrix product.

    Args:
        equation: For example `"btd,ndh->btnh"`.

    Returns:
        `(batch, contracted, output, kernel)`: axis letters of x that stay, of x that are summed,
        of the output that come from the kernel, and of the kernel as stored. For the example:
        `("bt", "d", "nh", "ndh")`.

    Raises:
        ValueError: If the equation is not a matrix product over x's last axes (then LoRA's A and B
            cannot be the paper's).
    """
    left, output = equation.replace(" ", "").split("->")
    inputs, kernel = left.split(",")
    contracted = "".join(axis for axis in inputs if axis in kernel and axis not in output)
    new = "".join(axis for axis in output if axis in kernel and axis not in inputs)
    batch = inputs[: len(inputs) - len(contracted)]
    if inputs != batch + contracted or output != batch + new or sorted(kernel) != sorted(contracted + new):
        raise ValueError(
            f"The equation must be a matrix product over the input's last axes, such as "
            f"'btd,ndh->btnh'. Received: equation={equation!r}"
        )
    return batch, contracted, new, kernel


def is_matrix_product(layer: keras.layers.Layer) -> bool:
    """Whether a `Dense` or `EinsumDense` layer's kernel meets the last axes of its input, and those alone."""
    try:
        return isinstance(layer, keras.layers.Dense) or bool(einsum_axes(layer.equation))
    except ValueError:
        return False


def matrix_of(equation: str, kernel):
    """An `EinsumDense` kernel as stored, as the `(d_in, d_out)` matrix it is."""
    _, contracted, new, letters = einsum_axes(equation)
    sizes = dict(zip(letters, kernel.shape, strict=True))
    order = [letters.index(a) for a in contracted + new]
    d_in = math.prod(sizes[a] for a in contracted)
    return ops.reshape(ops.transpose(kernel, order), (d_in, -1))


def kernel_of(equation: str, matrix, shape: Sequence[int]):
    """A `(d_in, d_out)` matrix as an `EinsumDense` kernel of this shape; the inverse of `matrix_of`."""
    _, contracted, new, letters = einsum_axes(equation)
    sizes = dict(zip(letters, shape, strict=True))
    split = ops.reshape(matrix, [sizes[a] for a in contracted + new])  # (d_in, d_out) -> one axis a letter
    return ops.transpose(split, [(contracted + new).index(a) for a in letters])


def stored(layer: keras.layers.Layer, matrix):
    """A `(d_in, d_out)` matrix in the shape that the layer's kernel is stored in."""
    return matrix if isinstance(layer, keras.layers.Dense) else kernel_of(layer.equation, matrix, kernel_shape(layer))


def kernel_shape(layer: keras.layers.Layer) -> tuple[int, ...]:
    """The shape of a linear layer's kernel as stored; packed layers (`qlora.py`) hold no kernel and say it."""
    return tuple(getattr(layer, "kernel_shape", None) or layer._kernel.shape)


def matrix_shape(layer: keras.layers.Layer) -> tuple[int, int]:
    """`(d_in, d_out)` of the kernel of a `Dense` or `EinsumDense` layer."""
    shape = kernel_shape(layer)
    if isinstance(layer, keras.layers.Dense):
        return shape[0], shape[1]
    _, contracted, new, letters = einsum_axes(layer.equation)
    sizes = dict(zip(letters, shape, strict=True))
    return math.prod(sizes[a] for a in contracted), math.prod(sizes[a] for a in new)


def kernel_matrix(layer: keras.layers.Layer):
    """The kernel of a `Dense` or `EinsumDense` layer as `(d_in, d_out)`; a packed one is decoded."""
    return as_matrix(layer, ops.convert_to_tensor(layer._kernel))


def as_matrix(layer: keras.layers.Layer, kernel):
    """A kernel as this layer stores it, as `(d_in, d_out)`; the inverse of `stored`."""
    return kernel if isinstance(layer, keras.layers.Dense) else matrix_of(layer.equation, kernel)


def is_one_product(layer: keras.layers.Layer) -> bool:
    """Whether a layer is a product with its kernel and no more: no bias, activation, Keras's LoRA or quantization."""
    return is_plain(layer) and layer.bias is None and layer.activation in (None, keras.activations.linear)


def is_plain(layer: keras.layers.Layer) -> bool:
    """Whether a layer is a product with a kernel in floats, bias and activation aside: no LoRA of Keras's, no codes."""
    if not isinstance(layer, keras.layers.Dense | keras.layers.EinsumDense) or hasattr(layer, "encoding"):
        return False
    changed = getattr(layer, "lora_enabled", False) or getattr(layer, "quantization_mode", None)
    return is_matrix_product(layer) and not changed


def input_axes(layer: keras.layers.Layer) -> tuple[list[int], int]:
    """Sizes of the axes that `d_in` is made of, in the input's order, and how many axes stand before them."""
    if isinstance(layer, keras.layers.Dense):
        return [matrix_shape(layer)[0]], 1
    batch, contracted, _, letters = einsum_axes(layer.equation)
    sizes = dict(zip(letters, kernel_shape(layer), strict=True))
    return [sizes[a] for a in contracted], len(batch)


def output_axes(layer: keras.layers.Layer) -> list[int]:
    """Sizes of the axes that `d_out` is made of, in the output's order."""
    if isinstance(layer, keras.layers.Dense):
        return [matrix_shape(layer)[1]]
    _, _, new, letters = einsum_axes(layer.equation)
    sizes = dict(zip(letters, kernel_shape(layer), strict=True))
    return [sizes[a] for a in new]


def batch_axes(layer: keras.layers.Layer, inputs) -> tuple[int, ...]:
    """Sizes of the axes of the layer's inputs that stay."""
    count = -1 if isinstance(layer, keras.layers.Dense) else len(einsum_axes(layer.equation)[0])
    return ops.shape(inputs)[:count]


def in_rows(layer: keras.layers.Layer, inputs, product: Callable[[Any], Any]):
    """A layer's output, without bias and activation, by a product of two axes.

    Two axes: with three, XLA on the CPU is several times slower at the gradients of thin matrices.

    Args:
        layer: A `Dense` or `EinsumDense` layer, or one that took its place.
        inputs: As the layer gets them.
        product: Takes (tokens, d_in), gives (tokens, d_out).

    Returns:
        (tokens, d_out) in the shape of the layer's output.
    """
    y = product(ops.reshape(inputs, (-1, matrix_shape(layer)[0])))
    return ops.reshape(y, (*batch_axes(layer, inputs), *output_axes(layer)))
