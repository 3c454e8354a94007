"""LoRA layers for Keras: a frozen kernel beside a trainable product of two thin matrices.

The paper (Hu et al. 2021, https://arxiv.org/abs/2106.09685, equation 3) writes h = W0 x + (alpha/rank) B A x with
column vectors. Keras multiplies rows from the left, so here `kernel` is (d_in, d_out), `lora_a`
is (d_in, rank), `lora_b` is (rank, d_out), and

    y = x @ kernel + scaling * (x @ lora_a) @ lora_b

The product `lora_a @ lora_b` is formed only to merge. With DoRA the outputs are scaled too; `dora.py` has that
mathematics, `products.py` how the products are formed. These layers work on any Keras model; KerasHub's Gemma is one
of them.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np

from gemma_lora.base.files import GemmaLoraError
from gemma_lora.base.keras_on_jax import keras, ops
from gemma_lora.layers import linear
from gemma_lora.layers.products import EXACT, Matrix, Precision, kernel_product, product_of
from gemma_lora.lora import dora as dora_numbers
from gemma_lora.lora.keras_files import Beside, ByPosition
from gemma_lora.lora.products import WithDoRA, WithLoRA


class LoRALayer(keras.layers.Layer):
    """What `LoRADense` and `LoRAEinsumDense` share: A, B, the scaling, DoRA's magnitude, merge and unmerge.

    Invariants: `base` is frozen; `lora_a` is (d_in, rank) and `lora_b` is (rank, d_out), both
    float32; while `merged` is True the base kernel holds kernel + delta (with DoRA, scaled) and the layer adds
    nothing. `activation` is the base's, which has none meanwhile. Scaling and merged are variables. `used_rank` is the
    rank of the adapter that is in the layer, 0 for none: columns of A and rows of B behind it are zero. With DoRA
    `magnitude` (d_out,) is trained too, and `kernel_squares` (d_out,) says how long the base kernel's columns are while
    it is not merged.
    """

    def __init__(
        self,
        base: keras.layers.Layer,
        rank: int,
        alpha: float | None = None,
        dropout: float = 0.0,
        rslora: bool = False,
        dora: bool = False,
        seed: int | None = None,
        **kwargs,
    ):
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise ValueError(f"`rank` must be an integer of at least 1. Received: rank={rank!r}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"`dropout` must be in [0, 1). Received: dropout={dropout!r}")
        if not base.built:
            raise ValueError(f"Build layer {base.name!r} before it is given LoRA: its kernel is needed.")
        kwargs.setdefault("name", base.name)
        kwargs.setdefault("dtype", base.dtype_policy)
        super().__init__(**kwargs)
        self.base = base
        self.rank = self.used_rank = rank
        self.alpha = float(2 * rank if alpha is None else alpha)
        self.rslora = bool(rslora)
        self.dora = bool(dora)
        self.dropout_rate = float(dropout)
        self.seed = seed
        self.trained_on: Any = None  # the base that an adapter's folder named, while it is the one it was trained on
        self._undo: dora_numbers.Undo | None = None  # while merged with DoRA
        self.dropout = keras.layers.Dropout(dropout, seed=seed) if dropout else None
        for variable in base.variables:
            variable.trainable = False
        self._add_factors()
        self._add_state()
        if dora:
            self._add_magnitude()
        self.beside = Beside(self, LoRALayer.own_variables)
        self.supports_masking = base.supports_masking
        # The activation comes after the sum, so it moves from the base to this layer.
        self.activation = base.activation
        base.activation = keras.activations.linear
        self.built = True

    @property
    def is_packed(self) -> bool:
        """Whether the base holds its weights in few bits (`qlora.py`): nothing can be added to them."""
        return hasattr(self.base, "encoding")

    @property
    def scaling(self) -> float:
        """alpha / rank, or alpha / sqrt(rank) with rsLoRA (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732)."""
        rank = self.used_rank
        return self.alpha / (math.sqrt(rank) if self.rslora else rank) if rank else 0.0

    @property
    def merged(self) -> bool:
        """Whether the base kernel holds the update. Not to be asked inside a traced function: there it is data."""
        return bool(self.is_merged.value)

    def _add_factors(self) -> None:
        d_in, d_out = self.matrix_shape()
        # PEFT's start: kaiming_uniform(a=sqrt(5)) on A, which is U(-1/sqrt(d_in), 1/sqrt(d_in)); zeros on B.
        limit = 1.0 / math.sqrt(d_in)
        self.lora_a = self.add_weight(
            name="lora_a",
            shape=(d_in, self.rank),
            initializer=keras.initializers.RandomUniform(-limit, limit, seed=self.seed),
            dtype="float32",
        )
        self.lora_b = self.add_weight(name="lora_b", shape=(self.rank, d_out), initializer="zeros", dtype="float32")

    def _add_magnitude(self) -> None:
        """DoRA's magnitude, which starts at the norms of the kernel's columns: the layer then changes nothing."""
        squares = dora_numbers.column_squares(linear.kernel_matrix(self.base))
        named = {"shape": squares.shape, "dtype": "float32", "initializer": "zeros", "autocast": False}
        self.magnitude = self.add_weight(name="magnitude", **named)
        self.magnitude.assign(ops.sqrt(squares))
        self.kernel_squares = self.add_weight(name="kernel_squares", trainable=False, **named)
        self.kernel_squares.assign(squares)

    def _add_state(self) -> None:
        """Scaling and whether the update is merged: variables, so that a compiled program sees them change."""
        named = {"shape": (), "trainable": False, "autocast": False, "initializer": "zeros"}
        self.scaling_factor = self.add_weight(name="scaling_factor", dtype="float32", **named)
        self.scaling_factor.assign(self.scaling)
        self.is_merged = self.add_weight(name="is_merged", dtype="bool", **named)

    def put(self, lora_a, lora_b, alpha: float, rslora: bool = False, magnitude=None) -> None:
        """Gives the layer the numbers of another adapter. Shapes stay, so nothing is compiled again.

        Args:
            lora_a, lora_b: (d_in, r) and (r, d_out) with r up to `rank`; r = 0 leaves the base alone.
            alpha, rslora: As when the layer is made, for the rank r.
            magnitude: (d_out,), DoRA's; None for the length of the kernel's columns.

        Raises:
            ValueError: If r is larger than the layer's rank.
            GemmaLoraError: If the update is merged into the kernel.
        """
        if self.merged:
            raise GemmaLoraError("The update is merged into the kernel. Call `unmerge_lora(model)` first.")
        if lora_a.shape[1] > self.rank:
            raise ValueError(f"`lora_a` must have up to {self.rank} columns. Received: {lora_a.shape[1]}")
        self.used_rank, self.alpha, self.rslora = lora_a.shape[1], float(alpha), bool(rslora)
        behind = (0, self.rank - self.used_rank)
        self.lora_a.assign(np.pad(lora_a, ((0, 0), behind)))
        self.lora_b.assign(np.pad(lora_b, (behind, (0, 0))))
        self.scaling_factor.assign(self.scaling)
        if self.dora:
            self.magnitude.assign(ops.sqrt(self.kernel_squares.value) if magnitude is None else magnitude)

    def matrix_shape(self) -> tuple[int, int]:
        """`(d_in, d_out)` of the kernel seen as a matrix."""
        return linear.matrix_shape(self.base)

    def to_matrix(self, kernel):
        """The base's kernel as stored, as the `(d_in, d_out)` matrix it is."""
        return linear.as_matrix(self.base, kernel)

    def delta(self):
        """The update scaling * A @ B, `(d_in, d_out)`, float32."""
        return self.scaling * ops.matmul(self.lora_a, self.lora_b)

    def product(self, precision: Precision = EXACT, training: bool = False) -> Matrix:
        """What this layer multiplies by: see `layers.products.product_of`."""
        base = self._base_product(precision, training)
        merged = self.is_merged.value
        traced = isinstance(merged, jax.core.Tracer)
        if not traced and bool(merged):
            return base
        scaling = ops.where(merged, 0.0, self.scaling_factor.value) if traced else self.scaling_factor.value
        dropout = self._drop if training and self.dropout is not None else None
        lora = WithLoRA(base, self.lora_a.value, self.lora_b.value, scaling, precision.mixed, dropout)
        if not self.dora:
            return lora
        return WithDoRA(lora, self._base_product(), self.magnitude.value, self.kernel_squares.value, merged)

    def _base_product(self, precision: Precision = EXACT, training: bool = False) -> Matrix:
        if linear.is_plain(self.base):
            return kernel_product(self.base, precision)
        return product_of(self.base, precision, training)

    def _drop(self, x):
        return x if self.dropout is None else self.dropout(x, training=True)

    def column_scale(self):
        """DoRA's factor of each output, magnitude / ||kernel + delta||: `(d_out,)`, float32; ones while merged."""
        product = self.product()
        return product.column_scale() if isinstance(product, WithDoRA) else ops.ones(self.matrix_shape()[1:])

    def whole_matrix(self):
        """Kernel and update in one matrix, `(d_in, d_out)`, in the kernel's dtype."""
        return self.product().dense()

    def call(self, inputs, training=None):
        y = self._sum(inputs, training)
        return y if self.activation is None else self.activation(y)

    def _sum(self, inputs, training):
        """What comes before the activation."""
        inputs = ops.convert_to_tensor(inputs)  # a NumPy array of float64 becomes what JAX computes in
        merged = self.is_merged.value
        if not isinstance(merged, jax.core.Tracer):
            return self.base(inputs) if bool(merged) else self._adapted(inputs, bool(training))
        # In a compiled program both are there, and one is run: a merged layer costs what its base costs.
        # New functions each time: JAX keeps what it traced of a function, and here that holds the variables' tracers.
        return jax.lax.cond(merged, lambda x: self.base(x), lambda x: self._adapted(x, bool(training)), inputs)

    def _adapted(self, inputs, training: bool):
        """With the update beside the base, which is called as it is: not a bit changes while B is zero."""
        product = self.product(training=training)
        if isinstance(product, WithLoRA):
            return self.base(inputs) + linear.in_rows(self.base, inputs, product.dropped_update)
        y = linear.in_rows(self.base, inputs, product.multiply)
        return y if self.base.bias is None else y + ops.cast(self.base.bias, y.dtype)

    # --- Keras's files and exports ---------------------------------------------------------------------------

    def own_variables(self) -> dict[str, keras.Variable]:
        """What this layer holds beside its base, by name."""
        names = ("lora_a", "lora_b", *(("magnitude", "kernel_squares") if self.dora else ()))
        return {name: getattr(self, name) for name in (*names, "scaling_factor", "is_merged")}

    def save_own_variables(self, store):
        """Writes what a plain layer reads: the kernel with the update in it, and the bias. See `keras_files.py`."""
        self._require_plain_base()
        kernel = ops.cast(linear.stored(self.base, self.whole_matrix()), self.base.variable_dtype)
        store["0"] = kernel
        if self.base.bias is not None:
            store["1"] = self.base.bias

    def load_own_variables(self, store):
        """Reads nothing: the base reads its kernel, and `beside` the rest."""

    @property
    def weights(self):
        """As Keras's. By its place a weight is given only while the base's kernel is what the layer multiplies by."""
        own, base = super().weights, self.base.weights
        traced = isinstance(self.is_merged.value, jax.core.Tracer)
        if not traced and self.merged and linear.is_plain(self.base):
            return [*base, *(weight for weight in own if all(weight is not other for other in base))]
        return ByPosition(
            own,
            f"Layer {self.path!r} has LoRA beside its kernel, so no single weight is what it multiplies by. Call "
            "`merge_lora(model)` and `detach_lora(model)` before KerasHub exports the model"
            + (", and `dequantize_base(model)` before them." if self.is_packed else "."),
        )

    def enable_lora(self, *args, **kwargs):
        """Refuses Keras's own LoRA under ours."""
        raise GemmaLoraError(
            f"Layer {self.name!r} has gemma_lora's LoRA; Keras's `enable_lora` under it would be lost when an adapter "
            "is saved. Call `detach_lora(model)` first."
        )

    def _require_plain_base(self) -> None:
        """Raises if Keras's own LoRA or quantization has been put on the base since."""
        if not self.is_packed and not linear.is_plain(self.base):
            mode = getattr(self.base, "quantization_mode", None)
            what = f"Keras's own quantization ({mode})" if mode else "Keras's own LoRA (`enable_lora`)"
            raise GemmaLoraError(
                f"Layer {self.name!r} has {what} under gemma_lora's LoRA, and the update cannot be added to that. Load "
                "the model anew; `quantize_base` packs a model that is to get LoRA."
            )

    def merge(self) -> None:
        """Adds the update to the base kernel; the layer then costs what the base costs."""
        self._require_plain_base()
        if self.is_packed:
            raise GemmaLoraError(
                f"Layer {self.name!r} holds its weights in few bits, which an update cannot be added to. "
                "Keep the adapter apart, or call `dequantize_base(model)` first."
            )
        if not self.merged:
            whole = self.whole_matrix()
            if self.dora:
                self._undo = dora_numbers.Undo.of(linear.kernel_matrix(self.base), self.column_scale())
            self._set_kernel(whole)
            self.is_merged.assign(True)

    def unmerge(self) -> None:
        """Takes the update out of the base kernel again (exact to rounding of the kernel's dtype)."""
        if self.merged:
            whole, delta = ops.cast(linear.kernel_matrix(self.base), "float32"), self.delta()
            self._set_kernel(whole - delta if self._undo is None else self._undo.kernel(whole, delta))
            self.is_merged.assign(False)
            self._undo = None

    def _set_kernel(self, matrix) -> None:
        kernel = self.base._kernel
        kernel.assign(ops.cast(linear.stored(self.base, matrix), kernel.dtype))

    def compute_output_shape(self, input_shape):
        return self.base.compute_output_shape(input_shape)

    def get_config(self):
        config = super().get_config()
        self.base.activation = self.activation
        try:
            base = keras.saving.serialize_keras_object(self.base)
        finally:
            self.base.activation = keras.activations.linear
        of_rank = math.sqrt(self.rank) if self.rslora else self.rank
        return config | {
            "base": base,
            "rank": self.rank,
            "alpha": self.alpha if self.used_rank == self.rank else self.scaling * of_rank,
            "dropout": self.dropout_rate,
            "rslora": self.rslora,
            "dora": self.dora,
            "seed": self.seed,
        }

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        config["base"] = keras.saving.deserialize_keras_object(config["base"])
        return cls(**config)


@keras.saving.register_keras_serializable(package="gemma_lora")
class LoRADense(LoRALayer):
    """A frozen `keras.layers.Dense` with a trainable low-rank update.

    `y = activation(x @ kernel + bias + scaling * (x @ lora_a) @ lora_b)`

    Args:
        base: A built `Dense` layer. It is frozen.
        rank: Integer, the update's rank.
        alpha: Float; the update is scaled by alpha / rank. Defaults to `2 * rank`, a scaling of 2.
        dropout: Float in [0, 1), on the update's input while training.
        rslora: If True the scaling is alpha / sqrt(rank).
        dora: If True, DoRA: each output is scaled by magnitude / norm, with a trainable `magnitude` (d_out,) and the
            norm of that output's column of kernel + scaling * lora_a @ lora_b.
        seed: Integer seed of A's start and of dropout.

    Example:

    >>> dense = keras.layers.Dense(4); dense.build((None, 3))
    >>> layer = LoRADense(dense, rank=2, alpha=4)
    >>> [tuple(v.shape) for v in layer.trainable_variables]
    [(3, 2), (2, 4)]

    Reference: Hu et al. 2021, section 4.1; the paper writes B A for our A @ B. DoRA: `dora.py`.
    """

    def __init__(self, base, rank, **kwargs):
        if not isinstance(base, keras.layers.Dense):
            raise ValueError(f"`base` must be a keras.layers.Dense. Received: {type(base).__name__}")
        super().__init__(base, rank, **kwargs)


@keras.saving.register_keras_serializable(package="gemma_lora")
class LoRAEinsumDense(LoRALayer):
    """A frozen `keras.layers.EinsumDense` with a trainable low-rank update, added before bias and activation.

    Heads are flattened into `d_out` (or `d_in` for the attention output), so A and B have the
    paper's and PEFT's shapes, unlike `EinsumDense.enable_lora`, whose A has one slice a head.

    Args:
        base: A built `EinsumDense` whose equation is a matrix product over the input's last axes. It is frozen.
        rank, alpha, dropout, rslora, dora, seed: As in `LoRADense`.

    Example:

    >>> query = keras.layers.EinsumDense("btd,ndh->btnh", output_shape=(None, 4, 16))
    >>> query.build((None, None, 32))
    >>> LoRAEinsumDense(query, rank=8).matrix_shape()
    (32, 64)
    """

    def __init__(self, base, rank, **kwargs):
        if not isinstance(base, keras.layers.EinsumDense):
            raise ValueError(f"`base` must be a keras.layers.EinsumDense. Received: {type(base).__name__}")
        linear.einsum_axes(base.equation)  # raises if it is no matrix product
        super().__init__(base, rank, **kwargs)
