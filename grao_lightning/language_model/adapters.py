"""LoRA (arXiv 2106.09685) by peft: low-rank adapters that are trained in a frozen model's place.

``W x + alpha / rank * B A x`` stands for ``W x``: B starts at zero, so that a model with new
adapters is the model itself, and with its adapters off it is so at any time, bit for bit.
"""

import json
import logging
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn
from typing_extensions import final

from grao_lightning.faults import Faults, NamedSettings, UserError, extra_fault
from grao_lightning.language_model.fingerprint import fingerprint
from grao_lightning.language_model.frozen import Found, FrozenModel, inside
from grao_lightning.language_model.sharded import shards_of
from grao_lightning.randomness import run_seed

log = logging.getLogger(__name__)

ALL_LINEAR = "all-linear"
DEFAULT_RANK = 16
#: Learning rates of full training: an adapter stays where it is at those.
SLOW = 1e-5

_CONFIG = "adapter_config.json"
_HEADS = ("score", "classifier")
_TASKS = {True: "CAUSAL_LM", False: "SEQ_CLS"}  # by whether it is a language model
_OWN, _START = "default", "start"  # names of adapters within a model
#: In what two adapters of one model must be alike for the weights of one to be those of the other.
_DECISIVE = ("r", "lora_alpha", "target_modules", "use_rslora", "use_dora", "rank_pattern",
             "alpha_pattern", "modules_to_save")  # fmt: skip
_SETTINGS = {"r": "rank", "lora_alpha": "alpha", "target_modules": "target_modules"}

Quantize = Literal["nf4"]


@final  # or the command line's parser would have class_path and init_args for it
@dataclass
class LoRA(NamedSettings):
    """Low-rank adapters, trained in the place of a model's own weights, which stay as they are.

    Args:
        rank: Of the update of a matrix; null = 16, of an adapter folder its own.
        alpha: The update is multiplied by alpha / rank; null = twice the rank, of an adapter folder
            its own.
        dropout: Of what goes into an adapter, in training.
        target_modules: Names, or ends of names, of the linear modules that get an adapter, or a
            regular expression of whole names; "all-linear" = all but the head, and a
            mixture's experts where peft can; of an adapter folder its own.
        base: Of an adapter folder, the model it belongs to; null = the one that its
            adapter_config.json names.
        quantize: "nf4" = 4 bits for each of the frozen weights (QLoRA, arXiv 2305.14314); null =
            as the model has them.
    """

    rank: int | None = None
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: str | list[str] = ALL_LINEAR
    base: str | None = None
    quantize: Quantize | None = None

    def faults(self, setting: str) -> Faults:
        """Return what is wrong with the settings, and which package is missing.

        Args:
            setting: Name of the setting, for the messages.
        """
        faults = Faults()
        if self.rank is not None:
            faults.at_least(f"{setting}.rank", self.rank, 1)
        if self.alpha is not None and not self.alpha > 0:
            faults.add(f"{setting}.alpha must be > 0; got {self.alpha}")
        if not 0 <= self.dropout < 1:
            faults.add(f"{setting}.dropout must lie in [0, 1); got {self.dropout}")
        if not self.target_modules:
            faults.add(f"{setting}.target_modules must name a module; got none: say {ALL_LINEAR}")
        if self.quantize is not None:
            faults.one_of(f"{setting}.quantize", self.quantize, get_args(Quantize))
        packages, extra = ["peft"], "lora"
        if self.quantize:
            packages, extra = [*packages, "bitsandbytes", "accelerate"], "qlora"
        faults.add(extra_fault(setting, packages, extra))
        return faults


def as_lora(settings: Any) -> LoRA | None:
    """Return settings of adapters, which checkpoints and Python may hold as a mapping."""
    return settings if settings is None or isinstance(settings, LoRA) else LoRA(**settings)


def as_primitives(settings: LoRA | None) -> dict[str, Any] | None:
    """Return settings as checkpoints keep them."""
    return None if settings is None else asdict(settings)


# -- adapter folders -------------------------------------------------------------------------------


def is_adapter(source: Any) -> bool:
    """Return whether a source is a folder of peft's, which holds an adapter and no model."""
    return isinstance(source, str) and (Path(source).expanduser() / _CONFIG).is_file()


def adapter_fault(setting: str, source: str) -> str | None:
    """Return what is wrong with an adapter folder as far as can be told without loading it."""
    missing = extra_fault(f"{setting}={source}, an adapter folder,", ["peft"], "lora")
    if missing:
        return missing
    try:
        config = json.loads((Path(source).expanduser() / _CONFIG).read_text())
    except ValueError as error:
        return f"{setting}: {source}/{_CONFIG} cannot be read: {error}"
    if config.get("peft_type") != "LORA":
        return f"{setting}: {source} must hold a LoRA adapter; got {config.get('peft_type')}"
    refused = _unknown_parts(config)
    return f"{setting}: {source} must hold plain LoRA; got {refused}" if refused else None


def adapter_base(source: str) -> str | None:
    """Return the source of the model that an adapter folder belongs to, None if it tells none."""
    config = json.loads((Path(source).expanduser() / _CONFIG).read_text())
    base: str | None = config.get("base_model_name_or_path")
    return base or None


def adapter_labels(source: str) -> int | None:
    """Return how many labels a classifier's adapter gives scores for, None if it holds no head."""
    from peft import load_peft_weights

    weights = load_peft_weights(str(Path(source).expanduser()), device="cpu")
    heads = [
        value.shape[0]
        for name, value in weights.items()
        if value.dim() == 2 and "lora_" not in name and set(_HEADS) & set(name.split("."))
    ]
    return min(heads, default=None)  # a head may have a layer before its last one


def _unknown_parts(config: dict[str, Any]) -> str | None:
    """Return in what an adapter goes beyond matrices beside linear modules, as far as we know."""
    if config.get("bias", "none") != "none":
        return f"bias={config['bias']}, which changes the model itself"
    parts = ("trainable_token_indices", "layer_replication")
    return next((f"{part}={config[part]}" for part in parts if config.get(part)), None)


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


def lasting(source: str) -> str:
    """Return a source as another folder may name it: of a local one the whole path."""
    path = Path(source).expanduser()
    return str(path.resolve()) if path.exists() else source


def quantization(
    quantize: Quantize | None, device: torch.device, *, lowered: bool
) -> dict[str, Any]:
    """Return what makes ``from_pretrained`` keep the weights of linear modules in few bits.

    Args:
        quantize: How; None: not at all.
        device: Where the model is to be.
        lowered: Whether products are computed in bfloat16, else in float32.
    """
    if quantize is None:
        return {}
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantize,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if lowered else torch.float32,
    )
    return {"quantization_config": config, "device_map": {"": str(device)}}


# -- a model and its adapters ----------------------------------------------------------------------


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
        return [parameter for layer in _layers(self.peft) for parameter in _of_adapters(layer)]

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
                theirs, ours = (_few(one.get(name), other.get(name)) for one, other in
                                ((saved, own), (own, saved)))  # fmt: skip
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
    whole = {name.rpartition(".")[0] for name in made_up or () if name.split(".")[0] not in _HEADS}
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
        adapters.peft.add_adapter(_START, config)
        _fill(setting, adapters, weights, folder, _START)
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
        return adapters
    layers = _layers(model)
    if _adapts_experts(model):
        raise UserError(
            f"{setting}.target_modules must leave out experts with trainer.strategy=fsdp2, since "
            "peft forms their weights anew from whole ones; name the attention's modules, such as "
            "[q_proj, k_proj, v_proj, o_proj], or use ddp"
        )
    for layer in layers:
        if layer.lora_A[_OWN].in_features != layer.get_base_layer().in_features:
            raise UserError(
                f"{setting}: peft takes parts of weights for whole ones where there are several "
                "copies of the model; set trainer.strategy.replicas to 1"
            )
    for name in (_OWN, _START) if adapters.start else (_OWN,):
        pairs = [(layer.lora_A[name], layer.lora_B[name]) for layer in layers]
        shards.shard_within([part for pair in pairs for part in pair])
    for part in _trained_copies(model):
        part._apply(lambda value: value.full_tensor() if hasattr(value, "full_tensor") else value)
        shards.shard_within([part])
    whole = [name for name, value in model.named_parameters()
             if value.requires_grad and not hasattr(value, "device_mesh")]  # fmt: skip
    if whole:
        raise UserError(
            f"{setting}: {whole[0]} stays whole on every rank with trainer.strategy=fsdp2, and its "
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
    found = [name for name, part in model.named_modules() if part in set(_layers(model))]
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
            f"{reason}. Name the model it belongs to in its {_CONFIG}, or as model.lora.base"
        )


def _adapts_experts(model: Any) -> bool:
    """Return whether weights that stand together, as those of all experts, have an adapter."""
    from peft.tuners.lora.layer import ParamWrapper

    return any(isinstance(part, ParamWrapper) for part in model.modules())


def _tell_reach(model: Any) -> None:
    """Say what adapters of experts cost, and which large weights stay as they are."""
    if _adapts_experts(model):
        log.warning(
            "%s: its experts get adapters, for which peft forms the weights of all experts anew in "
            "every pass and keeps them for the backward pass: if memory runs out, name the "
            "attention's modules in model.lora.target_modules, or set model.gradient_checkpointing",
            type(model).__name__,
        )
    total = sum(parameter.numel() for parameter in model.parameters())
    reached = {id(p) for part in [*_ends(model), *_layers(model)] for p in part.parameters()}
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


# -- the model as it was ---------------------------------------------------------------------------


class BeforeTraining(FrozenModel):
    """A policy as it was before training: itself with its adapters off, or those it began with.

    It has no weights of its own, so there is nothing to move along or to keep.

    Args:
        model: The policy, with adapters within.
        start: Whether it began with adapters, which stand besides.
    """

    def __init__(self, model: Any, start: bool = False) -> None:
        self.model = model
        self._start = start

    def inside(self, function: Callable[[Any], Found]) -> Found:
        """Return what a function of the model gives while the training's part is off."""
        with _as_before(self.model, self._start):
            return inside(self.model, function)

    def follow(self, move: Callable[..., Any]) -> None:
        """Do nothing: whoever holds the policy moves it."""


@contextmanager
def _as_before(model: Any, start: bool) -> Iterator[None]:
    """Switch to the adapters of before, or to none, and to evaluation; then back to what it was."""
    modes = [(part, part.training) for part in model.modules()]
    layers = _layers(model)
    states = [(layer, layer.disable_adapters, layer.active_adapters) for layer in layers]
    model.eval()
    try:
        with _gradients_as_they_are(layers):
            for layer in layers:
                if start:
                    layer.set_adapter(_START)
                else:
                    layer.enable_adapters(False)
        yield
    finally:
        with _gradients_as_they_are(layers):
            for layer, were_off, active in states:
                layer.set_adapter(active)
                layer.enable_adapters(not were_off)
        for part, mode in modes:
            part.training = mode


@contextmanager
def _gradients_as_they_are(layers: list[Any]) -> Iterator[None]:
    """Leave what is trained as it is: peft's switches also say what needs a gradient."""
    needs = [(parameter, parameter.requires_grad) for layer in layers
             for parameter in layer.parameters()]  # fmt: skip
    try:
        yield
    finally:
        for parameter, need in needs:
            parameter.requires_grad_(need)


def _layers(model: Any) -> list[Any]:
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


def _few(value: Any, other: Any) -> Any:
    """Return a value for a message: of two lists of names those that the other lacks."""
    if not isinstance(value, list) or not isinstance(other, list):
        return value
    return value if len(value) <= 8 else f"{len(value)} names, {value[0]} among them"
