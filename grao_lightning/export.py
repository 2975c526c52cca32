"""``grao export``: a checkpoint -> a Hugging Face folder."""

import argparse
from pathlib import Path
from typing import Any

from grao_lightning.faults import Faults, UserError


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
    from grao_lightning.models import (
        checkpoint_fault,
        first_mismatch,
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
    weights, settings = _read(Path(ckpt_path).expanduser())
    source = policy or settings["policy"]
    model = load_model("--policy", source)
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
    load_tokenizer("--policy", source).save_pretrained(folder)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the policy's weights and the module's settings."""
    import torch

    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in many ways
        reason = str(error).splitlines()[0]
        raise UserError(f"--ckpt_path: {path} cannot be read: {reason}") from error
    weights = {
        name.removeprefix("policy."): value
        for name, value in checkpoint.get("state_dict", {}).items()
        if name.startswith("policy.")
    }
    settings = checkpoint.get("hyper_parameters", {})
    settings = settings.get("init_args", settings)  # nested by the CLI, plain in Python
    if not weights or "policy" not in settings:
        raise UserError(f"--ckpt_path: {path} holds no policy; give a checkpoint of grao fit")
    return weights, settings
