"""AdamW in several precisions: of its moments, of the weights it works on, of how they are rounded.

A bfloat16 has 8 significant bits: an update below about 1/512 of a weight rounds away, and at a
learning rate of 1e-6 most do. Masters keep what the model's weights cannot show yet; stochastic
rounding shows it now and then. Moments of 8 or 4 bits are torchao's (arXiv 2110.02861).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

from grao_lightning.randomness import run_seed

OptimizerName = Literal["adamw", "adamw_8bit", "adamw_4bit"]
OPTIMIZERS: tuple[str, ...] = get_args(OptimizerName)

#: Parameters whose gradients stand in float32 at the same time.
AT_ONCE = 16

_IN_TORCHAO = {"adamw_8bit": "AdamW8bit", "adamw_4bit": "AdamW4bit"}


def optimizer_fault(
    name: str, master_weights: bool, stochastic_rounding: bool, package: str = "torchao"
) -> str | None:
    """Return what is wrong with the choice of an optimiser, None if nothing is.

    Args:
        name: One of `OPTIMIZERS`.
        master_weights: Whether it works on float32 copies of the weights.
        stochastic_rounding: Whether weights are rounded by chance.
        package: That must be there for all but the plain AdamW.
    """
    if master_weights and stochastic_rounding:
        return (
            "model.stochastic_rounding must be false with model.master_weights, which rounds "
            "nothing away; got true with both: remove one of them"
        )
    asked = "model.stochastic_rounding=true" if stochastic_rounding else f"model.optimizer={name}"
    if (name in _IN_TORCHAO or stochastic_rounding) and find_spec(package) is None:
        return (
            f"{asked} needs {package}, which is not installed: pip install "
            "'grao-lightning[low-bit]', or remove the setting"
        )
    return None


def make_optimizer(
    name: str,
    parameters: Sequence[Tensor],
    *,
    master_weights: bool,
    stochastic_rounding: bool,
    fused: bool,
    **options: Any,
) -> Optimizer:
    """Return an optimiser of the parameters that require a gradient.

    Args:
        name: One of `OPTIMIZERS`.
        parameters: Trained are those that require a gradient now.
        master_weights: Whether it works on float32 copies of them.
        stochastic_rounding: Whether bfloat16 weights are rounded by chance.
        fused: Whether a plain AdamW may take one kernel for all.
        **options: Learning rate, weight decay and betas.
    """
    make: Callable[..., Optimizer]
    if name == "adamw" and not stochastic_rounding:
        make = AdamW
        options["fused"] = fused
    else:
        make = low_bit_adamw
        options |= {"name": name, "stochastic_rounding": stochastic_rounding}
    if master_weights:
        return MasterWeights(parameters, make, **options)
    return make(parameters, **options)


def low_bit_adamw(
    parameters: Iterable[Tensor], *, name: str, stochastic_rounding: bool, **options: Any
) -> Optimizer:
    """Return torchao's AdamW, made fit for schedules, for checkpoints and for several ranks.

    Args:
        parameters: To be trained.
        name: One of `OPTIMIZERS`.
        stochastic_rounding: Whether bfloat16 weights are rounded by chance: the same on all ranks
            and in a resumed run, for what is drawn is a function of seed and step.
        **options: Learning rate, weight decay and betas.
    """
    import torchao.optim

    base: Any = getattr(torchao.optim, _IN_TORCHAO.get(name, "_AdamW"))

    class LowBitAdamW(base):
        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            result = None
            if closure is not None:
                with torch.enable_grad():
                    result = closure()
            for group in self.param_groups:  # a number where a schedule or an AdamW left one
                group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32)
            drawn = _drawn_from(self._steps(), parameters) if stochastic_rounding else nullcontext()
            with drawn, _float32_by_default():
                super().step()
            return result

        def state_dict(self) -> dict[str, Any]:
            return _with_states(super().state_dict(), _flattened)

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            super().load_state_dict(_with_states(state_dict, _joined))

        def _steps(self) -> int:
            return int(max((state["step"] for state in self.state.values()), default=0))

    optimizer: Optimizer = LowBitAdamW(
        parameters, bf16_stochastic_round=stochastic_rounding, **options
    )
    return optimizer


def _with_states(state_dict: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    """Return the state of an optimiser with each of its values changed."""
    states = {
        number: {name: change(value) for name, value in state.items()}
        for number, state in state_dict["state"].items()
    }
    return {**state_dict, "state": states}


def _flattened(value: Any) -> Any:
    """Return the plain tensors of a quantised one: torch.load maps no others to a device."""
    if type(value).__name__ not in _quantized():
        return value
    names, context = value.__tensor_flatten__()
    parts = {name: getattr(value, name) for name in names}
    return {"kind": type(value).__name__, "parts": parts, "context": list(context)}


def _joined(value: Any) -> Any:
    """Return the quantised tensor that `_flattened` took apart, and all else as it is."""
    if not isinstance(value, dict):
        return value
    return _quantized()[value["kind"]].__tensor_unflatten__(value["parts"], value["context"])


def _quantized() -> dict[str, Any]:
    from torchao.optim.subclass_4bit import OptimState4bit
    from torchao.optim.subclass_8bit import OptimState8bit

    return {kind.__name__: kind for kind in (OptimState4bit, OptimState8bit)}


@contextmanager
def _drawn_from(step: int, parameters: Iterable[Tensor]) -> Iterator[None]:
    """Make random numbers a function of seed, step and shard; leave all others as they are.

    Ranks that hold the same weights must round them alike; shards of one weight need not.
    """
    shards: tuple[int, ...] = ()
    devices = set()
    for parameter in parameters:
        devices.add(parameter.device)
        if isinstance(parameter, DTensor):
            coordinate = parameter.device_mesh.get_coordinate() or ()
            placed = zip(coordinate, parameter.placements, strict=True)
            shards = tuple(at for at, placement in placed if placement.is_shard())
    cuda = [device for device in devices if device.type == "cuda"]
    with torch.random.fork_rng(cuda):
        torch.manual_seed(hash((run_seed(), step, *shards)) % 2**63)
        yield


@contextmanager
def _float32_by_default() -> Iterator[None]:
    """Make new tensors float32: torchao's step counts and scales would lose their digits.

    Under trainer.precision=bf16-true Lightning makes bfloat16 the default.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class MasterWeights(Optimizer):
    """An optimiser whose arithmetic and weights are float32; the model gets the weights rounded.

    Gradients are read from the parameters, where clipping and DDP find them. Learning rate and all
    else are read from ``param_groups``, as schedules set them. The checkpoint is that of an
    optimiser on the masters, which stand beside it: either kind loads the other's.

    Costs 16 bytes a parameter with AdamW, weights and gradients, as float32 training does, where a
    bfloat16 AdamW takes 8.

    Args:
        parameters: Trained are those that require a gradient now.
        make: Optimiser of the masters, with one group.
        **options: Of ``make``.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        make: Callable[..., Optimizer] = AdamW,
        **options: Any,
    ) -> None:
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        self._masters = [_as_master(parameter) for parameter in trained]
        self._inner = make(self._masters, **options)
        super().__init__(trained, self._inner.defaults)

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
        self._pass_settings(self, self._inner)
        pairs = [
            (parameter, master)
            for parameter, master in zip(self.param_groups[0]["params"], self._masters, strict=True)
            if parameter.grad is not None
        ]
        for first in range(0, len(pairs), AT_ONCE):
            self._step_part(pairs[first : first + AT_ONCE])
        return result

    def _step_part(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Take the step of some parameters; the inner optimiser knows no others meanwhile."""
        group = self._inner.param_groups[0]
        for parameter, master in pairs:
            assert parameter.grad is not None
            master.grad = parameter.grad.to(master.dtype)
        group["params"] = [master for _, master in pairs]
        try:
            self._inner.step()
        finally:
            group["params"] = self._masters
        for parameter, master in pairs:
            master.grad = None
            parameter.copy_(master)

    def state_dict(self) -> dict[str, Any]:
        """Return the inner state, the settings and, as ``master_weights``, the masters."""
        settings = super().state_dict()["param_groups"]
        state = self._inner.state_dict()["state"]
        return {"state": state, "param_groups": settings, "master_weights": self._masters}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore moments and masters; these become the parameters where none were saved."""
        self._inner.load_state_dict(state_dict)
        self._masters = self._inner.param_groups[0]["params"]
        self._pass_settings(self._inner, self)
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
