"""What ``model.lora`` makes of a module: what is trained, what its checkpoints hold."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from grao_lightning.faults import Faults, UserError
from grao_lightning.language_model.adapter_folders import is_adapter
from grao_lightning.language_model.adapters import (
    Adapters,
    base_fingerprint,
    new_adapters,
    saved_adapters,
)
from grao_lightning.language_model.loading import ModelSource, base_of, source_name
from grao_lightning.language_model.lora import SLOW, LoRA, quantization


class AdaptedModule(LightningModule):
    """Trains adapters in the place of the model's own weights where ``lora`` is set."""

    #: The setting that names the trained model's source.
    source_setting = "model.policy"
    lora: LoRA | None = None
    #: Once the model is loaded.
    adapters: Adapters | None = None
    _base_fingerprint = ""

    @property
    def trained_source(self) -> ModelSource:
        """Return where the trained model comes from, or the model that was handed over."""
        raise NotImplementedError

    @property
    def base_source(self) -> ModelSource:
        """Return where the weights come from that adapters go with, else as `trained_source`."""
        source = self.trained_source
        if not isinstance(source, str):
            return source
        return base_of(self.source_setting, source, self.lora and self.lora.base)

    @property
    def drops_out(self) -> bool:
        """Return whether our settings ask for dropout in training."""
        return self.lora is not None and self.lora.dropout > 0

    def adapter_faults(self) -> Faults:
        """Return what is wrong with ``lora`` and with what it is to work on."""
        faults = Faults()
        if self.lora is None:
            return faults
        source, setting = self.trained_source, self.source_setting
        faults.add(*self.lora.faults("model.lora"))
        if self.lora.base is not None and not is_adapter(source):
            faults.add(
                f"model.lora.base has no effect unless {setting} is an adapter folder; got "
                f"{self.lora.base}: remove it"
            )
        if hasattr(source, "peft_config"):
            faults.add(
                f"model.lora must be null with a {setting} that has adapters already; got both: "
                "hand over the model without, or remove model.lora"
            )
        if self.lora.quantize and not (isinstance(source, str) and not source.endswith(".gguf")):
            faults.add(
                f"model.lora.quantize needs a {setting} that is read from a name or folder, and "
                f"quantized as it is read; got {source_name(source)}: name its folder, or remove "
                "model.lora.quantize"
            )
        return faults

    def tell_learning_rate(self, learning_rate: float) -> None:
        """Warn of a learning rate at which an adapter stays where it is."""
        if self.lora is not None and 0 < learning_rate <= SLOW:
            rank_zero_warn(
                f"model.learning_rate={learning_rate:g} suits training of a whole model and hardly "
                "moves an adapter; with model.lora 1e-4 to 1e-3 is usual"
            )

    def quantization(self) -> dict[str, Any]:
        """Return the options with which a model is loaded whose weights take few bits."""
        if self.lora is None or self.lora.quantize is None:
            return {}
        strategy = getattr(self._trainer, "strategy", None)
        device = torch.device("cpu") if strategy is None else strategy.root_device
        precision = "" if self._trainer is None else str(self._trainer.precision)
        return quantization(self.lora.quantize, device, lowered=precision.startswith("bf16"))

    def adapt(self, model: Any, made_up: Sequence[str] | None = None) -> None:
        """Put adapters into the loaded model where ``lora`` asks for them.

        Args:
            model: As `base_source` has it.
            made_up: Names of a classifier's weights that its source does not have; None: it is a
                language model.
        """
        if self.lora is None:
            return
        self._base_fingerprint = base_fingerprint(model, self.lora.quantize, made_up or ())
        source, keeps_start = self.trained_source, made_up is None
        if isinstance(source, str) and is_adapter(source):
            self.adapters = saved_adapters(
                "model.lora", model, source, self.lora, start=keeps_start
            )
        else:
            self.adapters = new_adapters("model.lora", model, self.lora, made_up=made_up)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move and cast all; adapters stay float32 or wider on a model of less."""
        own = set() if self.adapters is None else set(map(id, self.adapters.parameters()))

        def applied(tensor: Tensor) -> Tensor:
            found: Tensor = fn(tensor)
            wide = torch.promote_types(found.dtype, torch.float32)
            return tensor.to(found.device, wide) if id(tensor) in own else found

        return super()._apply(applied if own else fn, recurse)

    # -- checkpoints -------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **options: Any) -> Any:
        """Return the weights; of a model with adapters these alone, and what else is trained."""
        state: dict[str, Any] = super().state_dict(*args, **options)
        if self.adapters is None:
            return state
        trained, prefix = self._trained_names(), options.get("prefix", "")
        return {name: state[name] for name in state if name.removeprefix(prefix) in trained}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load weights as `state_dict` has them."""
        if self.adapters is not None and strict:
            strange = sorted(self._trained_names() ^ set(state_dict))
            if strange:
                raise UserError(
                    "ckpt_path: the checkpoint must hold what is trained with model.lora and "
                    f"nothing else; got another {strange[0]}: set model.lora as it was trained"
                )
            strict = False
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def told_of_adapters(self) -> dict[str, Any] | None:
        """Return what a checkpoint keeps besides the adapters' weights; None: it has none."""
        if self.adapters is None or self.lora is None:
            return None
        return {
            "config": self.adapters.config,
            "base": self._base_fingerprint,
            "source": source_name(self.base_source),
            "quantize": self.lora.quantize,
            "dtype": str(self.adapters.dtype).removeprefix("torch."),
        }

    def check_adapters(self, saved: dict[str, Any] | None) -> None:
        """Compare a checkpoint's adapters with those of this run.

        Args:
            saved: `told_of_adapters` of the run that wrote it.

        Raises:
            UserError: Its weights are not for these adapters, or for another model's.
        """
        if self.adapters is None and saved is None:
            return
        if self.adapters is None:
            raise UserError(
                "ckpt_path: the checkpoint holds adapters alone: set model.lora as it was trained"
            )
        if saved is None:
            raise UserError(
                "ckpt_path: the checkpoint holds no adapters: remove model.lora, or begin a run "
                "from the folder that grao export makes of it"
            )
        fault = self.adapters.difference(saved["config"])
        if fault:
            raise UserError(fault)
        if saved["base"] != self._base_fingerprint:
            raise UserError(
                f"{self.source_setting} must be the model that the checkpoint's adapters were "
                f"trained on, {saved['source']} as it was then; got other weights from "
                f"{source_name(self.base_source)}: name that model"
            )

    def _trained_names(self) -> set[str]:
        return {name for name, parameter in self.named_parameters() if parameter.requires_grad}
