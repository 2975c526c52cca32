"""Where policies and tokenizers come from: a hub name, a folder, a GGUF file, or embedded."""

import logging
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grao_lightning.faults import UserError
from grao_lightning.language_model.adapter_folders import (
    adapter_base,
    adapter_fault,
    adapter_labels,
    is_adapter,
)
from grao_lightning.language_model.adapters import saved_adapters
from grao_lightning.language_model.sharded import Sharding, draw_whole, own_shards

if TYPE_CHECKING:
    from torch.nn import Module

    ModelSource = str | Module
else:  # what a config can hold: the command line's parser goes by it
    ModelSource = str

_EMBEDDED = "embedded:"
_HANDED_OVER = "handed over as "
_CLASSIFIER = "ForSequenceClassification"


def source_name(source: Any) -> str:
    """Return a source of a model or tokenizer as text, which stands in checkpoints for an object.

    >>> source_name("embedded:keywords")
    'embedded:keywords'
    """
    return source if isinstance(source, str) else f"{_HANDED_OVER}{type(source).__name__}"


def model_fault(setting: str, source: ModelSource, *, is_policy: bool, trained: bool) -> str | None:
    """Return what is wrong with a model that is handed over, or with a source as `source_fault`.

    Args:
        setting: Name of the setting, for the message.
        source: As in `load_model`, or a model.
        is_policy: A causal language model, else a sequence classification model of one label.
        trained: Whether it is to be trained.
    """
    if isinstance(source, str):
        return source_fault(setting, source)
    kind, name = type(source).__name__, "AutoModel" + ("ForCausalLM" if is_policy else _CLASSIFIER)
    if not hasattr(source, "config") or not hasattr(source, "get_input_embeddings"):
        return f"{setting} must be a source or a loaded model of transformers; got {kind}"
    model: Any = source
    if is_policy and (kind.endswith(_CLASSIFIER) or model.get_output_embeddings() is None):
        return f"{setting} must be a causal language model; got {kind}: load it with {name}"
    if not is_policy and not (kind.endswith(_CLASSIFIER) and model.config.num_labels == 1):
        return (
            f"{setting} must be a sequence classification model of one label; got {kind} of "
            f"{model.config.num_labels}: load it with {name}.from_pretrained(..., num_labels=1)"
        )
    if trained and not any(parameter.requires_grad for parameter in source.parameters()):
        return (
            f"{setting} must have a parameter that requires a gradient, or nothing is trained; got "
            "none: call requires_grad_(True) on what shall be trained"
        )
    return None


def source_fault(setting: str, source: str) -> str | None:
    """Return what is wrong with a model source as far as can be told without loading it.

    Args:
        setting: Name of the setting, for the message.
        source: As in `load_model`.
    """
    if source.startswith(_HANDED_OVER):
        return (
            f"{setting} was {source}, which no checkpoint keeps: hand it over again, as in "
            "load_from_checkpoint(path, policy=model), or give a hub name or folder"
        )
    if source.startswith(_EMBEDDED):
        from grao_lightning.embedded.base import BASES

        if source.removeprefix(_EMBEDDED) not in BASES:
            known = ", ".join(_EMBEDDED + name for name in BASES)
            return f"{setting}: no embedded model {source!r}; there are {known}"
        return None
    path = Path(source).expanduser()
    if is_adapter(source):
        return adapter_fault(setting, source)
    if path.suffix == ".gguf":
        return None if path.is_file() else f"{setting}: no such file: {source}"
    if path.is_dir():
        if (path / "config.json").is_file():
            return None
        return f"{setting}: {source} has no config.json; give a folder that save_pretrained wrote"
    outside = path.is_absolute() or source.startswith((".", "~")) or source.endswith("/")
    if outside or source.count("/") > 1:
        return (
            f"{setting}: no such folder: {source}; give a folder that save_pretrained wrote, a "
            ".gguf file, a hub name (organisation/name) or embedded:keywords"
        )
    return None


def base_of(setting: str, source: str, base: str | None = None) -> str:
    """Return the source of a model's own weights: of an adapter folder the model it belongs to.

    Args:
        setting: Name of the setting, for messages.
        source: As in `load_model`.
        base: Of an adapter folder, instead of the one that it names.

    Raises:
        UserError: It names none.
    """
    if not is_adapter(source):
        return source
    found = base or adapter_base(source)
    if found is None:
        raise UserError(
            f"{setting}: {source}/adapter_config.json names no base_model_name_or_path: write "
            "there the source of the model that the adapter belongs to"
        )
    return found


def first_mismatch(error: RuntimeError) -> str:
    """Return the first of the many lines with which ``load_state_dict`` refuses weights."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines[1:] if line), lines[0])


def load_model(setting: str, source: str, sharding: Sharding | None = None, **options: Any) -> Any:
    """Return a Hugging Face causal language model in float32.

    Args:
        setting: Name of the setting, for messages.
        source: Hub name, folder, ``.gguf`` file or ``embedded:keywords``. Of an adapter folder the
            model it belongs to, with the adapter merged into its weights.
        sharding: How the weights are dealt out over ranks, in a precision of its own; None: not.
        options: For ``from_pretrained``.

    Raises:
        UserError: It cannot be loaded.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if is_adapter(source):
        _refuse_parts(setting, source, sharding)
        model = load_model(setting, base_of(setting, source), sharding, **options)
        return saved_adapters(setting, model, source).merged()
    options.setdefault("dtype", torch.float32)
    if sharding is not None:
        options |= sharding.options()
    model = _plain(source, _load(setting, source, AutoModelForCausalLM, **options))
    return model if sharding is None else own_shards(model, sharding)


def load_classifier(
    setting: str, source: str, sharding: Sharding | None = None, **options: Any
) -> tuple[Any, list[str]]:
    """Return a Hugging Face sequence classification model in float32, and what it had to make up.

    Args:
        setting: Name of the setting, for messages.
        source: Hub name, folder, ``.gguf`` file or ``embedded:keywords``.
        sharding: How the weights are dealt out over ranks, in a precision of its own; None: not.
        options: For ``from_pretrained``, such as ``num_labels``.

    Returns:
        The model, and the names of the weights that its source does not have and that are random:
        none for a trained one.

    Raises:
        UserError: It cannot be loaded.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    if is_adapter(source):
        _refuse_parts(setting, source, sharding)
        base, labels = base_of(setting, source), adapter_labels(source)
        options |= {} if labels is None else {"num_labels": labels}
        model, made_up = load_classifier(setting, base, sharding, **options)
        adapters = saved_adapters(setting, model, source)
        return adapters.merged(), [name for name in made_up if not adapters.trains_along(name)]
    options.setdefault("dtype", torch.float32)
    if sharding is not None:
        options |= sharding.options()
    # What is missing is returned: the report on it would be noise where a head is to be trained.
    numbers = torch.get_rng_state()
    reporter = logging.getLogger("transformers.modeling_utils")
    level = reporter.level
    reporter.setLevel(logging.ERROR)
    try:
        model, report = _load(
            setting, source, AutoModelForSequenceClassification, output_loading_info=True, **options
        )
    finally:
        reporter.setLevel(level)
    model, missing = _plain(source, model), sorted(report["missing_keys"])
    if sharding is not None:
        own_shards(model, sharding)
        torch.set_rng_state(numbers)
        draw_whole(model, missing)
    return model, missing


def _refuse_parts(setting: str, source: str, sharding: Sharding | None) -> None:
    if sharding is not None:
        raise UserError(
            f"{setting}: {source} is an adapter, which cannot be merged into weights that are "
            "dealt out with trainer.strategy=fsdp2: merge it first (peft's merge_and_unload, or "
            "grao export), and give that folder"
        )


def _plain(source: str, model: Any) -> Any:
    # Weights read from GGUF are plain floats by now; the note would make them unsaveable.
    if source.endswith(".gguf") and hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
        model.hf_quantizer, model.is_quantized = None, False
    return model


def load_tokenizer(setting: str, source: str) -> Any:
    """Return the tokenizer of a source of `load_model`.

    Raises:
        UserError: It cannot be loaded, or has neither an end-of-sequence token nor, as encoders
            have, one that starts a text.
    """
    from transformers import AutoTokenizer

    if is_adapter(source) and not has_tokenizer(source):
        source = base_of(setting, source)
    return checked_tokenizer(setting, _load(setting, source, AutoTokenizer))


def has_tokenizer(source: str) -> bool:
    """Return whether a source is a folder that has a tokenizer, with or without a model."""
    return (Path(source).expanduser() / "tokenizer_config.json").is_file()


def checked_tokenizer(setting: str, tokenizer: Any) -> Any:
    """Return a tokenizer that can be used.

    Raises:
        UserError: It is none, or has neither an end-of-sequence token nor, as encoders have, one
            that starts a text.
    """
    if not hasattr(tokenizer, "get_vocab"):
        raise UserError(
            f"{setting} must be a source or a loaded tokenizer of transformers; got "
            f"{type(tokenizer).__name__}"
        )
    if tokenizer.eos_token_id is None and tokenizer.cls_token_id is None:
        raise UserError(
            f"{setting}: the tokenizer of {tokenizer.name_or_path} has no end-of-sequence token; "
            "set it"
        )
    return tokenizer


def eos_ids(source: ModelSource | None, tokenizer: Any) -> tuple[int, ...]:
    """Return every token id that ends a sequence: the tokenizer's and the generation config's.

    Args:
        source: Of the model's own weights, or a model; None: there is none.
        tokenizer: Of the model.
    """
    from transformers import GenerationConfig

    ids = [tokenizer.eos_token_id]
    if not isinstance(source, str):
        configured: Any = getattr(source, "generation_config", None)
        configured = getattr(configured, "eos_token_id", None)
        ids += configured if isinstance(configured, list) else [configured]
    elif not source.startswith(_EMBEDDED) and not source.endswith(".gguf"):
        try:
            configured = GenerationConfig.from_pretrained(source).eos_token_id
        except OSError:  # many models ship none
            configured = None
        ids += configured if isinstance(configured, list) else [configured]
    return tuple(dict.fromkeys(number for number in ids if number is not None))


def _silence_gguf() -> None:
    """Switch off the one bar of transformers that `disable_progress_bar` does not reach."""
    from transformers import modeling_gguf_pytorch_utils as reader

    bar = getattr(reader, "tqdm", None)
    if bar is not None:
        reader.tqdm = partial(bar, disable=True)


def _load(setting: str, source: str, auto_class: Any, **options: Any) -> Any:
    import transformers

    of_tokenizer = auto_class is transformers.AutoTokenizer
    # Such a folder needs no model beside it.
    alone = of_tokenizer and has_tokenizer(source)
    fault = None if alone else source_fault(setting, source)
    if fault:
        raise UserError(fault)
    if not sys.stderr.isatty():  # in a log file a bar is noise
        transformers.utils.logging.disable_progress_bar()
        if source.endswith(".gguf"):
            _silence_gguf()
    location = str(Path(source).expanduser()) if source.startswith("~") else source
    if source.startswith(_EMBEDDED):
        from grao_lightning.embedded.base import base_folder

        location = str(base_folder(source.removeprefix(_EMBEDDED)))
    elif source.endswith(".gguf"):
        path = Path(location)
        location, options["gguf_file"] = str(path.parent), path.name
    try:
        return auto_class.from_pretrained(location, **options)
    except Exception as error:  # an unknown or damaged model fails in many ways
        reason = str(error).strip().splitlines()[0].rstrip(".") if str(error) else repr(error)
        raise UserError(
            f"{setting}: cannot load {source!r}: {reason}. Give a hub name that can be reached, a "
            "folder that save_pretrained wrote, or a .gguf file (pip install "
            "'grao-lightning[gguf]')"
        ) from error
