"""``grao export``: a checkpoint -> a Hugging Face folder."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grao_lightning.command.help import OneLine
from grao_lightning.display.logs import wrapped
from grao_lightning.faults import Faults, UserError

# what a module trains, and the setting that names its source
_KINDS = {"policy": "policy", "reward_model": "backbone"}


@dataclass
class _Checkpoint:
    """What a checkpoint of ``fit`` holds for export.

    Attributes:
        kind: What is trained.
        weights: Its weights.
        settings: Of the module.
        source_files: Of `packed_source`; None in checkpoints of before.
        template: By which prompts were read; None = plain strings.
        tells_template: False in checkpoints of before, and of runs without our DataModule.
    """

    kind: str
    weights: dict[str, Any]
    settings: dict[str, Any]
    source_files: Any
    template: str | None
    tells_template: bool


def export_command(arguments: list[str]) -> None:
    """Run ``grao export`` with its arguments."""
    parser = argparse.ArgumentParser(
        prog="grao export",
        formatter_class=OneLine,
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
    notes = export(options.ckpt_path, options.output, policy=options.policy)
    print(f"written: {options.output}")
    for note in notes:
        print(wrapped(note))


def export(ckpt_path: str, output: str, policy: str | None = None) -> list[str]:
    """Write the policy or reward model of a checkpoint, and its tokenizer, to a folder.

    The tokenizer gets the chat template by which the run read its prompts, so that the next stage
    reads them alike; the source of the model is not needed any more. A reward model gets a padding
    token that ends no answer: Hugging Face's decoders score the last token that is not padding.

    Args:
        ckpt_path: A checkpoint that ``fit`` wrote.
        output: A folder that does not exist yet or is empty.
        policy: Source of architecture and tokenizer; by default those in the checkpoint, or of a
            checkpoint that has none the source it names.

    Returns:
        What to know of the tokenizer's chat template, where that is not the source's own.

    Raises:
        UserError: The checkpoint cannot be read or does not fit, or the folder is in use.
    """
    from grao_lightning.language_model.loading import first_mismatch

    folder = Path(output).expanduser()
    _argument_faults(ckpt_path, folder, policy).raise_if_any("in the arguments")
    found = _read(Path(ckpt_path).expanduser())
    model, tokenizer, source = _made(found, policy)
    if found.kind == "reward_model":
        _give_padding(model, tokenizer)
    dtype = next(iter(found.weights.values())).dtype
    try:
        model.to(dtype).load_state_dict(found.weights)
    except RuntimeError as error:
        raise UserError(
            f"--policy: {source} does not fit the checkpoint: {first_mismatch(error)}"
        ) from error
    notes = _give_template(tokenizer, found)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output: cannot make the folder {output}: {error.strerror}") from None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return notes


def _argument_faults(ckpt_path: str, folder: Path, policy: str | None) -> Faults:
    from grao_lightning.language_model.loading import checkpoint_fault, source_fault

    faults = Faults()
    faults.add(checkpoint_fault("--ckpt_path", ckpt_path))
    if policy is not None:
        faults.add(source_fault("--policy", policy))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        faults.add(f"--output: {folder} holds files already; name a new folder")
    return faults


def _made(found: _Checkpoint, policy: str | None) -> tuple[Any, Any, str]:
    """Return a model for the weights, its tokenizer, and where they come from."""
    from grao_lightning.language_model.kept import bare_model, unpacked_source
    from grao_lightning.language_model.loading import load_classifier, load_model, load_tokenizer

    is_policy = found.kind == "policy"
    if policy is None and found.source_files is not None:
        with unpacked_source(found.source_files) as folder:
            return *bare_model(folder, is_policy=is_policy), "the configuration in it"
    source = policy or found.settings.get(_KINDS[found.kind])
    if not isinstance(source, str):
        raise UserError(
            "--policy must name the source of the architecture and tokenizer, since the checkpoint "
            f"does not; got {source!r}"
        )
    tokenizer = load_tokenizer("--policy", source)
    if is_policy:
        return load_model("--policy", source), tokenizer, source
    return load_classifier("--policy", source, num_labels=1)[0], tokenizer, source


def _give_template(tokenizer: Any, found: _Checkpoint) -> list[str]:
    """Give the tokenizer the run's chat template; return what a user should know of it."""
    from grao_lightning.data.templates import is_hh, told

    if not found.tells_template:
        return [
            "The checkpoint does not tell how its prompts were read: the tokenizer keeps its own "
            "chat template. If the run had data.chat_template, give it to the next stage too."
        ]
    if found.template is None or (
        tokenizer.chat_template and tokenizer.get_chat_template() == found.template
    ):
        return []
    tokenizer.chat_template = found.template
    notes = [f"Its tokenizer reads prompts as the run did: {told(found.template)}."]
    if is_hh(found.template) and not _rendered_alike(tokenizer):
        notes.append(
            "Only grao gives these prompts the token ids of training: other programs that render "
            "the template get other ids around it, since this tokenizer reads a text otherwise "
            "after a special token."
        )
    return notes


def _rendered_alike(tokenizer: Any) -> bool:
    """Return whether the template gives plain Hugging Face code the ids that a run reads."""
    from grao_lightning.data.encoding import PromptEncoder

    encoder = PromptEncoder(tokenizer, max_prompt_tokens=None)
    before = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why?"}]
    after = [{"role": "assistant", "content": "No."}]
    prompt = encoder.encode_prompt(before).ids
    for turns, ids in ((before, prompt), (before + after, prompt + encoder.encode_answer("No."))):
        text = tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=turns is before
        )
        if tokenizer(text, add_special_tokens=False).input_ids != ids:
            return False
    return True


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


def _read(path: Path) -> _Checkpoint:
    """Return what a checkpoint holds.

    Raises:
        UserError: It cannot be read, or holds no weights of ours.
    """
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
    if not weights:
        raise UserError(f"--ckpt_path: {path} holds no policy; give a checkpoint of grao fit")
    return _Checkpoint(
        kind,
        weights,
        settings,
        checkpoint.get("source_files"),
        checkpoint.get("chat_template"),
        "chat_template" in checkpoint,
    )
