"""``grao export``: a checkpoint -> a Hugging Face folder."""

import argparse
from pathlib import Path
from typing import Any

from grao_lightning.faults import UserError


def export_command(arguments: list[str]) -> None:
    """Run ``grao export`` with its arguments."""
    parser = argparse.ArgumentParser(
        prog="grao export",
        description="Write the trained policy and its tokenizer as a Hugging Face folder that "
        "AutoModelForCausalLM and AutoTokenizer load.",
    )
    parser.add_argument("--ckpt_path", required=True, help="checkpoint of grao fit")
    parser.add_argument("--output", required=True, help="folder to write; must not hold files")
    parser.add_argument(
        "--policy", help="source of the architecture and tokenizer, if not as when it was trained"
    )
    options = parser.parse_args(arguments)
    export(options.ckpt_path, options.output, policy=options.policy)
    print(f"written: {options.output}")


def export(ckpt_path: str, output: str, policy: str | None = None) -> None:
    """Write the policy of a checkpoint and its tokenizer to the folder ``output``.

    Args:
        ckpt_path: A checkpoint that ``fit`` wrote.
        output: A folder that does not exist yet or is empty.
        policy: Source of architecture and tokenizer; by default the one in the checkpoint.

    Raises:
        UserError: The checkpoint cannot be read or does not fit, or the folder is in use.
    """
    import torch

    from grao_lightning.models import load_model, load_tokenizer

    folder = Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--output: {output} holds files already; name a new folder")
    if not Path(ckpt_path).is_file():
        raise UserError(f"--ckpt_path: no such file: {ckpt_path}")
    try:
        checkpoint = torch.load(ckpt_path, map_location="cpu", weights_only=True)
        weights = {
            name.removeprefix("policy."): value
            for name, value in checkpoint["state_dict"].items()
            if name.startswith("policy.")
        }
    except Exception as error:  # a damaged file fails in many ways
        raise UserError(f"--ckpt_path: {ckpt_path} is no checkpoint of grao fit: {error}") from None
    source = policy or _policy_source(checkpoint["hyper_parameters"])
    if source is None or not weights:
        raise UserError(f"--ckpt_path: {ckpt_path} holds no policy of grao fit")
    model = load_model("--policy", source)
    dtype = next(iter(weights.values())).dtype
    try:
        model.to(dtype).load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"--policy: {source} does not fit the checkpoint: {error}") from None
    model.save_pretrained(folder)
    load_tokenizer("--policy", source).save_pretrained(folder)


def _policy_source(settings: dict[str, Any]) -> str | None:
    """Return ``model.policy``, from the CLI's nested settings or from the module's own."""
    return settings.get("init_args", settings).get("policy")
