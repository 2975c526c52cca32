"""Which tokenizer a model goes with, and whether two tokenizers read alike."""

from typing import TYPE_CHECKING, Any

from grao_lightning.faults import UserError
from grao_lightning.language_model.loading import ModelSource, checked_tokenizer, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    TokenizerSource = str | PreTrainedTokenizerBase
else:  # what a config can hold: the command line's parser goes by it
    TokenizerSource = str

_PROBE = "The quick brown Fox's 12 naïve  jumps,\n\n\tover 东京 and 🦊: don't!"


def tokenizer_fault(source: ModelSource, tokenizer: TokenizerSource | None) -> str | None:
    """Return that a model that is handed over tells no tokenizer.

    Args:
        source: Of the model.
        tokenizer: The setting.
    """
    if isinstance(source, str) or tokenizer is not None or _name(source):
        return None
    return (
        "model.tokenizer must be given with a model that was not loaded from a name or folder; got "
        "null: pass tokenizer=AutoTokenizer.from_pretrained(...)"
    )


def tokenizer_of(setting: str, source: ModelSource, tokenizer: TokenizerSource | None) -> Any:
    """Return the tokenizer that is given, else that of the model's source.

    Args:
        setting: Name of the model's setting, for messages.
        source: Of the model; one that is handed over is asked where it was loaded from.
        tokenizer: The setting.

    Raises:
        UserError: There is none, or it cannot be used.
    """
    if isinstance(tokenizer, str):
        return load_tokenizer("model.tokenizer", tokenizer)
    if tokenizer is not None:
        return checked_tokenizer("model.tokenizer", tokenizer)
    if isinstance(source, str):
        return load_tokenizer(setting, source)
    fault = tokenizer_fault(source, tokenizer)
    if fault:
        raise UserError(fault)
    try:
        return load_tokenizer("model.tokenizer", _name(source))
    except UserError as error:
        raise UserError(
            f"{error}. It is where the model handed over came from: pass tokenizer=... with it"
        ) from error


def check_vocabulary(model: Any, tokenizer: Any) -> None:
    """Check that a model knows every token of a tokenizer.

    Raises:
        UserError: It has fewer embeddings.
    """
    known = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > known:
        raise UserError(
            f"model.tokenizer must have at most {known} tokens, as many as the model has "
            f"embeddings; got {len(tokenizer)}: give the model's own tokenizer, or call "
            "model.resize_token_embeddings(len(tokenizer))"
        )


def tokenizer_difference(left: Any, right: Any, *, templates: bool = True) -> str | None:
    """Return in what two tokenizers read texts otherwise, None where they read alike.

    Args:
        left: A Hugging Face tokenizer.
        right: Another one.
        templates: Whether chat templates count.
    """
    of_left, of_right = left.get_vocab(), right.get_vocab()
    if of_left != of_right:
        ours, theirs = (f"{len(ids)} tokens" for ids in (of_left, of_right))
        token = next(iter(sorted(of_left.items() ^ of_right.items())))[0]
        return f"vocabularies of {ours} and {theirs} differ, in {token!r} for one"
    for name in ("eos_token_id", "bos_token_id"):
        if getattr(left, name) != getattr(right, name):
            return f"{name} is {getattr(left, name)} in one and {getattr(right, name)} in the other"
    if left(_PROBE, verbose=False).input_ids != right(_PROBE, verbose=False).input_ids:
        return "the same text becomes other tokens"
    if templates and left.chat_template != right.chat_template:
        return "chat templates differ"
    return None


def _name(model: Any) -> str:
    return str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
