"""VeRA (Kopiczko et al. 2023, https://arxiv.org/abs/2310.11454), written as a user of the package would: one module.

y = x @ kernel + ((x @ a) * d) @ b * g, where `a` and `b` are random and frozen and the vectors `d` and `g` are trained.
"""

import jax
import jax.numpy as jnp
import keras

from gemma_lora.layers import linear
from gemma_lora.layers.products import EXACT, Matrix, product_of, pytree


@pytree
class WithVeRA(Matrix):
    """A base matrix with VeRA's update beside it."""

    base: Matrix
    a: jax.Array  # (d_in, rank)
    b: jax.Array  # (rank, d_out)
    d: jax.Array  # (rank,)
    g: jax.Array  # (d_out,)

    def dense(self):
        return self.base.dense() + (self.a * self.d) @ self.b * self.g

    def multiply(self, x):
        return self.base.multiply(x) + ((x @ self.a) * self.d) @ self.b * self.g


class VeRA(keras.layers.Layer):
    """A linear layer with VeRA."""

    def __init__(self, base, rank=4, seed=0):
        super().__init__(name=base.name, dtype=base.dtype_policy)
        self.base = base
        base.trainable = False
        d_in, d_out = linear.matrix_shape(base)
        normal = keras.initializers.RandomNormal(0.1, seed=seed)
        self.a = self.add_weight(name="a", shape=(d_in, rank), initializer=normal, trainable=False)
        self.b = self.add_weight(name="b", shape=(rank, d_out), initializer=normal.clone(), trainable=False)
        self.d = self.add_weight(name="d", shape=(rank,), initializer="ones")
        self.g = self.add_weight(name="g", shape=(d_out,), initializer="zeros")
        self.built = True

    def product(self, precision=EXACT, training=False):
        base = product_of(self.base, precision, training)
        return WithVeRA(base, *(jnp.asarray(v.value) for v in (self.a, self.b, self.d, self.g)))

    def call(self, inputs, training=None):
        return linear.in_rows(self.base, inputs, self.product().multiply)
