"""A Gemma 3 with a vision encoder, as the presets from 4B on are: trained on text, it is the text model."""

import keras
import numpy as np
import pytest

import gemma_lora as gl
from gemma_lora.gemma.load import import_keras_hub


def with_vision(text):
    """The text model `text` with an image encoder of random weights."""
    hub = import_keras_hub()
    encoder = hub.models.Gemma3VisionEncoder(
        image_size=16, patch_size=4, num_heads=2, hidden_dim=8, num_layers=1, intermediate_dim=16, output_dim=16,
        pool_size=2, layer_norm_epsilon=1e-6,
    )  # fmt: skip
    config = text.backbone.get_config() | {"vision_encoder": encoder}
    backbone = hub.models.Gemma3Backbone(**{k: v for k, v in config.items() if k not in ("name", "trainable")})
    named = {variable.path: variable for variable in backbone.variables}
    for variable in text.backbone.variables:
        named[variable.path].assign(variable)
    return hub.models.Gemma3CausalLM(preprocessor=None, backbone=backbone)


@pytest.mark.slow
def test_fit_on_text_gives_the_text_models_losses(gemma):
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 300, (4, 8)).astype("int32")
    x, y = {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}, np.roll(tokens, -1, axis=1)
    losses = []
    for model in (with_vision(gemma), gemma):
        gl.apply_lora(model, rank=2, seed=1)
        keras.utils.set_random_seed(0)
        tuner = gl.FineTuner(model, rows=2, row_length=8, mixed_precision=False)
        history = tuner.fit(x, y, batch_size=2, epochs=2, shuffle=False, verbose=0)
        losses.append(history.history["loss"])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    assert losses[0][1] < losses[0][0]
