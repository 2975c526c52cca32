"""What a run has trained -> a Hugging Face folder: for ``grao export``, and beside checkpoints."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from grao_lightning.data.encoding import PromptEncoder
from grao_lightning.data.templates import is_hh, told
from grao_lightning.faults import UserError
from grao_lightning.language_model.adapter_folders import lasting
from grao_lightning.language_model.adapters import base_fingerprint, kept_adapters
from grao_lightning.language_model.kept import bare_model, unpacked_source
from grao_lightning.language_model.loading import (
    first_mismatch,
    load_classifier,
    load_model,
    load_tokenizer,
    source_fault,
)

# what a module trains, and the setting that names its source
_KINDS = {"policy": "policy", "reward_model": "backbone"}


@dataclass
class Trained:
    """What the content of a checkpoint holds for export.

    Attributes:
        kind: What is trained.
        weights: Its weights.
        settings: Of the module.
        source_files: Of `packed_source`; None in checkpoints of before.
        template: By which prompts were read; None = plain strings.
        tells_template: False in checkpoints of before, and of runs without our DataModule.
        adapters: What `StepModule.on_save_checkpoint` tells of them where they alone were trained.
    """

    kind: str
    weights: dict[str, Any]
    settings: dict[str, Any]
    source_files: Any
    template: str | None
    tells_template: bool
    adapters: dict[str, Any] | None = None


@dataclass
class Exported:
    """A model with its trained weights, to be written.

    Attributes:
        model: Of Hugging Face.
        tokenizer: Reads prompts as the run did.
        notes: What to know of its chat template, where that is not the source's own.
        base: Where a model comes from whose adapter is to be written without it; None: all of it.
    """

    model: Any
    tokenizer: Any
    notes: list[str]
    base: str | None = None

    def save(self, folder: Path) -> None:
        """Write both into a folder."""
        if self.base is None:
            self.model.save_pretrained(folder)
        else:
            self.model.save(folder, self.base)
        self.tokenizer.save_pretrained(folder)


def trained_in(content: dict[str, Any], where: str) -> Trained:
    """Return what a checkpoint holds for export.

    Args:
        content: Of the checkpoint.
        where: It lies, for the message.

    Raises:
        UserError: It holds no weights of ours.
    """
    state = content.get("state_dict", {})
    kind = next((kind for kind in _KINDS if any(name.startswith(f"{kind}.") for name in state)), "")
    weights = {
        name.removeprefix(f"{kind}."): value
        for name, value in state.items()
        if name.startswith(f"{kind}.")
    }
    settings = content.get("hyper_parameters", {})
    settings = settings.get("init_args", settings)  # nested by the CLI, plain in Python
    if not weights:
        raise UserError(f"--ckpt_path: {where} holds no policy; give a checkpoint of grao fit")
    return Trained(
        kind,
        weights,
        settings,
        content.get("source_files"),
        content.get("chat_template"),
        "chat_template" in content,
        content.get("adapters"),
    )


def exported(found: Trained, policy: str | None = None, *, adapter: bool = False) -> Exported:
    """Return the model, and its tokenizer with the chat template by which the run read prompts.

    The source of the model is not needed any more, except where adapters alone were trained. A
    reward model gets a padding token that ends no answer: Hugging Face's decoders score the last
    token that is not padding.

    Args:
        found: What is trained; the model takes its weights and does not copy them.
        policy: Source of architecture and tokenizer; by default those in the checkpoint, or of a
            checkpoint that has none the source it names.
        adapter: Whether the adapter alone is to be written; else it is merged into the model.

    Raises:
        UserError: The weights do not fit the source, or there is none.
    """
    if found.adapters is not None:
        return _with_adapters(found, found.adapters, policy, adapter=adapter)
    if adapter:
        raise UserError(
            "--adapter: the checkpoint holds no adapter, since model.lora was null; remove it"
        )
    model, tokenizer, source = _made(found, policy)
    if found.kind == "reward_model":
        give_padding(model, tokenizer)
    try:
        model.load_state_dict(found.weights, assign=True)
    except RuntimeError as error:
        raise UserError(
            f"--policy: {source} does not fit the checkpoint: {first_mismatch(error)}"
        ) from error
    model.tie_weights()  # a tied weight stands in the checkpoint under each of its names
    return Exported(model, tokenizer, _give_template(tokenizer, found))


def _with_adapters(
    found: Trained, kept: dict[str, Any], policy: str | None, *, adapter: bool
) -> Exported:
    """Return the adapters within the model they were trained on, or that model changed by them.

    The model is read from its source in float32, also where its weights were quantized in training:
    an update merged into 4 bits would mostly round away.
    """
    source = policy or kept["source"]
    fault = source_fault("--policy", source)
    if fault:
        raise UserError(fault)
    tokenizer = _kept_tokenizer(found, source)
    made_up: list[str] = []
    if found.kind == "policy":
        model = load_model("--policy", source)
    else:
        model, made_up = load_classifier("--policy", source, num_labels=1)
    if base_fingerprint(model, kept["quantize"], made_up) != kept["base"]:
        raise UserError(
            f"--policy must be the model that the adapter was trained on, {kept['source']} as it "
            f"was then; got other weights from {source}"
        )
    if found.kind == "reward_model":
        give_padding(model, tokenizer)
    adapters = kept_adapters("--policy", model, kept["config"])
    adapters.load(found.weights)
    notes = _give_template(tokenizer, found)
    if adapter:
        return Exported(adapters, tokenizer, notes, lasting(source))
    whole = adapters.merged()
    if kept["quantize"]:
        notes.append(
            f"The adapter is merged into the weights of {source} in full precision, not into those "
            f"of {kept['quantize']} beside which it was trained: log-probabilities differ by what "
            "the 4 bits had rounded away."
        )
    if kept["dtype"] in ("bfloat16", "float16"):
        whole.to(getattr(torch, kept["dtype"]))
        notes.append(
            f"Merged in float32 and rounded to {kept['dtype']}, the run's precision; --adapter "
            "writes the adapter as it was trained."
        )
    return Exported(whole, tokenizer, notes)


def _kept_tokenizer(found: Trained, source: str) -> Any:
    if found.source_files is None:
        return load_tokenizer("--policy", source)
    with unpacked_source(found.source_files) as folder:
        return load_tokenizer("--ckpt_path", folder)


def _made(found: Trained, policy: str | None) -> tuple[Any, Any, str]:
    """Return a model for the weights, its tokenizer, and where they come from."""
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


def _give_template(tokenizer: Any, found: Trained) -> list[str]:
    """Give the tokenizer the run's chat template; return what a user should know of it."""
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
    if is_hh(found.template) and not rendered_alike(tokenizer):
        notes.append(
            "Only grao gives these prompts the token ids of training: other programs that render "
            "the template get other ids around it, since this tokenizer reads a text otherwise "
            "after a special token."
        )
    return notes


def rendered_alike(tokenizer: Any) -> bool:
    """Return whether the template gives plain Hugging Face code the ids that a run reads."""
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


def give_padding(model: Any, tokenizer: Any) -> None:
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
