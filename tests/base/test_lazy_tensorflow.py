"""KerasHub with stand-ins for TensorFlow, in processes of their own: what was imported once cannot be taken back."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.filterwarnings("ignore")
TESTS = Path(__file__).parent
LOADED = "[name for name in ('tensorflow', 'tensorflow_text') if name in sys.modules]"
START = f"import json, sys; sys.path.insert(0, {str(TESTS)!r})\n"


def run(script):
    done = subprocess.run([sys.executable, "-c", START + script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.real
def test_loading_training_and_generating_leave_tensorflow_out(tmp_path):
    loaded, answer = run(f"""
import gemma_lora as gl
model = gl.load_gemma()
gl.quantize_base(model, "nf4")
gl.apply_lora(model, rank=2)
examples = [{{"prompt": "a", "response": "b"}}] * 2
tuner = gl.FineTuner(model, rows=1, row_length=16, run_dir={str(tmp_path)!r})
tuner.fit(gl.load_dataset(examples), verbose=0)
gl.save_adapter(model, {str(tmp_path / "adapter")!r})
answer = gl.generate(model, ["a"], max_new_tokens=1)
print(json.dumps([{LOADED}, answer]))
""")
    assert loaded == [] and len(answer) == 1


WHOLE = """
text = ["Café 12 €", "x"]
row = preprocessor({"prompts": text, "responses": text})[0]["token_ids"]
inside = preprocessor.generate_preprocess(text)["token_ids"]
import tensorflow as tf
mapped = list(tf.data.Dataset.from_tensor_slices(text).map(preprocessor.tokenizer))
as_lists = [np.asarray(row).tolist(), np.asarray(inside).tolist(), [np.asarray(m).tolist() for m in mapped]]
print(json.dumps([before, as_lists, preprocessor.tokenizer(text)]))
"""


@pytest.mark.real
def test_what_needs_tensorflow_gets_it_and_gives_what_it_gives_with_tensorflow():
    lazy = run(f"""
import numpy as np, gemma_lora as gl
preprocessor = gl.load_gemma().preprocessor
preprocessor.sequence_length = 12
before = {LOADED}
{WHOLE}""")
    eager = run(f"""
import numpy as np, tensorflow, tensorflow_text, gemma_lora as gl
preprocessor = gl.load_gemma().preprocessor
preprocessor.sequence_length = 12
before = {LOADED}
{WHOLE}""")
    assert (lazy[0], eager[0]) == ([], ["tensorflow", "tensorflow_text"])
    assert lazy[1:] == eager[1:]
    tokens = lazy[2]
    assert lazy[1][2] == tokens  # inside tf.data, by TensorFlow Text, as outside, by SentencePiece
    assert lazy[1][0][0][1 : 1 + len(tokens[0])] == tokens[0]


@pytest.mark.slow
def test_a_session_that_has_tensorflow_keeps_it():
    same, nothing_left = run("""
import tensorflow
from gemma_lora.gemma import load as gemma
from gemma_lora.base import lazy_tensorflow
hub = gemma.import_keras_hub()
from keras_hub.src.utils import tensor_utils
print(json.dumps([tensor_utils.tf is tensorflow, not isinstance(sys.modules["tensorflow"], lazy_tensorflow._StandIn)]))
""")
    assert same and nothing_left


@pytest.mark.slow
def test_an_environment_without_tensorflow_is_told_so_by_keras_hub():
    message = run("""
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.startswith("tensorflow") else find(name, *rest)
class Nowhere:
    def find_spec(self, name, path=None, target=None):
        if name in ("tensorflow", "tensorflow_text"):
            raise ImportError(name)
sys.meta_path.insert(0, Nowhere())
from gemma_lora.gemma import load as gemma
hub = gemma.import_keras_hub()
try:
    hub.models.Gemma3CausalLMPreprocessor(None)
except ImportError as error:
    print(json.dumps(str(error)))
""")
    assert "requires `tensorflow`" in message
