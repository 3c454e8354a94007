"""How a linear layer forms its product: small objects with one method, `multiply(x)`.

A layer of a Gemma may hold floats, a copy rounded to bfloat16, packed codes, or LoRA beside any of these. What is
computed is what the object is; nobody sets a switch on a layer. `product_of` makes the object of a layer, once, where
weights are collected. Objects are pytrees: they pass through `jax.jit` and `jax.grad` as arguments.

Of a new method write a class with `multiply`, and a layer whose `product` gives it (CONTRIBUTING.md has the recipe).
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Mapping
from typing import Any, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp

from gemma_lora.base.keras_on_jax import keras, ops
from gemma_lora.layers import linear
from gemma_lora.layers.mixed_precision import frozen_product
from gemma_lora.quantization.packed import Encoding, packed_product
from gemma_lora.quantization.rows import Bfloat16Rows

_Class = TypeVar("_Class")


def static(**named: Any) -> Any:
    """A field of a `pytree` that is no array: part of what a compiled program depends on. It must be hashable."""
    return dataclasses.field(metadata={"static": True}, **named)


@dataclass_transform(frozen_default=True, field_specifiers=(static,))
def pytree(cls: type[_Class]) -> type[_Class]:
    """Makes a class a frozen dataclass and a pytree, whose leaves are the fields that are not `static`."""
    made = dataclasses.dataclass(frozen=True)(cls)
    kinds: dict[bool, list[str]] = {True: [], False: []}
    for field in dataclasses.fields(made):  # type: ignore[arg-type]
        kinds[field.metadata.get("static", False)].append(field.name)
    jax.tree_util.register_dataclass(made, data_fields=kinds[False], meta_fields=kinds[True])
    return made


class Matrix:
    """A matrix `(d_in, d_out)` as what it does to rows.

    Invariants: a subclass is a `pytree`. `multiply` is pure: all it depends on is in its fields.
    """

    def multiply(self, x: jax.Array) -> jax.Array:
        """`x @ matrix`: (tokens, d_in) -> (tokens, d_out), in x's dtype. A layer's bias is not part of it."""
        raise NotImplementedError

    def dense(self) -> jax.Array:
        """The matrix in floats, `(d_in, d_out)`."""
        raise NotImplementedError

    def settled(self, rounded: bool = False) -> Matrix:
        """The same matrix made ready for many products with few rows, as in generation: what can be computed once, is.

        Args:
            rounded: Whether factors may be rounded to bfloat16.
        """
        return self


@pytree
class Kernel(Matrix):
    """A kernel in floats, as its layer stores it: `equation` is its `EinsumDense`'s, or None where it is a matrix."""

    kernel: Any
    equation: str | None = static(default=None)

    def dense(self) -> jax.Array:
        return self.kernel if self.equation is None else linear.matrix_of(self.equation, self.kernel)

    def multiply(self, x):
        return x @ self.dense().astype(x.dtype)

    def settled(self, rounded: bool = False) -> Matrix:
        return Rounded(Bfloat16Rows.of(self.dense())) if rounded else self


@pytree
class Rounded(Matrix):
    """A frozen matrix `(d_in, d_out)` in bfloat16. The other factor is rounded to it too; sums are float32."""

    matrix: Any  # an array, or Bfloat16Rows

    def dense(self) -> jax.Array:
        return self.matrix.decode(jnp.bfloat16) if isinstance(self.matrix, Bfloat16Rows) else self.matrix

    def multiply(self, x):
        kernel = self.dense()
        return frozen_product(x, kernel) if kernel.dtype != x.dtype else x @ kernel


@pytree
class Packed(Matrix):
    """A frozen matrix in few bits, decoded when it is needed, forward and backward; see `packed_product`."""

    parts: Mapping[str, Any]
    encoding: Encoding = static()
    rounded: bool = static(default=False)

    def dense(self) -> jax.Array:
        return ops.transpose(self.encoding.decode(dict(self.parts)))

    def multiply(self, x):
        return packed_product(x, self.parts, self.encoding, self.rounded)


class _Reference:
    """A layer as a static field, without keeping it alive: compiled programs are kept for long, with what they name."""

    def __init__(self, layer: keras.layers.Layer):
        self._layer, self._hash = weakref.ref(layer), hash(id(layer))

    def __call__(self) -> keras.layers.Layer:
        layer = self._layer()
        if layer is None:
            raise RuntimeError("The layer of this product is gone.")
        return layer

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Reference) and self._layer() is other._layer() is not None


@pytree
class LayerCall(Matrix):
    """Whatever a Keras layer computes, its bias aside, where nothing better is known of it.

    Invariants: `values` are those of the layer's variables, in order.
    """

    values: list[Any]
    layer: _Reference = static()
    shape: tuple[int, ...] = static()  # of the axes that d_in is made of
    batch_axes: int = static()  # axes of the layer's inputs that stay

    def multiply(self, x):
        layer = self.layer()
        mapping = list(zip(layer.variables, self.values, strict=True))
        with keras.StatelessScope(state_mapping=mapping):
            y = layer(x.reshape(*(1,) * (self.batch_axes - 1), -1, *self.shape))
            bias = getattr(layer, "bias", None)
            y = y if bias is None else y - ops.cast(bias, y.dtype)
        return y.reshape(x.shape[0], -1)


@dataclasses.dataclass(frozen=True)
class Precision:
    """How products are to be formed.

    Args:
        mixed: If True, large products round their factors to bfloat16 and sum in float32.
        copies: `{id(layer): its kernel as a (d_in, d_out) bfloat16 matrix}`, where there are copies; other kernels are
            rounded when they are used.
    """

    mixed: bool = False
    copies: Mapping[int, Any] = dataclasses.field(default_factory=dict)


EXACT = Precision()


def product_of(layer: keras.layers.Layer, precision: Precision = EXACT, training: bool = False) -> Matrix:
    """The matrix that a linear layer multiplies by.

    Args:
        layer: A `Dense` or `EinsumDense`, or a layer that stands in such a one's place. One that has a method
            `product(precision, training)` says itself what it is.
        precision: A `Precision`.
        training: Whether dropout acts.

    Returns:
        A `Matrix`.

    Example:

    >>> dense = keras.layers.Dense(2, use_bias=False, kernel_initializer="ones")
    >>> dense.build((None, 3))
    >>> product_of(dense).multiply(jnp.ones((1, 3))).tolist()
    [[3.0, 3.0]]
    """
    if hasattr(layer, "product"):
        return layer.product(precision, training)
    if linear.is_one_product(layer):
        return kernel_product(layer, precision)
    return layer_call(layer)


def kernel_product(layer: keras.layers.Layer, precision: Precision = EXACT) -> Matrix:
    """A plain `Dense` or `EinsumDense` layer's kernel as a `Matrix`."""
    equation = None if isinstance(layer, keras.layers.Dense) else layer.equation
    kernel = Kernel(ops.convert_to_tensor(layer._kernel), equation)
    if not precision.mixed or kernel.kernel.dtype != "float32" or layer._kernel.trainable:
        return kernel
    copy = precision.copies.get(id(layer))
    return Rounded(kernel.dense().astype(jnp.bfloat16) if copy is None else ops.convert_to_tensor(copy))


def layer_call(layer: keras.layers.Layer) -> LayerCall:
    """Any layer as a `LayerCall`."""
    inner = layer
    while not isinstance(inner, keras.layers.Dense | keras.layers.EinsumDense) and hasattr(inner, "base"):
        inner = inner.base
    shape, batch = linear.input_axes(inner)
    values = [ops.convert_to_tensor(variable) for variable in layer.variables]
    return LayerCall(values, _Reference(layer), tuple(shape), batch)
