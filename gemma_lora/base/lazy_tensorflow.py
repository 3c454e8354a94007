"""KerasHub without TensorFlow, until something needs it.

KerasHub imports TensorFlow and TensorFlow Text wherever it finds them. In version 0.32 that is 0.6 GB of memory and
most of the time that its import takes. On the JAX backend a text model needs neither: the tokenizer runs on
SentencePiece, the model on JAX. They are used by KerasHub's preprocessors when they are called with text, so they
cannot be left out either: `model.generate("…")` must work. So KerasHub is imported with stand-ins, which import the
real module at the first use.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
import types
from collections.abc import Iterator
from typing import Any

from gemma_lora.base.devices import keep_tensorflow_off_the_device

_NAMES = ("tensorflow", "tensorflow_text")


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
    """Sends file descriptor 2 to nowhere: TensorFlow's C++ writes lines there that no setting silences."""
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


#: Classes that Keras and KerasHub ask `isinstance` of.
_CLASSES = ("Tensor", "RaggedTensor", "TensorShape", "DType", "TypeSpec")


class _NoInstance:
    """What those classes are while there is no TensorFlow: nothing is an instance of them."""


class _StandIn(types.ModuleType):
    """A module that is imported when an attribute is asked of it that has no answer without."""

    #: The error that asking raises in place of importing, or None. KerasHub takes an AttributeError (while it is
    #: imported) and an ImportError (while a layer is built) for "not installed".
    refusal: type[Exception] | None = None

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):  # the import system's own questions
            raise AttributeError(attribute)
        name = self.__name__
        if name not in sys.modules or sys.modules[name] is self:
            if attribute == "executing_eagerly":  # nothing traces a tf.function
                return lambda: True
            if attribute in _CLASSES:
                return _NoInstance
            if _StandIn.refusal is not None:
                raise _StandIn.refusal(f"{name}.{attribute} is left out on purpose here")
            with quiet_stderr():
                importlib.import_module(name)
            keep_tensorflow_off_the_device()
        return getattr(sys.modules[name], attribute)


@contextlib.contextmanager
def _refusing(error: type[Exception]) -> Iterator[None]:
    before, _StandIn.refusal = _StandIn.refusal, error
    try:
        yield
    finally:
        _StandIn.refusal = before


@contextlib.contextmanager
def stand_ins() -> Iterator[None]:
    """Within, `import tensorflow` gives a stand-in, unless the real module is there already or is not installed."""
    put = {
        name: _StandIn(name)
        for name in _NAMES
        if name not in sys.modules and importlib.util.find_spec(name) is not None
    }
    sys.modules.update(put)
    try:
        with _refusing(AttributeError):
            yield
    finally:
        for name in put:
            del sys.modules[name]


def left_out() -> contextlib.AbstractContextManager[None]:
    """Within, KerasHub's layers are built as if TensorFlow were not installed; what needs it later builds it then."""
    return _refusing(ImportError)
