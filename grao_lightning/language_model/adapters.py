"""LoRA (arXiv 2106.09685) by peft: low-rank adapters that are trained in a frozen model's place.

``W x + alpha / rank * B A x`` stands for ``W x``: B starts at zero, so that a model with new
adapters is the model itself, and with its adapters off it is so at any time, bit for bit.
"""

import logging
import warnings
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from grao_lightning.faults import UserError
from grao_lightning.language_model.adapted_linear import add_in_one_pass
from grao_lightning.language_model.adapter_folders import CONFIG, HEADS
from grao_lightning.language_model.fingerprint import fingerprint
from grao_lightning.language_model.lora import ALL_LINEAR, LoRA, Quantize
from grao_lightning.language_model.sharded import device_of, shards_of
from grao_lightning.randomness import run_seed

log = logging.getLogger(__name__)

DEFAULT_RANK = 16
#: The adapters as they were before training, where a model holds them besides.
START = "start"
_OWN = "default"
_TASKS = {True: "CAUSAL_LM", False: "SEQ_CLS"}  # by whether it is a language model
#: In what two adapters of one model must be alike for the weights of one to be those of the other.
_DECISIVE = ("r", "lora_alpha", "target_modules", "target_parameters", "use_rslora", "use_dora",
             "rank_pattern", "alpha_pattern", "modules_to_save")  # fmt: skip
_SETTINGS = {"r": "rank", "lora_alpha": "alpha", "target_modules": "target_modules"}


def base_fingerprint(model: Any, quantize: Quantize | None, made_up: Collection[str] = ()) -> str:
    """Return what tells the models apart that adapters may belong to.

    Args:
        model: Before it gets adapters.
        quantize: Of its linear modules, which then do not count: read from the same source, they
            are others where they are not quantized.
        made_up: Names of weights that its source does not have.
    """
    linear = {
        f"{name}.{own}"
        for name, part in model.named_modules()
        if quantize and isinstance(part, nn.Linear)
        for own, _ in part.named_parameters(recurse=False)
    }
    return fingerprint(model, without={*made_up, *linear}, roughly=True)


class Adapters:
    """The adapters within a model.

    Args:
        peft: peft's model around the model.
        start: Whether the model holds the adapters as they were before training besides those that
            are trained.
    """

    def __init__(self, peft: Any, start: bool = False) -> None:
        self.peft = peft
        self.start = start

    @property
    def config(self) -> dict[str, Any]:
        """Return peft's configuration as JSON may hold it."""
        return {**_plain(self.peft.peft_config[_OWN].to_dict()), "base_model_name_or_path": None}

    def parameters(self) -> list[nn.Parameter]:
        """Return the adapters' own parameters: no part of a model that is trained along."""
        return [
            parameter for layer in adapted_layers(self.peft) for parameter in _of_adapters(layer)
        ]

    @property
    def dtype(self) -> torch.dtype:
        """Return the precision of the model's own weights."""
        dtype: torch.dtype = self.peft.get_base_model().get_input_embeddings().weight.dtype
        return dtype

    def trains_along(self, name: str) -> bool:
        """Return whether a parameter, by its name in the model alone, is trained as it is."""
        whole = self.peft.peft_config[_OWN].modules_to_save or ()
        return any(f".{part}." in f".{name}" for part in whole)

    def difference(self, saved: dict[str, Any]) -> str | None:
        """Return in what other adapters' configuration is not that of these.

        Args:
            saved: `config` of the others.
        """
        own = self.config
        for name in _DECISIVE:
            if own.get(name) != saved.get(name):
                theirs, ours = _few(saved.get(name)), _few(own.get(name))
                setting = f"model.lora.{_SETTINGS.get(name, 'target_modules')}"
                return f"{setting} must be {theirs}, as in the checkpoint; got {ours}"
        return None

    def load(self, weights: dict[str, Any]) -> None:
        """Take the adapters' weights, by their names in the model, and those trained along.

        Raises:
            UserError: They are not those of these adapters.
        """
        model = self.peft.get_base_model()
        own = {name for name, value in model.named_parameters() if value.requires_grad}
        if own != set(weights):
            raise UserError(
                "--ckpt_path: the adapter's weights are not those that its settings ask for, "
                f"{sorted(own ^ set(weights))[0]} for one; give a whole checkpoint"
            )
        model.load_state_dict(weights, strict=False)

    def save(self, folder: Path, base: str | None) -> None:
        """Write an adapter folder that peft loads.

        Args:
            folder: Exists.
            base: Source of the model the adapters belong to, which the folder names.
        """
        self.peft.peft_config[_OWN].base_model_name_or_path = base
        self.peft.save_pretrained(folder, selected_adapters=[_OWN], save_embedding_layers=False)

    def merged(self) -> Any:
        """Return the model with the adapters' updates in its weights, and without adapters."""
        return self.peft.merge_and_unload(adapter_names=[_OWN]).requires_grad_(True)


def new_adapters(
    setting: str, model: Any, settings: LoRA, *, made_up: Sequence[str] | None = None
) -> Adapters:
    """Put new adapters into a model and freeze everything else.

    Args:
        setting: Name of the setting, for messages.
        model: A Hugging Face model; changed in place.
        settings: Of the adapters.
        made_up: Names of a classifier's weights that its source does not have, which are trained
            as they are; its head is so in any case. None: it is a language model.

    Raises:
        UserError: The model has no such modules, or none that may have adapters.
    """
    from peft import LoraConfig

    rank = settings.rank or DEFAULT_RANK
    # peft adds the heads by their common names
    whole = {name.rpartition(".")[0] for name in made_up or () if name.split(".")[0] not in HEADS}
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if settings.alpha is None else settings.alpha,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules,
        task_type=_TASKS[made_up is None],
        modules_to_save=sorted(whole) or None,
    )
    adapters = _adapted(setting, model, config)
    if isinstance(settings.target_modules, list) and not config.target_parameters:
        _check_names(setting, model, settings.target_modules)
    _tell_reach(model)
    return _deal_out(setting, adapters)


def saved_adapters(
    setting: str, model: Any, folder: str, settings: LoRA | None = None, *, start: bool = False
) -> Adapters:
    """Put the adapters of a folder into the model they belong to.

    Args:
        setting: Name of the setting that names the folder, for messages.
        model: A Hugging Face model; changed in place.
        folder: That peft wrote.
        settings: Of the adapters' training; what they say of rank and the like must be so.
        start: Whether to keep them as they are besides.

    Raises:
        UserError: They do not fit the model or the settings.
    """
    from peft import PeftConfig, load_peft_weights

    location = str(Path(folder).expanduser())
    config: Any = PeftConfig.from_pretrained(location)
    config.inference_mode = False
    config.init_lora_weights = True  # what other beginnings did to the model is in the weights
    if settings is not None:
        task = _TASKS[model.get_output_embeddings() is not None]
        if config.task_type not in (None, task):
            raise UserError(
                f"{setting} trains an adapter of {task} on; got {folder}, one of "
                f"{config.task_type}: merge it first (grao export), or remove {setting}"
            )
        config.lora_dropout = settings.dropout
        _check_settings(setting, folder, config, settings)
    weights = load_peft_weights(location, device="cpu")
    adapters = _adapted(setting, model, config)
    _fill(setting, adapters, weights, folder, _OWN)
    if start:
        adapters.peft.add_adapter(START, config)
        _fill(setting, adapters, weights, folder, START)
        adapters.peft.set_adapter(_OWN)
        adapters.start = True
    return _deal_out(setting, adapters)


def kept_adapters(setting: str, model: Any, config: dict[str, Any]) -> Adapters:
    """Put adapters of a kept configuration into a model; their weights are to be loaded.

    Args:
        setting: Name of the setting that names the model, for messages.
        model: A Hugging Face model; changed in place.
        config: `Adapters.config`.

    Raises:
        UserError: They do not fit the model.
    """
    from peft import PeftConfig

    return _adapted(setting, model, PeftConfig.from_peft_type(**config))


def _adapted(setting: str, model: Any, config: Any) -> Adapters:
    from peft import get_peft_model

    _keep_format(model)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # of names that were read from a configuration
        torch.manual_seed(run_seed())  # of A, on every rank and in every run
        try:
            peft: Any = get_peft_model(model, config)
        except (ValueError, TypeError, NotImplementedError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"{setting}: {type(model).__name__} takes no such adapters: {reason}"
            ) from error
    _refuse_embeddings(setting, model)
    return Adapters(peft)


def _keep_format(model: Any) -> None:
    """Keep few-bit weights in the format in which their product has a gradient.

    On some CPUs bitsandbytes packs them anew in a pass without gradients, as of sampling, and then
    multiplies in training by what has none: gradients of adapters below were wrong.
    """
    for part in model.modules():
        if hasattr(part, "support_avx512bf16_for_cpu"):
            part.support_avx512bf16_for_cpu = False


def _deal_out(setting: str, adapters: Adapters) -> Adapters:
    """Deal out adapters over the ranks that share the model's weights, all of them together.

    They are small: gathered once a pass, and not layer by layer.
    """
    model = adapters.peft.get_base_model()
    shards = shards_of(model)
    if shards is None:
        add_in_one_pass(model)
        return adapters
    layers = adapted_layers(model)
    if _adapts_experts(model):
        raise UserError(
            f"{setting}.target_modules must leave out experts with trainer.strategy=fsdp2, since "
            "peft forms their weights anew from whole ones; name the attention's modules, such as "
            "[q_proj, k_proj, v_proj, o_proj], or use ddp"
        )
    for name in (_OWN, START) if adapters.start else (_OWN,):
        pairs = [(layer.lora_A[name], layer.lora_B[name]) for layer in layers]
        shards.shard_within([part for pair in pairs for part in pair])
    for copied in _trained_copies(model):
        for part in copied.modules():  # of parts, which nobody would gather
            for name, value in list(part.named_parameters(recurse=False)):
                whole = value.full_tensor() if hasattr(value, "full_tensor") else value
                setattr(part, name, nn.Parameter(whole.detach(), value.requires_grad))
        shards.shard_within([copied])
    left = [name for name, value in model.named_parameters()
            if value.requires_grad and not hasattr(value, "device_mesh")]  # fmt: skip
    if left:
        raise UserError(
            f"{setting}: {left[0]} stays whole on every rank with trainer.strategy=fsdp2, and its "
            "gradient would not be exchanged: use ddp"
        )
    return adapters


def _refuse_embeddings(setting: str, model: Any) -> None:
    """Refuse adapters, and trained copies, of the head and of the embeddings.

    The head is computed as the one matrix it is, chunk by chunk, and may be the embeddings' too.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    for name, part in model.named_modules():
        ends = any(part is end for end in _ends(model))
        if ends and isinstance(part, BaseTunerLayer | AuxiliaryTrainingWrapper):
            raise UserError(
                f"{setting}.target_modules must not name the head or the embeddings, whose matrix "
                f"stays as it is (it is read whole, and often is both); got {name}: remove it, or "
                f"say {ALL_LINEAR}"
            )


def _ends(model: Any) -> list[Any]:
    found = []
    for getter in (model.get_input_embeddings, model.get_output_embeddings):
        with suppress(NotImplementedError, AttributeError):
            found.append(getter())
    return [part for part in found if part is not None]


def _check_names(setting: str, model: Any, names: list[str]) -> None:
    """Refuse names of no module, which peft passes over where another one is found."""
    found = [name for name, part in model.named_modules() if part in set(adapted_layers(model))]
    for name in names:
        if not any(own == name or own.endswith(f".{name}") for own in found):
            known = sorted({own.rpartition(".")[2] for own in found})
            raise UserError(
                f"{setting}.target_modules: {type(model).__name__} has no linear module {name}; "
                f"the others are {', '.join(known)}"
            )


def _check_settings(setting: str, folder: str, config: Any, settings: LoRA) -> None:
    targets = settings.target_modules
    wanted = {
        "rank": (settings.rank, config.r),
        "alpha": (settings.alpha, config.lora_alpha),
        "target_modules": (None if targets == ALL_LINEAR else targets, config.target_modules),
    }
    for name, (asked, own) in wanted.items():
        if asked is not None and _plain(asked) != _plain(own):
            raise UserError(
                f"{setting}.{name} must be that of the adapter that goes on being trained, "
                f"{_plain(own)} in {folder}; got {asked}: remove it"
            )


def _fill(setting: str, adapters: Adapters, weights: Any, folder: str, name: str) -> None:
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    wanted = set(get_peft_model_state_dict(adapters.peft, adapter_name=name))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result: Any = set_peft_model_state_dict(adapters.peft, dict(weights), adapter_name=name)
        strange = [*result.unexpected_keys, *sorted(wanted - set(weights))]
        reason = f"{len(strange)} weights have no place, or none: {strange[0]}" if strange else ""
    except (RuntimeError, KeyError, ValueError) as error:
        lines = [line.strip() for line in str(error).splitlines()]
        reason = next((line for line in lines[1:] if line), lines[0])
    if reason:
        model = type(adapters.peft.get_base_model()).__name__
        raise UserError(
            f"{setting}: the adapter in {folder} does not fit {model}: "
            f"{reason}. Name the model it belongs to in its {CONFIG}, or as model.lora.base"
        )


def _adapts_experts(model: Any) -> bool:
    """Return whether weights that stand together, as those of all experts, have an adapter."""
    from peft.tuners.lora.layer import ParamWrapper

    return any(isinstance(part, ParamWrapper) for part in model.modules())


def _unread(model: Any) -> list[str]:
    """Return the modules whose adapters no pass reads; none where weights are dealt out."""
    if shards_of(model) is not None:
        return []
    last = {name: value for name, value in model.named_parameters() if ".lora_B." in name}
    ids = torch.arange(8, device=device_of(model))[None]
    ids = ids % model.get_input_embeddings().weight.shape[0]
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        with torch.enable_grad():
            total = model(input_ids=ids, use_cache=False).logits.float().sum()
            gradients = torch.autograd.grad(total, list(last.values()), allow_unused=True)
    except Exception:  # what fails here fails in the first step
        return []
    finally:
        for part, mode in modes:
            part.training = mode
    pairs = zip(last, gradients, strict=True)
    return [name.partition(".lora_B.")[0] for name, gradient in pairs if gradient is None]


def _tell_reach(model: Any) -> None:
    """Say what adapters of experts cost, and which large weights stay as they are."""
    if _adapts_experts(model):
        log.warning(
            "%s: its experts get adapters, for which peft forms the weights of all experts anew in "
            "every pass and keeps them for the backward pass: if memory runs out, name the "
            "attention's modules in model.lora.target_modules, or set model.gradient_checkpointing",
            type(model).__name__,
        )
    unread = _unread(model)
    if unread:
        log.warning(
            "%s: %d adapters have no part in what it says and will not be trained, since its code "
            "reads the weights beside them: %s for one",
            type(model).__name__,
            len(unread),
            unread[0],
        )
    total = sum(parameter.numel() for parameter in model.parameters())
    reached = {id(p) for part in [*_ends(model), *adapted_layers(model)] for p in part.parameters()}
    left = {
        name: parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1 and id(parameter) not in reached and not parameter.requires_grad
    }
    if sum(left.values()) > 0.01 * total:
        log.warning(
            "%s: %.0f %% of the weights get no adapter and stay as they are, since no linear "
            "module holds them or none was asked for there: %s, as in %s",
            type(model).__name__,
            100 * sum(left.values()) / total,
            ", ".join(sorted({name.rpartition(".")[2] for name in left})),
            next(iter(left)),
        )


def adapted_layers(model: Any) -> list[Any]:
    """Return the modules of a model that hold adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [part for part in model.modules()
            if isinstance(part, BaseTunerLayer) and hasattr(part, "base_layer")]  # fmt: skip


def _trained_copies(model: Any) -> list[nn.Module]:
    """Return the copies of a classifier's modules that are trained as they are."""
    from peft.utils.other import ModulesToSaveWrapper

    wrappers = [part for part in model.modules() if isinstance(part, ModulesToSaveWrapper)]
    return [wrapper.modules_to_save[_OWN] for wrapper in wrappers]


def _of_adapters(layer: Any) -> list[nn.Parameter]:
    own = {id(parameter) for parameter in layer.get_base_layer().parameters()}
    return [parameter for parameter in layer.parameters() if id(parameter) not in own]


def _plain(value: Any) -> Any:
    """Return a value as JSON would give it back, sets sorted."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if isinstance(value, list | tuple):
        return sorted(value) if all(isinstance(part, str) for part in value) else list(value)
    return value.value if hasattr(value, "value") else value


def _few(value: Any) -> Any:
    """Return a value for a message: of many names the first."""
    many = isinstance(value, list) and len(value) > 8
    return f"{len(value)} names, {value[0]} among them" if many else value
