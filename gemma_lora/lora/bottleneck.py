"""The layers of bottleneck adapters: the module itself, and a frozen layer with one behind it.

`lora/houlsby.py` puts them into a model.

Reference: Houlsby et al. 2019, https://arxiv.org/abs/1902.00751, section 2.1 and figure 2.
"""

from __future__ import annotations

from gemma_lora.base.keras_on_jax import keras, ops


def parameter_count(width: int, bottleneck: int) -> int:
    """Numbers in one adapter: `2 * bottleneck * width + width + bottleneck`.

    Args:
        width: Integer d, the features of the layer that the adapter stands behind.
        bottleneck: Integer m, the features in the adapter's middle.

    Example:

    >>> parameter_count(640, 16)
    21136

    Reference: Houlsby et al. 2019, section 2.1.
    """
    return 2 * bottleneck * width + width + bottleneck


@keras.saving.register_keras_serializable(package="gemma_lora")
class BottleneckAdapter(keras.layers.Layer):
    """A bottleneck with a residual around it, which starts close to the identity.

    `y = x + activation(x @ down_kernel + down_bias) @ up_kernel + up_bias`

    Args:
        bottleneck: Integer, the features in the middle.
        activation: A Keras activation's name, or a function.
        init_std: Float, at least 0. Both kernels start from a normal distribution of this standard deviation, cut off
            at two of them; the biases start at 0.
        seed: Integer seed of the start.

    Input and output are (…, d), of the input's dtype; the four weights are float32.

    Raises:
        ValueError: If `bottleneck` is no integer of at least 1, or `init_std` is negative.

    Example:

    >>> adapter = BottleneckAdapter(2)
    >>> adapter.build((None, 5))
    >>> [tuple(v.shape) for v in adapter.trainable_variables]
    [(5, 2), (2,), (2, 5), (5,)]

    Reference: Houlsby et al. 2019, section 2.1; the start is section 3.6's, with 0.01. The paper leaves the
    nonlinearity open; its published code takes GELU, as this layer does.
    """

    def __init__(self, bottleneck: int, activation="gelu", init_std: float = 1e-2, seed: int | None = None, **kwargs):
        if not isinstance(bottleneck, int) or isinstance(bottleneck, bool) or bottleneck < 1:
            raise ValueError(f"`bottleneck` must be an integer of at least 1. Received: bottleneck={bottleneck!r}")
        if not init_std >= 0:
            raise ValueError(f"`init_std` must be at least 0. Received: init_std={init_std!r}")
        super().__init__(**kwargs)
        self.bottleneck = bottleneck
        self.activation = keras.activations.get(activation)
        self.init_std = float(init_std)
        self.seed = seed

    def build(self, input_shape):
        width, middle = input_shape[-1], self.bottleneck

        def kernel(name, shape, seed):
            start = keras.initializers.TruncatedNormal(stddev=self.init_std, seed=seed)
            return self.add_weight(name=name, shape=shape, initializer=start, dtype="float32")

        # Keras makes seeds of None by itself; with a seed the two kernels must still differ.
        seeds = (None, None) if self.seed is None else (2 * self.seed, 2 * self.seed + 1)
        self.down_kernel = kernel("down_kernel", (width, middle), seeds[0])
        self.down_bias = self.add_weight(name="down_bias", shape=(middle,), initializer="zeros", dtype="float32")
        self.up_kernel = kernel("up_kernel", (middle, width), seeds[1])
        self.up_bias = self.add_weight(name="up_bias", shape=(width,), initializer="zeros", dtype="float32")
        self.built = True

    def call(self, inputs):
        inputs = ops.convert_to_tensor(inputs)  # a NumPy array of float64 becomes what JAX computes in

        def cast(variable):
            return ops.cast(variable, inputs.dtype)

        # Two axes: with three, XLA on the CPU is several times slower at the gradients of thin matrices.
        x = ops.reshape(inputs, (-1, inputs.shape[-1]))  # (tokens, d)
        middle = self.activation(ops.matmul(x, cast(self.down_kernel)) + cast(self.down_bias))  # (tokens, bottleneck)
        y = x + ops.matmul(middle, cast(self.up_kernel)) + cast(self.up_bias)  # (tokens, d)
        return ops.reshape(y, ops.shape(inputs))

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return super().get_config() | {
            "bottleneck": self.bottleneck,
            "activation": keras.activations.serialize(self.activation),
            "init_std": self.init_std,
            "seed": self.seed,
        }


@keras.saving.register_keras_serializable(package="gemma_lora")
class AdaptedLayer(keras.layers.Layer):
    """A frozen layer with an adapter behind it: `y = adapter(base(x))`.

    Args:
        base: A built layer of one input and one output, which `apply_adapters` has frozen.
        adapter: A built `BottleneckAdapter` of the width that `base` gives.
    """

    def __init__(self, base: keras.layers.Layer, adapter: BottleneckAdapter, **kwargs):
        kwargs.setdefault("name", base.name)
        kwargs.setdefault("dtype", base.dtype_policy)
        super().__init__(**kwargs)
        self.base = base
        self.adapter = adapter
        self.built = True

    def call(self, inputs):
        return self.adapter(self.base(inputs))

    def compute_output_shape(self, input_shape):
        return self.base.compute_output_shape(input_shape)

    def get_config(self):
        parts = {"base": self.base, "adapter": self.adapter}
        return super().get_config() | {name: keras.saving.serialize_keras_object(part) for name, part in parts.items()}

    @classmethod
    def from_config(cls, config):
        parts = {name: keras.saving.deserialize_keras_object(config[name]) for name in ("base", "adapter")}
        return cls(**(config | parts))
