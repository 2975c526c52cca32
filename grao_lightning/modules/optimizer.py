"""AdamW on float32 master weights, for models whose own weights are bfloat16. Pure: torch only.

A bfloat16 has 8 significant bits: an update below about 1/512 of a weight rounds away, and at a
learning rate of 1e-6 most do. The masters keep what the model's weights cannot show yet.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

#: Parameters whose gradients stand in float32 at the same time.
AT_ONCE = 16


class MasterWeightsAdamW(Optimizer):
    """AdamW whose arithmetic, moments and weights are float32; the model gets the weights rounded.

    Gradients are read from the parameters, where clipping and DDP find them. Learning rate and all
    else are read from ``param_groups``, as schedules set them. The checkpoint is that of an AdamW
    on the masters, which stand beside it: either kind of optimiser loads the other's.

    Costs 16 bytes a parameter with weights and gradients, as float32 training does, where a
    bfloat16 AdamW takes 8.

    Args:
        parameters: Trained are those that require a gradient now.
        **options: Of `torch.optim.AdamW`.
    """

    def __init__(self, parameters: Iterable[Tensor], **options: Any) -> None:
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        self._masters = [_as_master(parameter) for parameter in trained]
        self._adamw = AdamW(self._masters, **options)
        super().__init__(trained, self._adamw.defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the masters by the parameters' gradients and round them into the parameters.

        A parameter without gradient stays as it is, and so does its master.

        Args:
            closure: Called first, with gradients enabled; may change the gradients.

        Returns:
            What the closure returns.
        """
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        self._pass_settings(self, self._adamw)
        pairs = list(zip(self.param_groups[0]["params"], self._masters, strict=True))
        for first in range(0, len(pairs), AT_ONCE):
            part = pairs[first : first + AT_ONCE]
            for parameter, master in part:
                if parameter.grad is not None:
                    master.grad = parameter.grad.to(master.dtype)
            self._adamw.step()  # of those that have a gradient
            for parameter, master in part:
                master.grad = None
                parameter.copy_(master)
        return result

    def state_dict(self) -> dict[str, Any]:
        """Return the state of AdamW, the settings and, as ``master_weights``, the masters."""
        settings = super().state_dict()["param_groups"]
        state = self._adamw.state_dict()["state"]
        return {"state": state, "param_groups": settings, "master_weights": self._masters}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore moments and masters; these become the parameters where an AdamW saved none."""
        self._adamw.load_state_dict(state_dict)
        self._pass_settings(self._adamw, self)
        saved = state_dict.get("master_weights", self.param_groups[0]["params"])
        for master, value in zip(self._masters, saved, strict=True):
            master.copy_(value)

    @staticmethod
    def _pass_settings(source: Optimizer, target: Optimizer) -> None:
        (group,) = source.param_groups
        settings = {name: value for name, value in group.items() if name != "params"}
        target.param_groups[0].update(settings)


def _as_master(parameter: Tensor) -> Tensor:
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return parameter.detach().to(dtype, copy=True)
