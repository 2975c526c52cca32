"""``grao export``: a checkpoint -> a Hugging Face folder."""

import argparse
from pathlib import Path
from typing import Any

from grao_lightning.faults import Faults, UserError

# what a module trains, and the setting that names its source
_KINDS = {"policy": "policy", "reward_model": "backbone"}


def export_command(arguments: list[str]) -> None:
    """Run ``grao export`` with its arguments."""
    parser = argparse.ArgumentParser(
        prog="grao export",
        description="Write the trained policy and its tokenizer as a Hugging Face folder that "
        "AutoModelForCausalLM and AutoTokenizer load; a reward model as one that "
        "AutoModelForSequenceClassification loads.",
    )
    parser.add_argument("--ckpt_path", required=True, help="checkpoint of grao fit")
    parser.add_argument("--output", required=True, help="folder to write; must not hold files")
    parser.add_argument(
        "--policy",
        help="source of the architecture and tokenizer, if not as when it was trained; of a reward "
        "model its backbone",
    )
    options = parser.parse_args(arguments)
    export(options.ckpt_path, options.output, policy=options.policy)
    print(f"written: {options.output}")


def export(ckpt_path: str, output: str, policy: str | None = None) -> None:
    """Write the policy or reward model of a checkpoint, and its tokenizer, to a folder.

    A reward model gets a padding token that ends no answer: Hugging Face's decoders score the last
    token that is not padding.

    Args:
        ckpt_path: A checkpoint that ``fit`` wrote.
        output: A folder that does not exist yet or is empty.
        policy: Source of architecture and tokenizer; by default the one in the checkpoint.

    Raises:
        UserError: The checkpoint cannot be read or does not fit, or the folder is in use.
    """
    from grao_lightning.language_model.loading import (
        checkpoint_fault,
        first_mismatch,
        load_classifier,
        load_model,
        load_tokenizer,
        source_fault,
    )

    faults = Faults()
    faults.add(checkpoint_fault("--ckpt_path", ckpt_path))
    if policy is not None:
        faults.add(source_fault("--policy", policy))
    folder = Path(output).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        faults.add(f"--output: {output} holds files already; name a new folder")
    faults.raise_if_any("in the arguments")
    kind, weights, settings = _read(Path(ckpt_path).expanduser())
    source = policy or settings[_KINDS[kind]]
    tokenizer = load_tokenizer("--policy", source)
    if kind == "policy":
        model = load_model("--policy", source)
    else:
        model, _ = load_classifier("--policy", source, num_labels=1)
        _give_padding(model, tokenizer)
    dtype = next(iter(weights.values())).dtype
    try:
        model.to(dtype).load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(
            f"--policy: {source} does not fit the checkpoint: {first_mismatch(error)}"
        ) from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output: cannot make the folder {output}: {error.strerror}") from None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _give_padding(model: Any, tokenizer: Any) -> None:
    """Set a padding token other than the one that ends answers, where there is such a token."""
    config = model.config.get_text_config()
    if tokenizer.cls_token_id is None and tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        special = sorted(set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder))
        free = [
            number
            for number in special
            if number not in (tokenizer.eos_token_id, tokenizer.bos_token_id)
            and number < config.vocab_size
        ]
        if free:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(free[0])
    config.pad_token_id = tokenizer.pad_token_id


def _read(path: Path) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Return what is trained, its weights, and the module's settings."""
    import torch

    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in many ways
        reason = str(error).splitlines()[0]
        raise UserError(f"--ckpt_path: {path} cannot be read: {reason}") from error
    state = checkpoint.get("state_dict", {})
    kind = next((kind for kind in _KINDS if any(name.startswith(f"{kind}.") for name in state)), "")
    weights = {
        name.removeprefix(f"{kind}."): value
        for name, value in state.items()
        if name.startswith(f"{kind}.")
    }
    settings = checkpoint.get("hyper_parameters", {})
    settings = settings.get("init_args", settings)  # nested by the CLI, plain in Python
    if not weights or _KINDS[kind] not in settings:
        raise UserError(f"--ckpt_path: {path} holds no policy; give a checkpoint of grao fit")
    return kind, weights, settings
