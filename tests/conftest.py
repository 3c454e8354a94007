"""Fixtures: a tiny random Gemma of each generation, a character tokenizer, the real 270M once a session."""

import os
import sys
import tempfile
from pathlib import Path

os.environ["KERAS_BACKEND"] = "jax"
# Tests build the same tiny models again and again; what XLA has compiled once it need not compile again.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), "gemma_lora_tests_xla"))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import pytest

#: Markers that come with a fixture, whether a test takes it itself or through another: the real weights, a whole job.
MARKERS = {"real_gemma": pytest.mark.real, "finished": pytest.mark.slow}


def pytest_collection_modifyitems(items):
    for item in items:
        for fixture in MARKERS.keys() & set(getattr(item, "fixturenames", ())):
            item.add_marker(MARKERS[fixture])


class CharacterTokenizer:
    """One token a character; control tokens as in Gemma. Enough of KerasHub's interface for our code."""

    control = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")

    def tokenize(self, text):
        return [len(self.control) + ord(c) for c in text]

    def token_to_id(self, token):
        if len(token) == 1:
            return len(self.control) + ord(token)
        return self.control.index(token if token in self.control else "<unk>")

    def id_to_token(self, i):
        return self.control[i] if i < len(self.control) else chr(i - len(self.control))

    def detokenize(self, ids):
        return "".join(self.id_to_token(i) for i in ids)


@pytest.fixture
def tokenizer():
    return CharacterTokenizer()


def tiny_gemma(generation: int = 3, seed: int = 0, vocabulary_size: int = 300, layers: int = 2):
    """A random Gemma of a few blocks; weights are large enough that every part matters."""
    import keras
    import numpy as np

    from gemma_lora.gemma.load import import_keras_hub

    hub = import_keras_hub()
    common = {
        "vocabulary_size": vocabulary_size,
        "num_layers": layers,
        "num_query_heads": 4,
        "num_key_value_heads": 2,
        "hidden_dim": 16,
        "head_dim": 8,
        "dtype": "float32",
    }
    if generation == 3:
        backbone = hub.models.Gemma3Backbone(
            **common,
            intermediate_dim=24,
            image_size=16,
            use_post_ffw_norm=True,
            use_post_attention_norm=True,
            use_sliding_window_attention=True,
            sliding_window_size=6,
        )
        model = hub.models.Gemma3CausalLM(preprocessor=None, backbone=backbone)
    else:
        more = (
            {}
            if generation == 1
            else {
                "use_post_ffw_norm": True,
                "use_post_attention_norm": True,
                "final_logit_soft_cap": 3.0,
                "attention_logit_soft_cap": 5.0,
                "use_sliding_window_attention": True,
                "sliding_window_size": 6,
            }
        )
        backbone = hub.models.GemmaBackbone(**common, intermediate_dim=48, **more)
        model = hub.models.GemmaCausalLM(preprocessor=None, backbone=backbone)
    rng = np.random.default_rng(seed)
    for variable in backbone.variables:
        variable.assign(rng.normal(0, 0.4, variable.shape))
    keras.utils.set_random_seed(seed)
    return model


@pytest.fixture(params=[1, 2, 3], ids=["gemma1", "gemma2", "gemma3"])
def any_gemma(request):
    return tiny_gemma(request.param)


@pytest.fixture
def gemma():
    return tiny_gemma(3)


@pytest.fixture(scope="session")
def real_gemma():
    """The built-in Gemma 3 270M. Tests that change it must undo what they did."""
    from gemma_lora.gemma.load import load_gemma

    return load_gemma()


@pytest.fixture
def benchmark_script(monkeypatch):
    """Gives a script of `benchmarks/` as a module, by its name."""
    import importlib.util

    folder = Path(__file__).parents[1] / "benchmarks"
    monkeypatch.syspath_prepend(folder)  # where a script finds what it shares with others

    def load(name: str):
        spec = importlib.util.spec_from_file_location(f"benchmarks.{name}", folder / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs `gemma-lora` with the arguments; gives status, stdout and stderr."""

    from gemma_lora import cli

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["gemma-lora", *map(str, arguments)])
        status = 0
        try:
            cli.main()
        except SystemExit as exit_:
            status = exit_.code or 0
        output = capsys.readouterr()
        return status, output.out, output.err

    return run
