"""``--trainer.strategy fsdp2``: every device keeps a part of weights, gradients and optimiser."""

from collections.abc import Generator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry

from grao_lightning.faults import Faults
from grao_lightning.language_model.sharded import (
    Sharding,
    accelerator_type,
    is_sharded_part,
    sharding_fault,
)

NAME = "fsdp2"
_DTYPES = {
    "32-true": torch.float32,
    "64-true": torch.float64,
    "bf16-true": torch.bfloat16,
    "bf16-mixed": torch.float32,
}


class ShardedStrategy(ModelParallelStrategy):
    """Deals out the models' weights over the devices (PyTorch's FSDP2).

    Every device reads its part of a model alone, gathers the weights of a layer while it computes
    with them, and steps on its part. The policy must come from a name, folder or file. Checkpoints
    are folders, to which each device writes its part.

    Args:
        replicas: Copies of the whole, each dealt out over the devices of one (HSDP). Gradients
            alone then travel between copies: for several nodes as many as there are nodes.
        cpu_offload: Keep the parts in the host's memory, optimiser steps included: slower, and
            for models that do not fit otherwise. Of no effect where the devices are CPUs.
        process_group_backend: As Lightning's; null = that of the devices.
        timeout: Of a collective operation.
    """

    #: Ranks gather weights together, so that each must have as many batches as the others.
    keeps_step = True

    def __init__(
        self,
        replicas: int = 1,
        cpu_offload: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(process_group_backend=process_group_backend, timeout=timeout)
        self.replicas = replicas
        self.cpu_offload = cpu_offload

    @property
    def sharding(self) -> Sharding:
        """Return how models are to be dealt out in this run's precision."""
        precision = self.precision_plugin.precision
        return Sharding(
            ranks=self.world_size // self.replicas,
            replicas=self.replicas,
            dtype=_DTYPES.get(precision, torch.float32),
            lowered=precision == "bf16-mixed",
            cpu_offload=self.cpu_offload and self.root_device.type != "cpu",
        )

    def faults(self) -> Faults:
        """Return what is wrong with the settings, the precision and the libraries at hand."""
        faults = Faults()
        old = sharding_fault()
        if old:
            faults.add(f"trainer.strategy={NAME}: {old}, or use ddp")
        elif self.root_device.type != accelerator_type():
            faults.add(
                f"trainer.accelerator must be this machine's own with trainer.strategy={NAME}; got "
                f"{self.root_device.type} where there is {accelerator_type()}: hide the devices "
                "(CUDA_VISIBLE_DEVICES=), or use ddp"
            )
        if self.replicas < 1 or self.world_size % self.replicas:
            faults.add(
                f"trainer.strategy.replicas must divide the {self.world_size} devices; got "
                f"{self.replicas}"
            )
        if self.precision_plugin.precision not in _DTYPES:
            faults.add(
                f"trainer.precision must be one of {', '.join(_DTYPES)} with trainer.strategy="
                f"{NAME}; got {self.precision_plugin.precision}: bf16-mixed keeps float32 weights "
                "and computes in bfloat16"
            )
        return faults

    def setup_environment(self) -> None:
        """Let all devices share the batch; none is left to split tensors."""
        self._tensor_parallel_size = 1
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    @contextmanager
    def block_backward_sync(self) -> Generator:
        """Exchange gradients between copies of the whole after the last micro-batch only.

        Within a copy each micro-batch's are exchanged: gradients of whole weights would have to be
        kept otherwise.
        """
        assert self.model is not None
        parts: list[Any] = [part for part in self.model.modules() if is_sharded_part(part)]
        if self.replicas > 1:
            for part in parts:
                part.set_requires_all_reduce(False, recurse=False)
        try:
            yield
        finally:
            if self.replicas > 1:
                for part in parts:
                    part.set_requires_all_reduce(True, recurse=False)


def sharding_of(trainer: Any) -> Sharding | None:
    """Return how a trainer's strategy deals out models, None where every rank holds them whole."""
    strategy = getattr(trainer, "strategy", None)
    return strategy.sharding if isinstance(strategy, ShardedStrategy) else None


if NAME not in StrategyRegistry:
    StrategyRegistry.register(NAME, ShardedStrategy, description="FSDP2: every device keeps a part")
