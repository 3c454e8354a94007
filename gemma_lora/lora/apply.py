"""LoRA on a whole model: attach, merge, unmerge, detach."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence

from gemma_lora.base.files import GemmaLoraError
from gemma_lora.base.keras_on_jax import keras
from gemma_lora.base.settings import DEFAULTS, TARGET_NAMES, check
from gemma_lora.base.settings import target_names as target_names
from gemma_lora.layers import linear
from gemma_lora.layers.places import PLACES, holds_gemma_blocks
from gemma_lora.layers.surgery import forget_programs, replace, replace_in_graph
from gemma_lora.lora.layer import LoRADense, LoRAEinsumDense, LoRALayer
from gemma_lora.lora.plain import named_layers, targeted_layers, trained_layers

#: Our names for a Gemma block's linear layers -> KerasHub's layer names.
TARGETS = {name: place.layer for name, place in PLACES.items()}
#: What `targets="all-linear"` means.
ALL_LINEAR = TARGET_NAMES


def linear_layers(model: keras.layers.Layer) -> Iterator[tuple[keras.layers.Layer, str, keras.layers.Layer]]:
    """Yields `(parent, attribute, layer)` for each linear layer held as another layer's attribute."""
    for parent in model._flatten_layers():
        if isinstance(parent, LoRALayer):
            continue
        for attribute, value in list(vars(parent).items()):
            if isinstance(value, keras.layers.Dense | keras.layers.EinsumDense | LoRALayer):
                yield parent, attribute, value


def plain_layers(model: keras.layers.Layer) -> Iterator[tuple[keras.layers.Layer, str, keras.layers.Layer]]:
    """Those of `linear_layers` that are matrix products of a kernel in floats, without LoRA."""
    for parent, attribute, layer in linear_layers(model):
        if not isinstance(layer, LoRALayer) and not hasattr(layer, "encoding") and linear.is_matrix_product(layer):
            yield parent, attribute, layer


def adapt(
    model: keras.Model,
    make: Callable[[keras.layers.Layer, int], keras.layers.Layer],
    targets: str | Sequence[str] = DEFAULTS.targets,
    train: str | Sequence[str] = (),
) -> keras.Model:
    """Puts layers of a parameter-efficient method in the places of a model's linear layers; the rest is frozen.

    Args:
        model: A KerasHub Gemma `CausalLM` or backbone, or any built Keras model.
        make: From a layer and its number among the targets to the layer that takes its place. Its variables decide what
            is trained; with a method `product` the forward pass knows how to multiply by it (`layers.products`).
        targets, train: As in `apply_lora`.

    Returns:
        The same model.

    Raises:
        ValueError: If a name matches no layer; nothing is changed then.
    """
    if holds_gemma_blocks(model):
        return _adapt_gemma(model, make, targets, train)
    trained = trained_layers(model, train)
    found = targeted_layers(model, targets, trained.values())
    made = _made(model, make, found)
    _freeze(model, trained.values())
    for layer, new in zip(found, made, strict=True):
        replace_in_graph(model, layer, new)
    model.gemma_lora_trained = tuple(trained)
    forget_programs(model)
    return model


def _adapt_gemma(model, make, targets, train) -> keras.Model:
    """`adapt` for a model that holds KerasHub's Gemma blocks, whose linear layers are their attributes."""
    if train:
        raise ValueError(
            f"`train` is for plain Keras models: a Gemma's adapter is LoRA alone. Received: train={train!r}"
        )
    wanted = {TARGETS[name] for name in target_names(targets)}
    found = [hit for hit in linear_layers(model) if hit[2].name in wanted]
    missing = wanted - {layer.name for _, _, layer in found}
    if missing:
        raise ValueError(f"No layer of the model is named {', '.join(sorted(missing))}; nothing was changed.")
    made = _made(model, make, [layer for _, _, layer in found])
    for (parent, attribute, _), layer in zip(found, made, strict=True):
        replace(parent, attribute, layer)
    forget_programs(model)
    return model


def _made(model: keras.Model, make: Callable, found: list[keras.layers.Layer]) -> list[keras.layers.Layer]:
    """The new layers, with all of the model's own variables frozen; an error leaves flags and layers as they were."""
    trainable = [variable.trainable for variable in model.variables]
    activations = [layer.activation for layer in found]
    for variable in model.variables:
        variable.trainable = False
    try:
        return [make(layer, number) for number, layer in enumerate(found)]
    except BaseException:
        for variable, was in zip(model.variables, trainable, strict=True):
            variable.trainable = was
        for layer, activation in zip(found, activations, strict=True):
            layer.activation = activation
        raise


def _freeze(model: keras.Model, trained: Iterable[keras.layers.Layer]) -> None:
    """Freezes a plain model's layers, except those given.

    The flag of the layer counts and not that of its variables alone: batch normalization, unless it is frozen, goes on
    taking its means from the batch and moving its averages.
    """
    model.trainable = True  # the model's own flag and those of what holds layers: with one off, LoRA would not train
    for layer in model._flatten_layers():
        if not layer._layers:
            layer.trainable = False
        for variable in (*layer._trainable_variables, *layer._non_trainable_variables):
            variable.trainable = False
    for layer in trained:
        layer.trainable = True


def apply_lora(
    model: keras.Model,
    rank: int = DEFAULTS.rank,
    alpha: float | None = DEFAULTS.alpha,
    targets: str | Sequence[str] = DEFAULTS.targets,
    dropout: float = DEFAULTS.dropout,
    rslora: bool = DEFAULTS.rslora,
    dora: bool = DEFAULTS.dora,
    seed: int = DEFAULTS.seed,
    train: str | Sequence[str] = (),
) -> keras.Model:
    """Gives a model's targeted linear layers LoRA, in place, and freezes everything else.

    A Gemma is trained with `FineTuner`. A plain Keras model is compiled, or compiled again, and trained with its own
    `fit`.

    Args:
        model: A KerasHub Gemma `CausalLM` or backbone, or any built Keras model: sequential, functional or subclassed,
            with `Dense` or `EinsumDense` layers anywhere in it.
        rank: Integer, the update's rank.
        alpha: Float; scaling is alpha / rank. Defaults to `2 * rank`.
        targets: `"all-linear"`, or which layers, in a sequence or separated by commas. Of a Gemma: any of query, key,
            value, attention_output, gate, up, down. Of a plain Keras model: layers' names or patterns. A pattern is
            compared with the end of a layer's path (`encoder/block_0/dense`), name by name; in a name `*`, `?` and
            `[…]` stand for what they do in `fnmatch`: `"dense"`, `"block_*/dense"`, `"block_0/*"`.
            There, all-linear means every `Dense` and `EinsumDense`.
        dropout: Float in [0, 1).
        rslora: If True scaling is alpha / sqrt(rank).
        dora: If True, DoRA (Liu et al. 2024, https://arxiv.org/abs/2402.09353): each output's column of the kernel is
            split into its length, which is trained as it is, and its direction, which LoRA changes. With dropout a
            training step then forms each frozen product twice.
        seed: Integer; layer i starts from seed + i.
        train: Names or patterns, as in `targets`, of a plain model's layers that are trained as they are, such as a new
            classifier's head. They get no LoRA.

    Returns:
        The same model.

    Raises:
        ValueError: If an argument is not as above, the model has LoRA already, a name matches no layer, or a layer that
            is named cannot have LoRA. Nothing is changed then.

    Example:

    >>> layers = [keras.layers.Dense(8, name="first"), keras.layers.Dense(3, name="head")]
    >>> model = keras.Sequential([keras.Input((5,)), *layers])
    >>> model = apply_lora(model, rank=2, targets="first", train="head")
    >>> ["/".join(weight.path.split("/")[-2:]) for weight in model.trainable_weights]
    ['first/lora_a', 'first/lora_b', 'head/kernel', 'head/bias']
    """
    named = check(rank=rank, alpha=alpha, dropout=dropout, rslora=rslora, dora=dora, seed=seed)
    if holds_gemma_blocks(model):
        check(targets=targets)
    if lora_layers(model):
        raise ValueError("The model has LoRA already. Call `detach_lora(model)` first.")
    seed = named.pop("seed")

    def make(layer: keras.layers.Layer, number: int) -> LoRALayer:
        cls = LoRADense if isinstance(layer, keras.layers.Dense) else LoRAEinsumDense
        return cls(layer, seed=seed + number, **named)

    return adapt(model, make, targets, train)


def lora_layers(model: keras.layers.Layer) -> list[LoRALayer]:
    """The model's LoRA layers, in the model's order."""
    return [layer for layer in model._flatten_layers() if isinstance(layer, LoRALayer)]


def trained_weights(model: keras.Model) -> list[keras.Variable]:
    """The weights of a plain model's layers that `train` named in `apply_lora`: trained beside LoRA, as they are."""
    paths = getattr(model, "gemma_lora_trained", ())
    layers = named_layers(model) if paths else {}
    return [weight for path in paths if path in layers for weight in layers[path].weights]


def _required_layers(model: keras.layers.Layer) -> list[LoRALayer]:
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
    """Takes the LoRA layers out and gives the base layers back; a merged update stays in the kernels.

    Adapters that have names are forgotten; `use_adapter(model, None)` keeps them. The base layers stay frozen. To train
    all of a plain model afterwards, set `model.trainable = True`.
    """
    for layer in lora_layers(model):
        layer.base.activation = layer.activation
    for parent, attribute, layer in list(linear_layers(model)):
        if isinstance(layer, LoRALayer) and not layer._inbound_nodes:
            replace(parent, attribute, layer.base)
    for layer in lora_layers(model):  # those in graphs and lists
        replace_in_graph(model, layer, layer.base)
    if getattr(model, "gemma_lora_adapters", None) is not None:
        model.gemma_lora_adapters = None
    if getattr(model, "gemma_lora_trained", None):
        model.gemma_lora_trained = ()
    forget_programs(model)


@contextlib.contextmanager
def as_it_was_on_error(model: keras.Model) -> Iterator[None]:
    """Puts layers, activations and trainable flags back if the block inside ends with an error.

    What is asked for is checked before. This is for the rest: memory that runs out, Ctrl-C half-way.
    """
    held = list(linear_layers(model))
    bases = [without_lora(layer) for _, _, layer in held]
    activations = [base.activation for base in bases]
    trainable = [(variable, variable.trainable) for variable in model.variables]
    try:
        yield
    except BaseException:
        for parent, attribute, layer in held:
            if getattr(parent, attribute) is not layer:
                replace(parent, attribute, layer)
        for base, activation in zip(bases, activations, strict=True):
            base.activation = activation
        for variable, flag in trainable:
            variable.trainable = flag
        raise


def without_lora(layer: keras.layers.Layer) -> keras.layers.Layer:
    """A linear layer itself, where LoRA may stand around it."""
    return layer.base if isinstance(layer, LoRALayer) else layer
