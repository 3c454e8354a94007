"""QLoRA: a Gemma whose frozen weights stay in few bits while LoRA trains beside them.

`quantize_base` replaces the kernels of the blocks' linear layers by packed ones (`packed.py`), which are decoded when
a product needs them, forward and backward, and not kept. The tied embedding becomes 8-bit rows: tokens look theirs up,
and the loss decodes a thousand at a time. Norms stay as they are. LoRA, adapters, training and generation work on such
a model as on any other; only merging does not, since an update cannot be added to codes.

Reference: Dettmers et al. 2023, https://arxiv.org/abs/2305.14314, section 3. The paper keeps the embedding in 16 bits.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from gemma_lora.base.files import GemmaLoraError
from gemma_lora.base.keras_on_jax import keras, ops
from gemma_lora.layers import linear
from gemma_lora.layers.products import EXACT, Packed, Precision
from gemma_lora.layers.surgery import forget_replaced, in_graphs, replace, replace_in_graph
from gemma_lora.lora.apply import lora_layers, plain_layers
from gemma_lora.lora.keras_files import Beside, ByPosition
from gemma_lora.quantization import packed
from gemma_lora.quantization.packed import SCHEMES as SCHEMES
from gemma_lora.quantization.packed import encoding_for as encoding_for

# --- layers -----------------------------------------------------------------------------------------------------


_PACKED_WEIGHTS = "The model holds its weights in few bits. Call `dequantize_base(model)` before KerasHub exports it."


class _PackedLayer:
    """What `PackedDense` and `PackedEinsumDense` share.

    Invariants: `parts` are frozen variables from which `encoding` decodes the kernel as a `(d_out, d_in)` matrix;
    there is no other kernel. `kernel_shape` is the kernel's shape in the layer that was replaced.
    """

    activation: Any  # the Keras layer's

    def pack(self, layer: keras.layers.Layer, encoding: packed.Encoding, parts: dict[str, np.ndarray]) -> None:
        """Takes over a built layer: its name, bias and activation, and packed arrays for its kernel."""
        self.kernel_shape = linear.kernel_shape(layer)
        self.encoding = encoding
        self.bias = layer.bias
        if self.bias is not None:
            self.bias.trainable = False
        self.parts: dict[str, keras.Variable] = {}
        for name, array in parts.items():
            self.parts[name] = _frozen_weight(self, name, array)
        self.beside = Beside(self, lambda layer: dict(layer.parts))  # type: ignore[arg-type]
        self.built = True

    def save_own_variables(self, store):
        """Writes what a plain layer reads: the decoded kernel and the bias. See `keras_files.py`."""
        store["0"] = linear.stored(self, self.matrix())  # type: ignore[arg-type]
        if self.bias is not None:
            store["1"] = self.bias

    def load_own_variables(self, store):
        """Reads the bias; `beside` reads the packed kernel."""
        if self.bias is not None:
            self.bias.assign(store["1"])

    @property
    def weights(self):
        """As Keras's, but none is given by its place: the kernel is none of them."""
        return ByPosition(super().weights, _PACKED_WEIGHTS)  # type: ignore[misc]

    @property
    def nbytes(self) -> int:
        """Bytes of the packed kernel, scales included."""
        return _bytes_of(self.parts.values())

    def values(self) -> dict[str, Any]:
        return {name: variable.value for name, variable in self.parts.items()}

    def matrix(self):
        """The kernel, decoded: `(d_in, d_out)` float32."""
        return self.product().dense()

    def product(self, precision: Precision = EXACT, training: bool = False) -> Packed:
        """What this layer multiplies by: see `layers.products.product_of`."""
        return Packed(self.values(), self.encoding, precision.mixed)

    def call(self, inputs, training=None):
        y = linear.in_rows(self, inputs, self.product().multiply)
        if self.bias is not None:
            y = y + ops.cast(self.bias, y.dtype)
        return y if self.activation is None else self.activation(y)


def _frozen_weight(layer: Any, name: str, array: np.ndarray) -> keras.Variable:
    """Adds a variable of any dtype that holds an array and is never trained."""
    named = {"name": name, "shape": array.shape, "dtype": str(array.dtype), "initializer": "zeros"}
    weight = layer.add_weight(**named, trainable=False, autocast=False)
    weight.assign(array)
    return weight


class PackedDense(_PackedLayer, keras.layers.Dense):
    """A frozen `Dense` layer whose kernel is packed. Made by `quantize_base`."""

    def build(self, input_shape):
        raise ValueError("A packed layer takes over a built one: use `quantize_base`.")

    @property
    def _kernel(self):
        return self.matrix()


class PackedEinsumDense(_PackedLayer, keras.layers.EinsumDense):
    """A frozen `EinsumDense` layer, a matrix product over the input's last axes, whose kernel is packed."""

    def build(self, input_shape):
        raise ValueError("A packed layer takes over a built one: use `quantize_base`.")

    @property
    def _kernel(self):
        return linear.kernel_of(self.equation, self.matrix(), self.kernel_shape)


class PackedEmbedding(keras.layers.Layer):
    """A frozen tied embedding in 8-bit rows, in the place of KerasHub's `ReversibleEmbedding`.

    Args:
        plain: The embedding whose place it takes; only its configuration is kept.
        rows: The table.
    """

    def __init__(self, plain: keras.layers.Layer, rows: packed.Int8Rows, **kwargs):
        super().__init__(name=plain.name, dtype=plain.dtype_policy, **kwargs)
        self.plain_config = plain.get_config()
        self.input_dim, self.output_dim = plain.input_dim, plain.output_dim
        self.logit_soft_cap, self.tie_weights = plain.logit_soft_cap, True
        self.row_codes = _frozen_weight(self, "row_codes", np.asarray(rows.codes))
        self.row_scales = _frozen_weight(self, "row_scales", np.asarray(rows.scales))
        self.beside = Beside(self, lambda layer: {"codes": layer.row_codes, "scales": layer.row_scales})
        self.built = True

    def save_own_variables(self, store):
        """Writes what a plain embedding reads: the decoded table. See `keras_files.py`."""
        store["0"] = self.embeddings

    def load_own_variables(self, store):
        """Reads nothing; `beside` reads the rows."""

    @property
    def weights(self):
        """As Keras's, but none is given by its place: the table is none of them."""
        return ByPosition(super().weights, _PACKED_WEIGHTS)

    @property
    def embeddings(self):
        """The whole table in floats: for small models and for tests."""
        return self.rows().decode(self.compute_dtype)

    def rows(self) -> packed.Int8Rows:
        """The table as it is stored."""
        return packed.Int8Rows(self.row_codes.value, self.row_scales.value)

    def call(self, inputs, reverse=False):
        if reverse:
            hidden = ops.reshape(inputs, (-1, self.output_dim))
            logits = ops.transpose(self.rows().product(hidden))  # (tokens, V)
            logits = ops.reshape(logits, (*ops.shape(inputs)[:-1], self.input_dim))
            cap = self.logit_soft_cap
            return logits if cap is None else cap * ops.tanh(logits / cap)
        return self.rows().take(ops.cast(inputs, "int32")).decode(self.compute_dtype)

    def compute_output_spec(self, inputs, reverse=False):
        last = (self.input_dim,) if reverse else (self.output_dim,)
        shape = inputs.shape[:-1] if reverse else inputs.shape
        return keras.KerasTensor((*shape, *last), dtype=self.compute_dtype)


# Keras's files find a layer of a functional model by its class's name, and a plain model has this one there.
PackedEmbedding.__name__ = "ReversibleEmbedding"


def pack_embedding(model: keras.Model, rows: packed.Int8Rows) -> None:
    """Puts an embedding in packed rows in the place of a Gemma's tied embedding.

    Args:
        model: A KerasHub Gemma `CausalLM`, or a backbone that is in none.
        rows: The table.
    """
    embedding = _tied_embedding(model)
    if embedding is None or not getattr(embedding, "tie_weights", False):
        name = getattr(embedding, "name", None)
        raise GemmaLoraError(f"Layer {name!r} has a separate output table; only tied embeddings are packed.")
    _exchange_embedding(model, PackedEmbedding(embedding, rows))


def _exchange_embedding(model: keras.Model, new: keras.layers.Layer) -> None:
    embedding = _tied_embedding(model)
    if not in_graphs(embedding, (model, getattr(model, "backbone", model))):
        raise GemmaLoraError("The backbone's embedding is also part of another model. Give that model: the `CausalLM`.")
    replace_in_graph(model, embedding, new)


def head_table(embedding: keras.layers.Layer) -> Any:
    """The tied table as the loss takes it: an array (V, D), or `Int8Rows` where it is packed."""
    if mode := getattr(embedding, "quantization_mode", None):
        raise GemmaLoraError(
            f"Keras's own quantization ({mode}) is on the embedding, whose codes are no weights. Load the model anew; "
            "`quantize_base(model)` packs it."
        )
    return embedding.rows() if hasattr(embedding, "rows") else ops.convert_to_tensor(embedding.embeddings)


# --- models ----------------------------------------------------------------------------------------------------


def quantize_base(
    model: keras.Model,
    scheme: str = "nf4",
    double_quant: bool = False,
    block_size: int = 64,
    embedding: bool = True,
) -> keras.Model:
    """Packs a Gemma's weights into few bits, in place. Call it before `apply_lora`.

    Args:
        model: A KerasHub Gemma `CausalLM` or backbone, or any built Keras model that holds `Dense` and `EinsumDense`
            layers as attributes of other layers.
        scheme: `"nf4"` (4.5 bits a weight, 4.127 with double quantization), `"int8"` (one scale an output) or `"int4"`
            (symmetric, one scale a block: 4.5 bits). It packs the linear layers' kernels.
        double_quant: Boolean: keep NF4's scales in 8 bits.
        block_size: Integer, numbers along d_in that share a scale in NF4 and int4.
        embedding: If True, a tied embedding is kept in 8 bits with one scale a row.

    Returns:
        The same model.

    Raises:
        ValueError: If an argument is not as above.
        GemmaLoraError: If the model has LoRA or packed layers already, or no layer can be packed.

    Example:

    >>> model = quantize_base(load_gemma(), "nf4", double_quant=True)     # doctest: +SKIP
    >>> apply_lora(model, rank=8, targets="all-linear")                   # doctest: +SKIP
    """
    encoding_for(scheme, (1, 1), double_quant)
    if lora_layers(model) or packed_layers(model):
        raise GemmaLoraError("The model has LoRA or packed layers already. Quantize a plain model, then `apply_lora`.")
    places = list(plain_layers(model))
    if not places:
        raise GemmaLoraError("The model holds no Dense or EinsumDense layer that could be packed.")
    for parent, attribute, layer in places:
        pack_layer(parent, attribute, layer, scheme, double_quant, block_size)
    table = _tied_embedding(model)
    if embedding and table is not None:
        pack_embedding(model, packed.Int8Rows.of(np.asarray(table.embeddings)))
    forget_replaced(model)
    return model


def pack_layer(
    parent: keras.layers.Layer,
    attribute: str,
    layer: keras.layers.Layer,
    scheme: str,
    double_quant: bool = False,
    block_size: int = 64,
    matrix: np.ndarray | None = None,
) -> None:
    """Replaces one linear layer by a packed one; `matrix (d_out, d_in)` in place of its kernel, if given."""
    if matrix is None:
        matrix = np.ascontiguousarray(np.asarray(linear.kernel_matrix(layer), np.float32).T)
    encoding = encoding_for(scheme, matrix.shape, double_quant, block_size)
    replace_by_packed(parent, attribute, layer, encoding, encoding.encode(matrix))


def replace_by_packed(
    parent: keras.layers.Layer,
    attribute: str,
    layer: keras.layers.Layer,
    encoding: packed.Encoding,
    parts: dict[str, np.ndarray],
) -> None:
    """Puts a packed layer in a plain one's place."""
    cls = PackedDense if isinstance(layer, keras.layers.Dense) else PackedEinsumDense
    new = cls.from_config(layer.get_config())
    new.pack(layer, encoding, parts)
    replace(parent, attribute, new)


def packed_layers(model: keras.layers.Layer) -> list[Any]:
    """The model's packed linear layers, those beside LoRA too, in the model's order."""
    return [layer for layer in model._flatten_layers() if isinstance(layer, _PackedLayer)]


def _tied_embedding(model: keras.layers.Layer) -> keras.layers.Layer | None:
    """A Gemma's token embedding; None in any other model."""
    return getattr(getattr(model, "backbone", model), "token_embedding", None)


def _bytes_of(variables: Iterable[keras.Variable]) -> int:
    return sum(variable.value.nbytes for variable in variables)


def weight_bytes(model: keras.layers.Layer) -> dict[str, float]:
    """What the packed weights take.

    Returns:
        `{"linear_bytes": …, "linear_bits": bits a weight, constants included, "embedding_bytes": …, "other_bytes": …}`;
        `other_bytes` are the norms, biases and whatever is trained.
    """
    layers = packed_layers(model)
    linear = sum(layer.nbytes for layer in layers)
    count = sum(int(np.prod(layer.encoding.shape)) for layer in layers)
    table = _tied_embedding(model)
    rows = 0 if table is None else _bytes_of(table.variables)
    return {
        "linear_bytes": linear,
        "linear_bits": 8 * linear / count if count else 0.0,
        "embedding_bytes": rows,
        "other_bytes": _bytes_of(model.variables) - linear - rows,
    }


def dequantize_base(model: keras.Model) -> keras.Model:
    """Gives a model plain float32 kernels that hold what its codes stand for; LoRA layers stay.

    Afterwards `merge_lora` works: the update is added to the weights it was trained on.

    Returns:
        The same model.

    Raises:
        GemmaLoraError: If the model has no packed layers.
    """
    found = False
    for parent in list(model._flatten_layers()):
        for attribute, layer in list(vars(parent).items()):
            if isinstance(layer, _PackedLayer):
                replace(parent, attribute, _plain(layer))
                found = True
    if not found:
        raise GemmaLoraError("The model has no packed layers.")
    table = _tied_embedding(model)
    if isinstance(table, PackedEmbedding):
        _unpack_embedding(model, table)
    forget_replaced(model)
    return model


def _plain(layer: Any) -> keras.layers.Layer:
    """A plain layer with the packed one's decoded kernel."""
    kernel = np.asarray(layer._kernel)
    cls = keras.layers.Dense if isinstance(layer, keras.layers.Dense) else keras.layers.EinsumDense
    plain = cls.from_config(layer.get_config())
    if cls is keras.layers.Dense:
        plain.build((None, kernel.shape[0]))
    else:
        batch, contracted, _, letters = linear.einsum_axes(layer.equation)
        sizes = dict(zip(letters, kernel.shape, strict=True))
        plain.build((*[None] * len(batch), *(sizes[a] for a in contracted)))
    plain._kernel.assign(kernel)
    if layer.bias is not None:
        plain.bias.assign(layer.bias)
    for variable in plain.variables:
        variable.trainable = False
    return plain


def _unpack_embedding(model: keras.Model, embedding: PackedEmbedding) -> None:
    table = np.asarray(embedding.rows().decode())
    plain = keras.layers.ReversibleEmbedding.from_config(embedding.plain_config | {"embeddings_initializer": "zeros"})
    plain.build()
    plain.embeddings.assign(table)
    plain.embeddings.trainable = False
    _exchange_embedding(model, plain)


def merging_error(model: keras.Model) -> dict[str, float]:
    """What would be lost if each update were added to its weights and the sum packed again, as a share of the update.

    `|decode(encode(W + ΔW)) − (W + ΔW)| / |ΔW|`, Frobenius norms, W being what the codes stand for. With DoRA ΔW is
    all that merging changes. Above 1, the rounding is larger than what was learned.

    Returns:
        `{"0 query": share, "1 key": …}`: every LoRA layer on a packed base, by its number in the model and its name.

    Raises:
        GemmaLoraError: If there is no such layer, or its blocks came from a GGUF file and cannot be made again.
    """
    layers = {f"{i} {layer.name}": layer for i, layer in enumerate(lora_layers(model)) if layer.is_packed}
    if not layers:
        raise GemmaLoraError("The model has no LoRA on packed layers.")
    errors = {}
    for name, layer in layers.items():
        encoding = layer.base.encoding
        if isinstance(encoding, packed.GGUFBlocks):
            raise GemmaLoraError(f"Layer {name}: {encoding.kind} blocks are read from a file and not made here.")
        whole = np.asarray(layer.whole_matrix()).T
        update = whole - np.asarray(layer.base.matrix()).T
        again = np.asarray(encoding.decode(encoding.encode(np.ascontiguousarray(whole))))
        norm = float(np.linalg.norm(update))
        errors[name] = float(np.linalg.norm(again - whole)) / norm if norm else float("inf")
    return errors
