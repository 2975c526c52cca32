"""Models whose weights are dealt out over several ranks (FSDP2), and the way to them.

Outside its forward hooks such a model shows its rank's part of each weight. All ranks gather the
weights of a layer together, so they must make the same passes in the same order: see
`passes_over_ranks`.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import nn

from grao_lightning.faults import UserError

Found = TypeVar("Found")


@dataclass(frozen=True)
class Sharding:
    """How the weights of a model are dealt out.

    Attributes:
        ranks: Over which one copy is dealt out.
        replicas: Number of copies, each on as many ranks.
        dtype: Of the parts, as they are kept and trained.
        lowered: Whether weights are gathered, and computed with, in bfloat16.
        cpu_offload: Whether parts wait in the host's memory.
    """

    ranks: int
    replicas: int = 1
    dtype: torch.dtype = torch.float32
    lowered: bool = False
    cpu_offload: bool = False

    def options(self) -> dict[str, Any]:
        """Return what makes ``from_pretrained`` read this rank's parts alone."""
        from transformers.distributed import DistributedConfig

        config = DistributedConfig(
            fsdp_size=self.ranks,
            dp_replicate_size=self.replicas,
            fsdp_cpu_offload=self.cpu_offload,
            fsdp_mixed_precision=self.lowered,
        )
        return {"dtype": self.dtype, "distributed_config": config}

    def policies(self) -> dict[str, Any]:
        """Return what ``fully_shard`` is told, as transformers tells it."""
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

        options: dict[str, Any] = {}
        if self.lowered:
            options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        if self.cpu_offload:
            options["offload_policy"] = CPUOffloadPolicy()
        return options


def sharding_fault() -> str | None:
    """Return that the libraries at hand are too old to shard a model."""
    from torch.distributed import fsdp

    if not hasattr(getattr(fsdp, "FSDPModule", None), "reset_iter_state"):
        return f"torch {torch.__version__} cannot put a sharded model back; install torch>=2.13"
    try:
        from transformers.distributed import DistributedConfig

        DistributedConfig(fsdp_size=1, dp_replicate_size=1)
    except (ImportError, TypeError):
        import transformers

        return f"transformers {transformers.__version__} loads no parts; install transformers>=5.24"
    return None


class Shards:
    """Enters a sharded model, and gathers it.

    Args:
        root: A model of transformers that ``fully_shard`` was applied to.
        sharding: How.
    """

    def __init__(self, root: Any, sharding: Sharding) -> None:
        from torch.distributed.fsdp import register_fsdp_forward_method

        def grao_inside(model: Any, function: Callable[[], Any]) -> Any:
            return function()

        root.grao_inside = MethodType(grao_inside, root)
        register_fsdp_forward_method(root, "grao_inside")
        self._root = root
        self._entered = False
        self.sharding = sharding
        self.mesh = next(root.parameters()).device_mesh
        self.device = torch.device(self.mesh.device_type)

    def inside(self, function: Callable[[], Found]) -> Found:
        """Return what a function gives within the model's forward hooks; a nested one runs as is.

        Without gradients every weight is freed again at the end.
        """
        if self._entered:
            return function()
        # Memory for gathered weights is made once, and may not be of the kind that no backward
        # pass can use.
        inference = torch.is_inference_mode_enabled()
        grad = torch.is_grad_enabled() and not inference
        self._entered = True
        own = torch.inference_mode(False) if inference else nullcontext()
        try:
            with own, torch.set_grad_enabled(grad):
                found: Found = self._root.grao_inside(function)
        finally:
            self._entered = False
        if not grad:
            self.free()
        return found

    def gathered(self, function: Callable[[], Found]) -> Found:
        """Return what a function gives while every rank holds all weights; without gradients.

        Within it ranks may make passes of their own.
        """
        parts = [part for part in self._root.modules() if is_sharded_part(part)]
        groups = [group for part in parts for group in part._get_fsdp_state()._fsdp_param_groups]
        kept = [group.post_forward_mesh_info for group in groups]

        def hold() -> Found:
            for part in parts:
                part.set_reshard_after_forward(False, recurse=False)
                part.unshard()
            return function()

        try:
            with torch.no_grad():
                return self.inside(hold)
        finally:
            # `set_reshard_after_forward` sets it too, but nothing public says what it was.
            for group, info in zip(groups, kept, strict=True):
                group.post_forward_mesh_info = info

    def free(self) -> None:
        """Free all gathered weights, so that parameters are this rank's parts again."""
        self._root.reset_iter_state()

    def shard_within(self, parts: list[nn.Module]) -> None:
        """Deal out modules that were put into the model as one group, before its first pass."""
        from torch.distributed.fsdp import fully_shard

        fully_shard(parts, mesh=self.mesh, reshard_after_forward=False, **self.sharding.policies())

    def shard_beside(self, part: nn.Module) -> None:
        """Deal out a module that is trained beside the model, over the same ranks."""
        from torch.distributed.fsdp import fully_shard

        fully_shard(part, mesh=self.mesh, **self.sharding.policies())
        _keep_in_place(part)


def own_shards(model: Any, sharding: Sharding) -> Any:
    """Return a model that was loaded with `Sharding.options`, ready to be entered.

    With a single rank transformers shards nothing; the model is then made one part, so that
    checkpoints are those of several ranks.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if not isinstance(model, FSDPModule):
        assert sharding.ranks * sharding.replicas == 1, "transformers has not sharded the model"
        mesh = init_device_mesh(accelerator_type(), (1,))
        fully_shard(model, mesh=mesh, **sharding.policies())
    whole = [name for name, value in model.named_parameters() if not hasattr(value, "device_mesh")]
    if whole:
        raise UserError(
            f"trainer.strategy=fsdp2: {whole[0]} of {type(model).__name__} stays whole on every "
            "rank, and its gradient would not be exchanged: use ddp"
        )
    model.grao_shards = Shards(model, sharding)
    _keep_in_place(model)
    return model


def accelerator_type() -> str:
    """Return the kind of device that transformers deals out to: the machine's own, else CPUs."""
    found = torch.accelerator.current_accelerator()
    return "cpu" if found is None else found.type


def draw_whole(model: Any, names: Sequence[str]) -> None:
    """Start weights that no source has as a whole model's start, drawn alike on every rank.

    Drawn part by part, each rank's would be the same rows.

    Args:
        model: Sharded.
        names: Of its parameters, such as a new head's.
    """
    from torch.distributed.tensor import distribute_tensor

    spread = getattr(model.config.get_text_config(), "initializer_range", 0.02)
    for name in names:
        parameter: Any = model.get_parameter(name)
        whole = torch.zeros(parameter.shape, dtype=torch.float32)
        if whole.dim() > 1:  # biases start at 0
            whole.normal_(std=spread)
        whole = whole.to(parameter.device, parameter.dtype)
        mesh, placements = parameter.device_mesh, parameter.placements
        own = distribute_tensor(whole, mesh, placements, src_data_rank=None)
        with torch.no_grad():
            parameter.to_local().copy_(own.to_local())


def shards_of(model: Any) -> Shards | None:
    """Return the shards of a model, of a wrapper around one too; None where weights are whole."""
    return getattr(model, "grao_shards", None)


def device_of(model: Any) -> torch.device:
    """Return where a model computes, wherever its weights are kept."""
    shards = shards_of(model)
    found: torch.device = next(model.parameters()).device if shards is None else shards.device
    return found


def passes_over_ranks(model: Any, *counts: int) -> list[int]:
    """Return the most of each count over all ranks that share a model's weights.

    Asked before the first of the passes that are counted: a rank that has begun gathers weights,
    and would wait for others that do not.

    Args:
        model: A Hugging Face model; where its weights are whole, the counts come back as they are.
        counts: Of this rank.
    """
    shards = shards_of(model)
    if shards is None:
        return list(counts)
    most = torch.tensor(counts, device=shards.device)
    torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
    found: list[int] = most.tolist()
    return found


def is_sharded_part(module: Any) -> bool:
    """Return whether a module's weights are dealt out over ranks, as a group of their own."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def _keep_in_place(module: Any) -> None:
    """Let a module be neither moved nor cast by what holds it.

    It is where it computes and in the precision of the run; its hooks have noted both.
    """
    module._apply = lambda fn, recurse=True: module
