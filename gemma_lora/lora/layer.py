"""LoRA layers for Keras: a frozen kernel beside a trainable product of two thin matrices.

The paper (Hu et al. 2021, https://arxiv.org/abs/2106.09685, equation 3) writes h = W0 x + (alpha/rank) B A x with
column vectors. Keras multiplies rows from the left, so here `kernel` is (d_in, d_out), `lora_a`
is (d_in, rank), `lora_b` is (rank, d_out), and

    y = x @ kernel + scaling * (x @ lora_a) @ lora_b

The product `lora_a @ lora_b` is formed only to merge. With DoRA the outputs are scaled too; `dora.py` has that
mathematics. These layers work on any Keras model; KerasHub's Gemma is one of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from gemma_lora.base.files import GemmaLoraError
from gemma_lora.base.keras_on_jax import keras, ops
from gemma_lora.layers import linear
from gemma_lora.layers.mixed_precision import frozen_product, low_rank_product, product
from gemma_lora.lora import dora as dora_numbers

#: Our names for a Gemma block's linear layers -> KerasHub's layer names.
TARGETS = {
    "query": "query",
    "key": "key",
    "value": "value",
    "attention_output": "attention_output",
    "gate": "ffw_gating",
    "up": "ffw_gating_2",
    "down": "ffw_linear",
}
#: What `targets="all-linear"` means.
ALL_LINEAR = tuple(TARGETS)


class _LoRALayer(keras.layers.Layer):
    """What `LoRADense` and `LoRAEinsumDense` share: A, B, the scaling, DoRA's magnitude, merge and unmerge.

    Invariants: `base` is frozen; `lora_a` is (d_in, rank) and `lora_b` is (rank, d_out), both
    float32; while `merged` is True the base kernel holds kernel + delta (with DoRA, scaled) and the layer adds
    nothing. With DoRA `magnitude` (d_out,) is trained too, and `kernel_squares` (d_out,) says how long the base
    kernel's columns are while it is not merged.
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
        self.rank = rank
        self.alpha = float(rank if alpha is None else alpha)
        self.rslora = bool(rslora)
        self.dora = bool(dora)
        self.dropout_rate = float(dropout)
        self.seed = seed
        self.merged = False
        # Functions that give a (d_in, d_out) matrix to use in the kernel's place, or None:
        # the frozen kernel in bfloat16, while training in mixed precision (`FineTuner`)
        self.rounded_kernel: Callable[[], Any] | None = None
        # the kernel with the update added, while generating (`generation.generate`)
        self.whole_kernel: Callable[[], Any] | None = None
        # In the place of `column_scale`, the same computed once, while generating.
        self.fixed_scale: Callable[[], Any] | None = None
        self._undo: dora_numbers.Undo | None = None  # while merged with DoRA
        self.dropout = keras.layers.Dropout(dropout, seed=seed) if dropout else None
        for variable in base.variables:
            variable.trainable = False
        self._add_factors()
        if dora:
            self._add_magnitude()
        self.built = True

    @property
    def is_packed(self) -> bool:
        """Whether the base holds its weights in few bits (`qlora.py`): nothing can be added to them."""
        return hasattr(self.base, "encoding")

    @property
    def scaling(self) -> float:
        """alpha / rank, or alpha / sqrt(rank) with rsLoRA (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732)."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

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

    def matrix_shape(self) -> tuple[int, int]:
        """`(d_in, d_out)` of the kernel seen as a matrix."""
        return linear.matrix_shape(self.base)

    def to_matrix(self, kernel):
        """The base's kernel as stored, as the `(d_in, d_out)` matrix it is."""
        return linear.as_matrix(self.base, kernel)

    def delta(self):
        """The update scaling * A @ B, `(d_in, d_out)`, float32."""
        return self.scaling * ops.matmul(self.lora_a, self.lora_b)

    def column_scale(self):
        """DoRA's factor of each output, magnitude / ||kernel + delta||: `(d_out,)`, float32. Not while merged."""
        if self.fixed_scale is not None:
            return self.fixed_scale()
        factors = (self.lora_a.value, self.lora_b.value)
        kernel = linear.kernel_matrix(self.base)
        norms = dora_numbers.column_norms(kernel, self.kernel_squares.value, *factors, self.scaling)
        return dora_numbers.column_scale(self.magnitude.value, norms)

    def whole_matrix(self):
        """Kernel and update in one matrix, `(d_in, d_out)`, in the kernel's dtype."""
        kernel = linear.kernel_matrix(self.base)
        if self.merged:
            return kernel
        whole = ops.cast(kernel, "float32") + self.delta()
        return ops.cast(self.column_scale() * whole if self.dora else whole, kernel.dtype)

    def call(self, inputs, training=None):
        inputs = ops.convert_to_tensor(inputs)  # a NumPy array of float64 becomes what JAX computes in
        if self.whole_kernel is not None and self.base.bias is None:
            return linear.in_rows(self.base, inputs, lambda x: product(x, self.whole_kernel()))
        y = self._frozen_output(inputs, training)
        if self.merged:
            return y
        dropped = inputs if self.dropout is None else self.dropout(inputs, training=training)
        lora_a = ops.cast(self.lora_a, dropped.dtype)
        lora_b = ops.cast(self.lora_b * self.scaling, dropped.dtype)
        form = low_rank_product if self._rounds(dropped, training) else lambda x, a, b: ops.matmul(ops.matmul(x, a), b)
        update = linear.in_rows(self.base, dropped, lambda x: form(x, lora_a, lora_b))
        if not self.dora:
            return y + update
        return self._scaled_output(y, update, dropped if training and self.dropout is not None else None, training)

    def _scaled_output(self, y, update, dropped, training):
        """DoRA's output from the base's `y` and LoRA's update.

        scale * (x @ kernel + update) + bias. Where dropout gave the update other inputs, DoRA's change to the kernel's
        product takes them too, as PEFT has it: y + (scale - 1) * (dropped @ kernel) + scale * update.
        """
        bias = None if self.base.bias is None else ops.cast(self.base.bias, y.dtype)
        straight = y if dropped is None else self._frozen_output(dropped, training)
        if bias is not None:
            straight = straight - bias
        rest = bias if dropped is None else y - straight
        scale = ops.reshape(self.column_scale(), linear.output_axes(self.base))
        return dora_numbers.output(straight, update, scale, rest)

    def _frozen_output(self, inputs, training):
        """The base layer's output; in mixed precision while training, if that is asked for."""
        if self.is_packed or not self._rounds(inputs, training) or self.base.bias is not None:
            return self.base(inputs)
        return linear.in_rows(self.base, inputs, lambda x: frozen_product(x, self.rounded_kernel()))

    def _rounds(self, inputs, training) -> bool:
        """Whether this call's products are formed in mixed precision."""
        asked_for = self.base.mixed_precision if self.is_packed else self.rounded_kernel is not None
        return bool(training and asked_for and not self.merged and inputs.dtype == "float32")

    def merge(self) -> None:
        """Adds the update to the base kernel; the layer then costs what the base costs."""
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
            self.merged = True

    def unmerge(self) -> None:
        """Takes the update out of the base kernel again (exact to rounding of the kernel's dtype)."""
        if self.merged:
            whole, delta = ops.cast(linear.kernel_matrix(self.base), "float32"), self.delta()
            self._set_kernel(whole - delta if self._undo is None else self._undo.kernel(whole, delta))
            self.merged, self._undo = False, None

    def _set_kernel(self, matrix) -> None:
        kernel = self.base._kernel
        kernel.assign(ops.cast(linear.stored(self.base, matrix), kernel.dtype))

    def compute_output_shape(self, input_shape):
        return self.base.compute_output_shape(input_shape)

    def get_config(self):
        config = super().get_config()
        return config | {
            "base": keras.saving.serialize_keras_object(self.base),
            "rank": self.rank,
            "alpha": self.alpha,
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
class LoRADense(_LoRALayer):
    """A frozen `keras.layers.Dense` with a trainable low-rank update.

    `y = activation(x @ kernel + bias + scaling * (x @ lora_a) @ lora_b)`

    Args:
        base: A built `Dense` layer. It is frozen.
        rank: Integer, the update's rank.
        alpha: Float; the update is scaled by alpha / rank. Defaults to `rank`, a scaling of 1.
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
        # The activation comes after the sum, so it moves from the base to this layer.
        self.activation = base.activation
        base.activation = keras.activations.linear

    def call(self, inputs, training=None):
        return self.activation(super().call(inputs, training=training))

    def get_config(self):
        self.base.activation = self.activation
        try:
            return super().get_config()
        finally:
            self.base.activation = keras.activations.linear


@keras.saving.register_keras_serializable(package="gemma_lora")
class LoRAEinsumDense(_LoRALayer):
    """A frozen `keras.layers.EinsumDense` with a trainable low-rank update.

    Heads are flattened into `d_out` (or `d_in` for the attention output), so A and B have the
    paper's and PEFT's shapes, unlike `EinsumDense.enable_lora`, whose A has one slice a head.

    Args:
        base: A built `EinsumDense` without activation, whose equation is a matrix product over the
            input's last axes. It is frozen.
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
        if base.activation is not keras.activations.linear:
            raise ValueError(f"Layer {base.name!r} has an activation; LoRA is added before it and cannot be.")
        linear.einsum_axes(base.equation)  # raises if it is no matrix product
        super().__init__(base, rank, **kwargs)


def target_names(targets: str | Sequence[str]) -> tuple[str, ...]:
    """Checks `targets` and returns them as a tuple in the block's order.

    Args:
        targets: `"all-linear"`, or any of query, key, value, attention_output, gate, up, down.

    Raises:
        ValueError: If a name is unknown or none is given.
    """
    if targets == "all-linear":
        return ALL_LINEAR
    names = (targets,) if isinstance(targets, str) else tuple(targets)
    unknown = [name for name in names if name not in TARGETS]
    if unknown or not names:
        raise ValueError(
            f"`targets` must name layers among {', '.join(TARGETS)}, or be 'all-linear'. Received: targets={targets!r}"
        )
    return tuple(name for name in TARGETS if name in names)


def _replace(parent: keras.layers.Layer, attribute: str, layer: keras.layers.Layer) -> None:
    """Sets a sub-layer of a built layer, in its attribute and in Keras's tracking of sub-layers."""
    old = getattr(parent, attribute)
    # Keras locks a built layer's tracker; its own enable_lora unlocks it in the same way.
    parent._tracker.unlock()
    try:
        setattr(parent, attribute, layer)
    finally:
        parent._tracker.lock()
    others = [tracked for tracked in parent._layers if tracked is not layer]
    parent._layers[:] = [layer if tracked is old else tracked for tracked in others]


def forget_replaced(model: keras.layers.Layer) -> None:
    """Frees the weights of layers that others have taken the place of.

    A compiled model (KerasHub's are) remembers which of its layers were trainable then, and so keeps them in memory.
    """
    state = vars(model).get("_compiled_trainable_state") or {}
    held = {id(layer) for layer in model._flatten_layers()}
    for layer in [layer for layer in state if id(layer) not in held]:
        del state[layer]


def linear_layers(model: keras.layers.Layer) -> Iterator[tuple[keras.layers.Layer, str, keras.layers.Layer]]:
    """Yields `(parent, attribute, layer)` for each linear layer held as another layer's attribute."""
    for parent in model._flatten_layers():
        if isinstance(parent, _LoRALayer):
            continue
        for attribute, value in list(vars(parent).items()):
            if isinstance(value, keras.layers.Dense | keras.layers.EinsumDense | _LoRALayer):
                yield parent, attribute, value


def plain_layers(model: keras.layers.Layer) -> Iterator[tuple[keras.layers.Layer, str, keras.layers.Layer]]:
    """Those of `linear_layers` that are matrix products of a kernel in floats, without LoRA."""
    for parent, attribute, layer in linear_layers(model):
        if not isinstance(layer, _LoRALayer) and not hasattr(layer, "encoding") and linear.is_matrix_product(layer):
            yield parent, attribute, layer


def apply_lora(
    model: keras.Model,
    rank: int = 8,
    alpha: float | None = None,
    targets: str | Sequence[str] = ("query", "value"),
    dropout: float = 0.0,
    rslora: bool = False,
    dora: bool = False,
    seed: int = 0,
) -> keras.Model:
    """Gives a model's targeted linear layers LoRA, in place, and freezes everything else.

    Args:
        model: A KerasHub Gemma `CausalLM` or backbone, or any built Keras model that holds layers of
            these names as attributes of other layers.
        rank: Integer, the update's rank.
        alpha: Float; scaling is alpha / rank. Defaults to `2 * rank`.
        targets: Any of query, key, value, attention_output, gate, up, down, or `"all-linear"`.
        dropout: Float in [0, 1).
        rslora: If True scaling is alpha / sqrt(rank).
        dora: If True, DoRA (Liu et al. 2024, https://arxiv.org/abs/2402.09353): each output's column of the kernel is
            split into its length, which is trained as it is, and its direction, which LoRA changes. With dropout a
            training step then forms each frozen product twice.
        seed: Integer; layer i starts from seed + i.

    Returns:
        The same model.

    Raises:
        ValueError: If the model has LoRA already, or no layer matches a target.
    """
    if lora_layers(model):
        raise ValueError("The model has LoRA already. Call `detach_lora(model)` first.")
    wanted = {TARGETS[name]: name for name in target_names(targets)}
    found = [hit for hit in linear_layers(model) if hit[2].name in wanted]
    missing = set(wanted) - {layer.name for _, _, layer in found}
    if missing:
        raise ValueError(f"No layer of the model is named {', '.join(sorted(missing))}; nothing was changed.")
    for variable in model.variables:
        variable.trainable = False
    for index, (parent, attribute, layer) in enumerate(found):
        cls = LoRADense if isinstance(layer, keras.layers.Dense) else LoRAEinsumDense
        new = cls(
            layer,
            rank,
            alpha=2.0 * rank if alpha is None else alpha,
            dropout=dropout,
            rslora=rslora,
            dora=dora,
            seed=seed + index,
        )
        _replace(parent, attribute, new)
    return model


def lora_layers(model: keras.layers.Layer) -> list[_LoRALayer]:
    """The model's LoRA layers, in the model's order."""
    return [layer for layer in model._flatten_layers() if isinstance(layer, _LoRALayer)]


def _required_layers(model: keras.layers.Layer) -> list[_LoRALayer]:
    layers = lora_layers(model)
    if not layers:
        raise GemmaLoraError("The model has no LoRA layers. Call `apply_lora` or `load_adapter` first.")
    return layers


def merge_lora(model: keras.Model) -> None:
    """Adds every update to its kernel; the model then runs at the base model's speed."""
    for layer in _required_layers(model):
        layer.merge()


def unmerge_lora(model: keras.Model) -> None:
    """Undoes `merge_lora`, exact to rounding."""
    for layer in _required_layers(model):
        layer.unmerge()


def detach_lora(model: keras.Model) -> None:
    """Takes the LoRA layers out and gives the base layers back; a merged update stays in the kernels."""
    for parent, attribute, layer in list(linear_layers(model)):
        if isinstance(layer, _LoRALayer):
            if isinstance(layer, LoRADense):
                layer.base.activation = layer.activation
            _replace(parent, attribute, layer.base)
