"""Several adapters on one base: each gives what it gives alone, a sum adds the updates, and nothing compiles again."""

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest

import gemma_lora as gl
from gemma_lora import lora
from gemma_lora.base.files import GemmaLoraError
from gemma_lora.data.templates import Template
from gemma_lora.exchange.peft import load_adapter, save_adapter, slots
from gemma_lora.gemma import forward as forward_module
from gemma_lora.generation import decoding
from gemma_lora.layers import linear
from gemma_lora.lora import named
from gemma_lora.training.tuner import FineTuner
from tests.conftest import CharacterTokenizer, tiny_gemma

pytestmark = pytest.mark.slow
IDS = np.arange(10)[None] + 20
#: Of finance and questions all shapes agree; sales has another rank and a place more, scaled DoRA is another kind.
KINDS = {
    "finance": {"rank": 3, "targets": ("query", "down")},
    "questions": {"rank": 3, "targets": ("query", "down"), "alpha": 2.0},
    "sales": {"rank": 2, "targets": ("query", "up"), "alpha": 5.0, "rslora": True},
    "dora": {"rank": 2, "targets": ("query",), "dora": True},
}


def states(model):
    return np.asarray(forward_module.hidden_states(model, IDS))


@pytest.fixture(scope="module")
def base():
    """What the base model gives."""
    return states(tiny_gemma())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Each adapter's folder, what the model gives with it alone, and its ΔW by place."""
    found = {}
    for number, (name, kind) in enumerate(KINDS.items()):
        model = lora.apply_lora(tiny_gemma(), **kind)
        rng = np.random.default_rng(number)
        for layer in lora.lora_layers(model):
            layer.lora_b.assign(rng.normal(0, 0.3, layer.lora_b.shape))
        folder = tmp_path_factory.mktemp(name)
        save_adapter(model, folder, template=Template(f"{name}: {{prompt}}\n", "{response}<eos>"))
        deltas = {slot.module: np.asarray(slot.layer.delta()) for slot in slots(model) if hasattr(slot.layer, "delta")}
        found[name] = SimpleNamespace(folder=folder, alone=states(model), deltas=deltas)
    return found


@pytest.fixture
def model(trained):
    """A model with three adapters that have names, and a character tokenizer."""
    model = tiny_gemma()
    model.preprocessor = SimpleNamespace(tokenizer=CharacterTokenizer())
    for name in ("finance", "questions", "sales"):
        load_adapter(model, trained[name].folder, name=name)
    return model


def summed(trained, weights):
    """What a base gives whose kernels have the weighted sum of the updates in them."""
    model = tiny_gemma()
    for slot in slots(model):
        updates = [weight * trained[name].deltas.get(slot.module, 0.0) for name, weight in weights.items()]
        kernel = np.asarray(linear.kernel_matrix(slot.layer)) + sum(updates)
        slot.layer._kernel.assign(linear.stored(slot.layer, kernel))
    return states(model)


@pytest.mark.filterwarnings("ignore:.*different templates")
def test_each_is_what_it_is_alone_whatever_came_before(model, trained, base):
    assert gl.adapter_names(model) == ["finance", "questions", "sales"]
    assert gl.adapters_in_use(model) == {"sales": 1.0}  # the last one loaded
    rng = np.random.default_rng(0)
    choices = ["finance", "sales", "questions", None, {"finance": 0.5, "sales": -2.0}]
    for which in [choices[i] for i in rng.integers(0, len(choices), 12)]:
        gl.use_adapter(model, which)
        if isinstance(which, dict):
            continue
        expected = base if which is None else trained[which].alone
        np.testing.assert_allclose(states(model), expected, atol=1e-5)
        template = None if which is None else f"{which}: {{prompt}}\n"
        assert getattr(model.gemma_lora_template, "prompt", None) == template
    np.testing.assert_array_equal(states(gl.use_adapter(model, None)), base)  # to the bit


@pytest.mark.parametrize("seed", range(3))
def test_a_sum_adds_the_updates(model, trained, base, seed):
    rng = np.random.default_rng(seed)
    weights = {name: float(rng.normal(0, 1)) for name in ("finance", "questions", "sales")[: seed + 1]}
    with pytest.warns(UserWarning, match="different templates") if seed else contextlib.nullcontext():
        gl.use_adapter(model, weights)
    expected = summed(trained, weights)
    np.testing.assert_allclose(states(model), expected, atol=2e-5)
    assert np.abs(expected - base).max() > 1e-2


@pytest.mark.filterwarnings("ignore:.*different templates")
def test_a_sum_is_saved_as_one_adapter(model, trained, tmp_path):
    gl.use_adapter(model, {"finance": 0.5, "sales": 0.25})
    expected = states(model)
    save_adapter(model, tmp_path)
    np.testing.assert_allclose(states(load_adapter(tiny_gemma(), tmp_path)), expected, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*different templates")
def test_nothing_is_compiled_again_where_it_fits(model, monkeypatch):
    """Traces are counted: the forward pass runs as Python only where a program is made."""
    traces = []

    def counted(real):
        def forward(*arguments, **named):
            traces.append(1)
            return real(*arguments, **named)

        return forward

    monkeypatch.setattr(forward_module, "forward", counted(forward_module.forward))
    monkeypatch.setattr(decoding, "forward", counted(decoding.forward))

    def run(which):
        gl.use_adapter(model, which)
        states(model)
        gl.generate(model, "abc", template=Template("{prompt}", "{response}<eos>"), max_new_tokens=3)

    run({"finance": 1.0, "sales": 1.0})
    before = len(traces)
    layers = [id(layer) for layer in lora.lora_layers(model)]
    for which in ("sales", "finance", None, "questions", {"finance": 0.3, "sales": 2.0}, {"questions": 0.5}, "sales"):
        run(which)
    assert len(traces) == before
    assert [id(layer) for layer in lora.lora_layers(model)] == layers


def test_another_kind_gets_layers_of_its_own(model, trained):
    load_adapter(model, trained["dora"].folder, name="dora")
    np.testing.assert_allclose(states(model), trained["dora"].alone, atol=1e-5)
    np.testing.assert_allclose(states(gl.use_adapter(model, "sales")), trained["sales"].alone, atol=1e-5)
    with pytest.raises(GemmaLoraError, match="'dora' is DoRA, which scales outputs: it has no weighted sum"):
        gl.use_adapter(model, {"sales": 1.0, "dora": 1.0})
    assert gl.adapters_in_use(model) == {"sales": 1.0}


def test_what_is_trained_is_kept_under_its_name(model, trained, tmp_path):
    gl.use_adapter(model, "finance")
    tuner = FineTuner(model)
    tuner.compile("adam")
    x = {"token_ids": IDS, "padding_mask": np.ones_like(IDS)}
    tuner.train_on_batch(x, IDS, np.ones_like(IDS))
    after = states(model)
    assert np.abs(after - trained["finance"].alone).max() > 1e-4
    gl.use_adapter(model, "sales")
    np.testing.assert_allclose(states(model), trained["sales"].alone, atol=1e-5)
    np.testing.assert_array_equal(states(gl.use_adapter(model, "finance")), after)
    save_adapter(model, tmp_path)  # without what it is filled up with
    saved = load_adapter(tiny_gemma(), tmp_path)
    assert len(lora.lora_layers(saved)) == 4 and {layer.rank for layer in lora.lora_layers(saved)} == {3}
    np.testing.assert_allclose(states(saved), after, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*different templates")
@pytest.mark.parametrize("which", [None, {"finance": 0.5, "sales": 0.5}])
def test_only_a_single_one_is_trained(model, which):
    gl.use_adapter(model, which)
    with pytest.raises(GemmaLoraError, match="of several adapters use a single one"):
        tuner = FineTuner(model)
        tuner.train_on_batch({"token_ids": IDS, "padding_mask": np.ones_like(IDS)}, IDS, np.ones_like(IDS))
    gl.use_adapter(model, "sales")
    assert len(model.trainable_variables) == 8  # A and B, two places of two blocks: not finance's


@pytest.mark.parametrize("how", [{}, {"temperature": 1.0, "seed": 3}], ids=str)
def test_rows_of_a_batch_may_have_adapters_of_their_own(model, how):
    prompts, names = ["ab", "cd", "ab", "ab", "zz"], ["sales", "finance", None, "finance", "sales"]
    gl.use_adapter(model, "questions")
    told = []
    found = gl.generate(model, prompts, adapters=names, max_new_tokens=6, on_progress=lambda *n: told.append(n), **how)
    assert gl.adapters_in_use(model) == {"questions": 1.0} and model.gemma_lora_template.prompt.startswith("questions")
    assert told[-1] == (5, 5)
    for number, (name, answer) in enumerate(zip(names, found, strict=True)):
        gl.use_adapter(model, name)
        alone = gl.generate(model, prompts, max_new_tokens=6, **how)  # the whole list: its seeds are by number
        assert answer == alone[number]
    assert len({found[0], found[2], found[3]}) == 3


def test_what_is_refused_changes_nothing(model, trained, tmp_path):
    gl.use_adapter(model, "finance")
    before = states(model)
    for act, message in [
        (lambda: gl.use_adapter(model, "law"), "no adapter 'law'. There are finance, questions, sales"),
        (lambda: gl.use_adapter(model, {"finance": float("nan")}), "must be a finite number"),
        (lambda: gl.remove_adapter(model, "law"), "no adapter 'law'"),
        (lambda: load_adapter(model, trained["sales"].folder), "have names"),
        (lambda: load_adapter(model, trained["sales"].folder, name="sales"), "has an adapter 'sales' already"),
        (lambda: load_adapter(model, trained["sales"].folder, name=""), "must be some text"),
        (lambda: gl.generate(model, ["a"], adapters=["law"]), "no adapter 'law'"),
        (lambda: gl.use_adapter(tiny_gemma(), "x"), "no adapters with names"),
    ]:
        with pytest.raises(GemmaLoraError, match=message):
            act()
    for wrong in (["sales"], "sales"):
        with pytest.raises(ValueError, match="one adapter, or None, for each prompt"):
            gl.generate(model, ["a", "b"], adapters=wrong)
    with pytest.raises(ValueError, match="goes with what is in use"):
        gl.generate(model, ["a"], adapters=["sales"], stream=True)
    gl.merge_lora(model)
    with pytest.raises(GemmaLoraError, match="merged"):
        gl.use_adapter(model, "sales")
    gl.unmerge_lora(model)
    assert gl.adapters_in_use(model) == {"finance": 1.0}
    np.testing.assert_allclose(states(model), before, atol=1e-5)


def test_lora_without_a_name_is_not_lost(trained):
    model = lora.apply_lora(tiny_gemma(), rank=1, targets="query")
    with pytest.raises(GemmaLoraError, match="has LoRA without a name"):
        load_adapter(model, trained["sales"].folder, name="sales")
    assert len(lora.lora_layers(model)) == 2 and gl.adapter_names(model) == []


@pytest.mark.parametrize("which", ["sales", "dora"])
def test_a_switch_that_is_cut_short_is_undone(model, trained, monkeypatch, which):
    load_adapter(model, trained["dora"].folder, name="dora")
    gl.use_adapter(model, "finance")
    before, layers = states(model), [id(layer) for layer in lora.lora_layers(model)]
    real, calls = lora.LoRALayer.put, []

    def cut_short(self, *numbers):
        calls.append(self)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(self, *numbers)

    monkeypatch.setattr(lora.LoRALayer, "put", cut_short)
    with pytest.raises(KeyboardInterrupt):
        gl.use_adapter(model, which)
    assert gl.adapters_in_use(model) == {"finance": 1.0}
    assert [id(layer) for layer in lora.lora_layers(model)] == layers
    np.testing.assert_array_equal(states(model), before)


def test_adapters_are_removed(model, trained, base):
    gl.remove_adapter(model, "sales")  # it is in use
    np.testing.assert_array_equal(states(model), base)
    assert gl.adapter_names(model) == ["finance", "questions"] and gl.adapters_in_use(model) == {}
    with pytest.raises(GemmaLoraError, match="No adapter is in use"):
        save_adapter(model, "never")
    gl.remove_adapter(model, "finance")
    gl.remove_adapter(model, "questions")
    assert not lora.lora_layers(model) and not named.has_names(model)
    load_adapter(model, trained["sales"].folder)
    np.testing.assert_allclose(states(model), trained["sales"].alone, atol=1e-5)


def test_detaching_forgets_the_names(model, base):
    lora.detach_lora(model)
    assert gl.adapter_names(model) == [] and not lora.lora_layers(model)
    np.testing.assert_array_equal(states(model), base)
