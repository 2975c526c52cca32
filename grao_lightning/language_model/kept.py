"""What a checkpoint keeps of a model besides its weights: configuration and tokenizer."""

import io
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grao_lightning.faults import UserError
from grao_lightning.language_model.loading import load_tokenizer

_UNDATED = (1980, 1, 1, 0, 0, 0)  # the same files give the same bytes


def packed_source(model: Any, tokenizer: Any) -> Tensor:
    """Return a Hugging Face folder without weights, compressed, as one uint8 tensor.

    Args:
        model: Gives its configuration and its generation configuration.
        tokenizer: Of the model.
    """
    with tempfile.TemporaryDirectory() as name:
        model.config.save_pretrained(name)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(name)
        tokenizer.save_pretrained(name)
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w") as archive:
            for path in sorted(Path(name).rglob("*")):
                if path.is_file():
                    entry = zipfile.ZipInfo(path.relative_to(name).as_posix(), _UNDATED)
                    archive.writestr(entry, path.read_bytes(), zipfile.ZIP_DEFLATED)
    return torch.frombuffer(bytearray(content.getvalue()), dtype=torch.uint8)


@contextmanager
def unpacked_source(packed: Tensor) -> Iterator[str]:
    """Give the folder that `packed_source` packed, until the context ends."""
    with tempfile.TemporaryDirectory() as name:
        with zipfile.ZipFile(io.BytesIO(packed.numpy().tobytes())) as archive:
            archive.extractall(name)
        yield name


def bare_model(folder: str, *, is_policy: bool) -> tuple[Any, Any]:
    """Return a model whose weights lie on no device (to be assigned), and its tokenizer.

    Args:
        folder: Of `unpacked_source`.
        is_policy: A causal language model, else a sequence classification model.

    Raises:
        UserError: This transformers does not know the architecture.
    """
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        GenerationConfig,
    )

    auto = AutoModelForCausalLM if is_policy else AutoModelForSequenceClassification
    try:
        with torch.device("meta"):  # no memory, no time, and no random numbers drawn
            model = auto.from_config(AutoConfig.from_pretrained(folder))
    except (ValueError, KeyError) as error:
        raise UserError(
            f"--ckpt_path: the architecture in the checkpoint cannot be made: {error}; use the "
            "version of transformers that trained it"
        ) from error
    if (Path(folder) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model, load_tokenizer("--ckpt_path", folder)
