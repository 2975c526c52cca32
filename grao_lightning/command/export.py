"""``grao export``: a checkpoint -> a Hugging Face folder."""

import argparse
from contextlib import nullcontext
from pathlib import Path

from grao_lightning.command.help import OneLine
from grao_lightning.display.logs import wrapped
from grao_lightning.faults import Faults, UserError
from grao_lightning.files import whole_folder


def export_command(arguments: list[str]) -> None:
    """Run ``grao export`` with its arguments."""
    parser = argparse.ArgumentParser(
        prog="grao export",
        formatter_class=OneLine,
        description="Write the trained policy and its tokenizer as a Hugging Face folder that "
        "AutoModelForCausalLM and AutoTokenizer load; a reward model as one that "
        "AutoModelForSequenceClassification loads.",
    )
    parser.add_argument("--ckpt_path", required=True, help="checkpoint of grao fit, file or folder")
    parser.add_argument("--output", required=True, help="folder to write; must not hold files")
    parser.add_argument(
        "--policy",
        help="source of the architecture and tokenizer, if not as when it was trained; of a reward "
        "model its backbone",
    )
    parser.add_argument(
        "--adapter",
        action="store_true",
        help="of a run with model.lora: write the adapter alone, which peft loads, and not the "
        "model with the adapter merged into its weights",
    )
    options = parser.parse_args(arguments)
    notes = export(
        options.ckpt_path, options.output, policy=options.policy, adapter=options.adapter
    )
    print(f"written: {options.output}")
    for note in notes:
        print(wrapped(note))


def export(
    ckpt_path: str, output: str, policy: str | None = None, *, adapter: bool = False
) -> list[str]:
    """Write the policy or reward model of a checkpoint, and its tokenizer, to a folder.

    The tokenizer gets the chat template by which the run read its prompts, so that the next stage
    reads them alike; the source of the model is not needed any more, except after a run with
    ``model.lora``, whose checkpoints hold adapters alone. A reward model gets a padding token that
    ends no answer: Hugging Face's decoders score the last token that is not padding.

    Args:
        ckpt_path: A checkpoint that ``fit`` wrote, a file or a folder.
        output: A folder that does not exist yet or is empty.
        policy: Source of architecture and tokenizer; by default those in the checkpoint, or of a
            checkpoint that has none the source it names.
        adapter: Write the adapter of a run with ``model.lora`` alone, as peft loads it, instead of
            the model with the adapter merged into its weights.

    Returns:
        What to know of the tokenizer's chat template, where that is not the source's own.

    Raises:
        UserError: The checkpoint cannot be read or does not fit, or the folder is in use.
    """
    folder = Path(output).expanduser()
    _argument_faults(ckpt_path, folder, policy).raise_if_any("in the arguments")
    from grao_lightning.callbacks.exporting import exported, trained_in
    from grao_lightning.language_model.checkpoints import read_checkpoint

    path = Path(ckpt_path).expanduser()
    found = trained_in(read_checkpoint("--ckpt_path", path), str(path))
    ready = exported(found, policy, adapter=adapter)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output: cannot make the folder {output}: {error.strerror}") from None
    # A folder that is there may be a mount, which nothing takes the place of.
    with nullcontext(folder) if folder.exists() else whole_folder(folder) as place:
        ready.save(place)
    return ready.notes


def _argument_faults(ckpt_path: str, folder: Path, policy: str | None) -> Faults:
    from grao_lightning.language_model.checkpoints import checkpoint_fault
    from grao_lightning.language_model.loading import source_fault

    faults = Faults()
    faults.add(checkpoint_fault("--ckpt_path", ckpt_path))
    if policy is not None:
        faults.add(source_fault("--policy", policy))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        faults.add(f"--output: {folder} holds files already; name a new folder")
    return faults
