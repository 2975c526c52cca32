"""``grao memory``: what a run of a config needs, without loading a model."""

import argparse
import inspect
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from grao_lightning.command.help import OneLine
from grao_lightning.command.parse_errors import unknown_module
from grao_lightning.display.logs import wrapped
from grao_lightning.faults import Faults, UserError
from grao_lightning.rewards.importing import config_files

_GIB = 2**30
_NOTES = (
    "By design: weights, gradients, moments, reference model, copies, checkpoint. Counted on "
    "PyTorch's meta device: what the layers keep of each token for the backward pass, in a "
    "micro-batch that is full. Bounds: head, cache of sampling (prompts of "
    "data.max_prompt_tokens, completions of full length). Adapters on experts need more: all "
    "experts' weights are formed anew in each pass.",
    "Not counted: CUDA's context and libraries (about 0.5 to 1 GiB a device or process), what "
    "allocators keep in reserve, rewards and judges that are models, the data, workers.",
)


def memory_command(arguments: list[str]) -> None:
    """Run ``grao memory`` with its arguments."""
    parser = argparse.ArgumentParser(
        prog="grao memory",
        formatter_class=OneLine,
        usage="grao memory --config FILE [--SECTION.NAME VALUE ...]",
        description="Compute what a run needs on each device, on each host and on disk. Loads no "
        "model: a policy may be a hub name, a folder or a config.json. Settings as in grao fit.",
    )
    parser.add_argument("--config", metavar="FILE", help="of grao fit")
    parser.parse_known_args(arguments)  # answers --help
    found = given_settings(arguments)
    from transformers.utils import logging

    logging.set_verbosity_error()
    print(memory_table(found), end="")
    print()
    for note in _NOTES:
        print(wrapped(note))


def given_settings(arguments: Sequence[str]) -> dict[str, Any]:
    """Return the settings of config files and of the command line, which wins, as one tree.

    Raises:
        UserError: A file cannot be read, or an argument is no setting.
    """
    found: dict[str, Any] = {}
    for path in config_files(arguments):
        try:
            content = yaml.safe_load(Path(path).expanduser().read_text())
        except (OSError, yaml.YAMLError) as error:
            raise UserError(f"--config: cannot read {path}: {error}") from None
        _merge(found, content if isinstance(content, dict) else {})
    waiting = list(arguments)
    while waiting:
        name, equals, value = waiting.pop(0).partition("=")
        if not name.startswith("--"):
            raise UserError(f"grao memory: {name!r} is no setting; say --SECTION.NAME VALUE")
        if not equals:
            if not waiting:
                raise UserError(f"{name} must have a value; got none")
            value = waiting.pop(0)
        if name != "--config":
            _set(found, name.removeprefix("--").split("."), yaml.safe_load(value))
    return found


def memory_table(settings: dict[str, Any]) -> str:
    """Return the table of a run's memory.

    Args:
        settings: Of `given_settings`.

    Raises:
        UserError: A setting that counts is unknown or wrong, or a model has no configuration.
    """
    from grao_lightning.language_model import footprint

    plan = planned(settings)
    parts, most = footprint.device(plan.size, plan.run, plan.reference_model)
    trained, _ = footprint.trained(plan.size, plan.run)
    lines = [
        f"{plan.method} of {plan.source}, {plan.size.parameters / 1e9:.3f} billion parameters, "
        f"{trained / 1e9:.3f} trained",
        f"precision {plan.run.precision}, optimiser {plan.run.optimizer}, micro-batches of "
        f"{plan.run.micro_batch_tokens} tokens, {plan.run.ranks} device(s), {plan.strategy}",
        "",
        *(f"  {name:<28}{_shown(value)}" for name, value in parts.items() if value),
        f"  {'most on a device at one time':<28}{_shown(most)}",
        "",
        f"  {'host while models are read':<28}{_shown(plan.host)}",
        f"  {'checkpoint on disk':<28}{_shown(footprint.checkpoint(plan.size, plan.run))}",
    ]
    return "\n".join(lines) + "\n"


def _shown(value: float) -> str:
    return f"{value / _GIB:10.2f} GiB" if value >= 0.01 * _GIB else f"{value / 2**20:10.2f} MiB"


class Plan:
    """What a config asks for, as far as memory goes.

    Args:
        settings: Of `given_settings`.

    Raises:
        UserError: A setting that counts is unknown or wrong, or a model has no configuration.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        from grao_lightning.language_model import footprint

        self.method, model = _model_settings(settings.get("model"))
        policy = "policy" if "policy" in model else "backbone"
        self.source = str(model[policy])
        self.size = _size(f"model.{policy}", self.source)
        lora = model.get("lora")
        self.run = self._run(settings, model, self.method)
        if lora:
            self.run = replace(self.run, adapters=_adapters(self.source, json.dumps(lora)))
        frozen = model.get("reference_model")
        self.reference_model: footprint.ModelSize | None = None
        if frozen == "policy" and not lora:
            self.reference_model = self.size
        elif frozen not in (None, "policy"):
            self.reference_model = _size("model.reference_model", str(frozen))
        here = self.run.ranks // self._nodes
        self.host = footprint.host(self.size, self.run, self.reference_model, here)

    def _run(self, settings: dict[str, Any], model: dict[str, Any], method: str) -> Any:
        import torch

        from grao_lightning.language_model.footprint import LOW_BIT_MOMENTS, PRECISIONS, Run
        from grao_lightning.language_model.head import chunk_tokens
        from grao_lightning.language_model.packing import own_budget

        trainer = settings.get("trainer") or {}
        sampling = _with_defaults("GroupSampling", settings.get("sampling"))
        data = _with_defaults("PromptDataModule", settings.get("data"))
        faults = Faults()
        precision = str(trainer.get("precision") or "32-true")
        faults.one_of("trainer.precision", precision, tuple(PRECISIONS))
        optimizer = str(model.get("optimizer", "adamw"))
        faults.one_of("model.optimizer", optimizer, ("adamw", *LOW_BIT_MOMENTS))
        devices = trainer.get("devices", 1)
        if not isinstance(devices, int) or devices < 1:
            faults.add(f"trainer.devices must be a number here; got {devices!r}: say how many")
        faults.raise_if_any()
        self._nodes = int(trainer.get("num_nodes", 1))
        ranks = int(devices) * self._nodes
        self.strategy, replicas, offload = _strategy(trainer.get("strategy", "auto"), ranks)
        rows = min(sampling["rows_at_once"], sampling["group_size"] * data["prompts_per_step"])
        prompts = max(1, rows // sampling["group_size"])
        prompt = data["max_prompt_tokens"] or 0
        on = "cpu" if trainer.get("accelerator") == "cpu" else "cuda"
        return Run(
            precision=precision,
            optimizer=optimizer,
            master_weights=bool(model.get("master_weights")),
            quantized=bool((model.get("lora") or {}).get("quantize")),
            micro_batch_tokens=model["micro_batch_tokens"]
            or own_budget(prompt + sampling["max_new_tokens"], on),
            checkpointing=bool(model.get("gradient_checkpointing")),
            offloaded=bool(model.get("activation_offload")),
            head_chunk=chunk_tokens(self.size.vocabulary, torch.device(on)),
            ranks=ranks,
            shards=ranks // replicas if self.strategy == "fsdp2" else 1,
            cpu_offload=offload,
            cached_tokens=rows * sampling["max_new_tokens"]
            + (prompts if on == "cpu" else rows) * prompt,
            samples=method != "RewardModule",
            packs=on == "cpu",
        )


def planned(settings: dict[str, Any]) -> Plan:
    """Return what a config asks for."""
    return Plan(settings)


def _strategy(strategy: Any, ranks: int) -> tuple[str, int, bool]:
    """Return a strategy's name, its replicas and whether it offloads."""
    options: dict[str, Any] = {}
    if isinstance(strategy, dict):
        options = strategy.get("init_args") or {}
        strategy = str(strategy.get("class_path", "")).rpartition(".")[2]
    if strategy in ("fsdp2", "ShardedStrategy"):
        return "fsdp2", int(options.get("replicas", 1)), bool(options.get("cpu_offload"))
    return ("ddp" if ranks > 1 else "one device"), 1, False


def _model_settings(model: Any) -> tuple[str, dict[str, Any]]:
    """Return the name of a method and its settings, defaults among them."""
    if isinstance(model, str):
        model = {"class_path": model}
    model = dict(model or {})
    given = dict(model.pop("init_args", None) or {})
    name = str(model.pop("class_path", "GRAOModule")).rpartition(".")[2]
    return name, _with_defaults(name, {**given, **model}, "model")


def _with_defaults(name: str, given: Any, section: str = "") -> dict[str, Any]:
    """Return settings of a class with its defaults; those that it does not have are refused."""
    import grao_lightning

    if not hasattr(grao_lightning, name):
        raise UserError(unknown_module(name))
    parameters = inspect.signature(getattr(grao_lightning, name)).parameters
    given = given if isinstance(given, dict) else {}
    faults = Faults()
    for setting in given if section else ():
        if setting not in parameters:
            faults.add(f"{section}.{setting} is no setting of {name}; see grao fit --help")
    faults.raise_if_any()
    return {key: value.default for key, value in parameters.items()} | given


@cache
def _size(setting: str, source: str) -> Any:
    from grao_lightning.language_model.measuring import empty_model, size_of

    return size_of(empty_model(setting, source, is_policy=setting != "model.backbone"))


@cache
def _adapters(source: str, lora: str) -> int:
    """Return the number of parameters of adapters on a model without weights."""
    from grao_lightning.language_model.adapters import new_adapters
    from grao_lightning.language_model.lora import as_lora
    from grao_lightning.language_model.measuring import empty_model

    settings = as_lora({**json.loads(lora), "quantize": None})
    assert settings is not None
    settings.faults("model.lora").raise_if_any()
    model = empty_model("model.policy", source)
    parameters = new_adapters("model.policy", model, settings).parameters()
    return sum(p.numel() for p in set(parameters))  # wrappers of experts name some twice


def _merge(into: dict[str, Any], content: dict[str, Any]) -> None:
    for name, value in content.items():
        if isinstance(value, dict) and isinstance(into.get(name), dict):
            _merge(into[name], value)
        else:
            into[name] = value


def _set(into: dict[str, Any], path: list[str], value: Any) -> None:
    """Set a setting by its dotted name; ``model.x`` is ``model.init_args.x``."""
    if path[0] == "model" and len(path) > 1 and path[1] not in ("class_path", "init_args"):
        path = ["model", "init_args", *path[1:]]
    for name in path[:-1]:
        inner = into.get(name)
        if isinstance(inner, str):  # as in `--model GRPOModule`
            inner = {"class_path": inner}
        into[name] = inner if isinstance(inner, dict) else {}
        into = into[name]
    into[path[-1]] = value
