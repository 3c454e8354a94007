"""BitNet b1.58: linear layers whose weights are −1, 0 or 1 and whose inputs are 8-bit integers, trained from the start.

    W ≈ qvalue_W · γ,  qvalue_W in {−1, 0, 1},  γ = mean |W|          one γ a matrix
    x ≈ qvalue_x · s,  qvalue_x in −127 … 127,  s = max |x| / 127     one s a token

so that y = x W ≈ s · γ · (qvalue_x qvalue_W): a sum of integers, each of them added, subtracted or left out, and one
multiplication by s · γ an output. The optimizer moves W itself, the latent weights; gradients pass the rounding as if
it were not there.

Reference: Ma et al. 2024, https://arxiv.org/abs/2402.17764, section 2; Wang et al. 2023,
https://arxiv.org/abs/2310.11453, for the layer. What the papers leave open follows "The Era of 1-bit LLMs: Training
Tips, Code and FAQ" (microsoft/unilm): the smallest scale, 1e-5, and gradients that clipping does not stop either.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gemma_lora.base.keras_on_jax import keras, ops
from gemma_lora.quantization.ternary import (
    TRITS_A_BYTE,
    activation_codes,
    activation_quantize,
    digits_of,
    pack_ternary,
    pack_two_bits,
    ternary_codes,
    ternary_quantize,
    unpack_ternary,
    unpack_two_bits,
)

__all__ = [
    "BitLinear",
    "NormLinear",
    "PackedBitLinear",
    "activation_fake_quantize",
    "activation_quantize",
    "freeze",
    "freeze_model",
    "pack_ternary",
    "pack_two_bits",
    "ternary_fake_quantize",
    "ternary_matmul",
    "ternary_quantize",
    "unpack_ternary",
    "unpack_two_bits",
]


# --- quantizers that gradients pass ------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _straight_through(x, rounded: Callable):
    return rounded(x)


# Not `x + stop_gradient(rounded(x) − x)`, the usual trick: its sum is rounded once more, off the grid of the codes.
_straight_through.defvjp(lambda x, rounded: (rounded(x), None), lambda rounded, _, gradient: (gradient,))


def _product(quantizer: Callable):
    def rounded(x):
        codes, scale = quantizer(x, jnp)
        return codes * scale

    return rounded


_TERNARY_PRODUCT, _EIGHT_BIT_PRODUCT = _product(ternary_codes), _product(activation_codes)


def ternary_fake_quantize(kernel):
    """`dequantize(ternary_quantize(kernel))` in JAX; its gradient is passed on unchanged (straight-through).

    Args:
        kernel: (d_in, d_out) floats; it may be traced.

    Returns:
        (d_in, d_out) float32, with values −γ, 0 and γ. The derivative is 1 for every weight, also where |W| > 3γ/2 and
        the code is clipped; `quantization.fake_quantize` has 0 there.

    Example:

    >>> jax.grad(lambda w: (3 * ternary_fake_quantize(w)).sum())(jnp.array([[0.1, 9.0]])).tolist()
    [[3.0, 3.0]]

    Reference: Wang et al. 2023, section 2.2; Bengio et al. 2013, https://arxiv.org/abs/1308.3432.
    """
    return _straight_through(jnp.asarray(kernel, "float32"), _TERNARY_PRODUCT)


def activation_fake_quantize(x):
    """`dequantize(activation_quantize(x))` in JAX; its gradient is passed on unchanged (straight-through).

    Args and Returns as in `ternary_fake_quantize`, for (..., d_in) floats with a scale for each token.

    Example:

    >>> activation_fake_quantize(jnp.array([127.0, 1.6])).tolist()
    [127.0, 2.0]
    """
    return _straight_through(jnp.asarray(x, "float32"), _EIGHT_BIT_PRODUCT)


def ternary_matmul(x_qvalue: Any, kernel_qvalue: Any) -> jax.Array:
    """The integer part of a BitNet product: 8-bit codes times ternary codes, summed exactly.

    y[j] = Σ over kernel_qvalue[i, j] = 1 of x_qvalue[i]  −  Σ over kernel_qvalue[i, j] = −1 of x_qvalue[i].
    It is no larger than 127 · d_in, which 32 bits hold up to d_in = 16 million.

    Args:
        x_qvalue: (..., d_in) int8.
        kernel_qvalue: (d_in, d_out) int8, in {−1, 0, 1}.

    Returns:
        (..., d_out) int32. Times both scales it is the layer's output. XLA has no ternary instruction and multiplies;
        hardware and libraries for BitNet add and subtract.

    Raises:
        ValueError: If a dtype is not int8 or the shapes do not fit.

    Example:

    >>> ternary_matmul(jnp.array([7, 5, 2], "int8"), jnp.array([[1], [-1], [0]], "int8")).tolist()
    [2]

    Reference: Ma et al. 2024, section 1 and figure 1.
    """
    x, kernel = jnp.asarray(x_qvalue), jnp.asarray(kernel_qvalue)
    for name, value in {"x_qvalue": x, "kernel_qvalue": kernel}.items():
        if value.dtype != jnp.int8:
            raise ValueError(f"`{name}` must be int8. Received: dtype={value.dtype}")
    if not x.ndim or kernel.ndim != 2 or x.shape[-1] != len(kernel):
        raise ValueError(
            f"`kernel_qvalue` must be (d_in, d_out), `x_qvalue` (..., d_in). Received: {kernel.shape}, {x.shape}"
        )
    return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=jnp.int32)


# --- layers ------------------------------------------------------------------------------------------------


@keras.saving.register_keras_serializable("gemma_lora")
class NormLinear(keras.layers.Layer):
    """RMS norm, then a matrix product without bias: a BitLinear without its two quantizers, its full-precision twin.

    y = RMSNorm(x) W,  RMSNorm(x) = x / √(mean(x²) + epsilon) · gain, over each token's numbers.

    Args:
        units: Integer d_out.
        epsilon: Float, keeps a token of zeros from being divided by zero.
        kernel_initializer: Of W (d_in, d_out); the gain starts at 1.

    Raises:
        ValueError: If `units` is not an integer of at least 1.

    Example:

    >>> bool(abs(NormLinear(1, kernel_initializer="ones")(jnp.array([[1.0, 7.0]])) - 8 / 5).item() < 1e-5)  # √25 = 5
    True
    """

    def __init__(self, units: int, epsilon: float = 1e-6, kernel_initializer: Any = "glorot_uniform", **kwargs):
        if not isinstance(units, int) or isinstance(units, bool) or units < 1:
            raise ValueError(f"`units` must be an integer of at least 1. Received: units={units!r}")
        super().__init__(**kwargs)
        self.units, self.epsilon = units, float(epsilon)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.norm = keras.layers.RMSNormalization(epsilon=epsilon, dtype=self.dtype_policy, name="norm")

    def build(self, input_shape) -> None:
        self.norm.build(input_shape)
        self.kernel = self.add_weight((input_shape[-1], self.units), self.kernel_initializer, name="kernel")

    def call(self, x):
        return ops.matmul(self.norm(x), self.kernel)  # (..., d_in) -> (..., d_out)

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], self.units)

    def get_config(self) -> dict[str, Any]:
        initializer = keras.initializers.serialize(self.kernel_initializer)
        own = {"units": self.units, "epsilon": self.epsilon, "kernel_initializer": initializer}
        return super().get_config() | own


@keras.saving.register_keras_serializable("gemma_lora")
class BitLinear(NormLinear):
    """A linear layer that computes with ternary weights and 8-bit inputs, and learns in full precision.

    y = Q_8(RMSNorm(x)) · Q_ternary(W): `activation_fake_quantize` and `ternary_fake_quantize`, with W the latent
    weights that the optimizer sees. Arguments, weights and their order are `NormLinear`'s, so weights of one fit the
    other.

    Example:

    >>> layer = BitLinear(2, kernel_initializer=lambda shape, dtype: jnp.array([[4.0, 1.0], [-4.0, 7.0]]))
    >>> layer(jnp.array([[1.0, 1.0]])).round(2).tolist()  # γ = 4; codes [[1, 0], [−1, 1]]
    [[0.0, 4.0]]

    Reference: Ma et al. 2024, section 2; the norm before the quantizer (SubLN) is Wang et al. 2023, section 2.1,
    equation 11, there a LayerNorm. RMSNorm is the FAQ's; its learned gain is LLaMA's.
    """

    def call(self, x):
        x = activation_fake_quantize(self.norm(x))  # (..., d_in)
        return ops.matmul(x, ternary_fake_quantize(self.kernel))  # (..., d_out)


@keras.saving.register_keras_serializable("gemma_lora")
class PackedBitLinear(keras.layers.Layer):
    """A BitLinear for use, not for training: five weights a byte, and integers in the product. Made by `freeze`.

    y = s · γ · ternary_matmul(round(RMSNorm(x) / s), unpacked codes).

    Invariants: `packed` is (ceil(d_in · d_out / 5),) uint8, `scale` is γ, (1, 1) float32, `norm` is the trained
    layer's. Nothing is trainable. The codes are unpacked at every call; a kernel made for it would do so in registers.

    Args:
        units: Integer d_out.
        epsilon: Float, the norm's.
    """

    def __init__(self, units: int, epsilon: float = 1e-6, **kwargs):
        super().__init__(**kwargs)
        self.units, self.epsilon = units, float(epsilon)
        self.norm = keras.layers.RMSNormalization(epsilon=epsilon, dtype=self.dtype_policy, name="norm")
        self.trainable = False

    def build(self, input_shape) -> None:
        self.norm.build(input_shape)
        self.codes_shape = (input_shape[-1], self.units)
        size = math.ceil(math.prod(self.codes_shape) / TRITS_A_BYTE)
        self.packed = self.add_weight((size,), "zeros", dtype="uint8", trainable=False, name="packed")
        self.scale = self.add_weight((1, 1), "ones", trainable=False, name="scale")

    def call(self, x):
        digits = digits_of(self.packed.value, 3, TRITS_A_BYTE, jnp).ravel()[: math.prod(self.codes_shape)]
        kernel = (digits.astype("int8") - 1).reshape(self.codes_shape)  # (d_in, d_out)
        codes, scale = activation_codes(self.norm(x), jnp)  # (..., d_in), (..., 1)
        return ternary_matmul(codes.astype("int8"), kernel) * (scale * self.scale)  # (..., d_out)

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], self.units)

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"units": self.units, "epsilon": self.epsilon}


def freeze(layer: BitLinear) -> PackedBitLinear:
    """Makes the layer to ship: codes and γ instead of the latent weights, which training alone needs.

    Args:
        layer: A built `BitLinear`. It is left as it is.

    Returns:
        A `PackedBitLinear` with the same outputs, to float32's rounding: there the scales are multiplied in before the
        sum, here after it.

    Raises:
        ValueError: If `layer` is not a BitLinear, or not built.

    Example:

    >>> layer = BitLinear(4)
    >>> x = jnp.ones((2, 3), "float32")
    >>> bool(jnp.allclose(layer(x), freeze(layer)(x), atol=1e-6))
    True
    """
    if not isinstance(layer, BitLinear) or not layer.built:
        raise ValueError(f"`layer` must be a BitLinear that is built. Received: {type(layer).__name__}")
    tensor = ternary_quantize(layer.kernel)
    frozen = PackedBitLinear(layer.units, layer.epsilon, name=layer.name, dtype=layer.dtype_policy)
    frozen.build((None, layer.kernel.shape[0]))
    frozen.norm.scale.assign(layer.norm.scale)
    frozen.packed.assign(pack_ternary(tensor.qvalue))
    frozen.scale.assign(tensor.scale)
    return frozen


def freeze_model(model: keras.Model) -> keras.Model:
    """A copy of a functional model with every BitLinear frozen; other layers are shared with the original.

    Args:
        model: A built functional Keras model.

    Returns:
        A functional model with the same outputs, to float32's rounding.

    Example:

    >>> model = keras.Sequential([keras.Input((3,)), BitLinear(4), BitLinear(2)])
    >>> [type(layer).__name__ for layer in freeze_model(model).layers]
    ['PackedBitLinear', 'PackedBitLinear']
    """
    return keras.models.clone_model(
        model, clone_function=lambda layer: freeze(layer) if isinstance(layer, BitLinear) else layer
    )
