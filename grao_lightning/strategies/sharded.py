"""``--trainer.strategy fsdp2``: every device keeps a part of weights, gradients and optimiser."""

import uuid
from collections.abc import Generator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch.distributed.checkpoint.api import CheckpointException

from grao_lightning.faults import Faults, UserError
from grao_lightning.files import put_in_place, remove, to_disk, unfinished_beside
from grao_lightning.language_model.checkpoints import REST, checkpoint_fault
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


_SOON = timedelta(seconds=30)


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
        self._store: Any = None

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
        if self.world_size > 1:
            # No collective operation, which a rank alone could not even be freed from.
            store = torch.distributed.distributed_c10d._get_default_store()
            name = self.broadcast(uuid.uuid4().hex)
            self._store = torch.distributed.PrefixStore(name, store)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None
    ) -> None:
        """Write a folder beside its place, and move it there once all ranks have written.

        A run that is killed meanwhile keeps the checkpoint before. The folder must lie where all
        nodes write.

        Raises:
            UserError: A rank cannot write its part.
        """
        path = Path(self.broadcast(filepath))
        unfinished = unfinished_beside(path)
        if self.is_global_zero:
            remove(unfinished)
        self.barrier()
        try:
            super().save_checkpoint(checkpoint, unfinished, storage_options)
        except CheckpointException as error:  # which is no Exception
            if self.is_global_zero:
                remove(unfinished)
            reason = str(next(iter(error.failures.values()))[0])
            raise UserError(f"{path} cannot be written: {reason}") from error
        self.barrier()
        if self.is_global_zero:
            to_disk(unfinished / REST)
            put_in_place(unfinished, path)

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load weights and, in training, optimiser states; return the rest of a checkpoint.

        Args:
            checkpoint_path: A folder that any number of ranks wrote, or the file of another
                strategy.
            weights_only: Whether the rest may hold plain values alone.

        Raises:
            UserError: It is no whole checkpoint, or none to go on from.
        """
        path = Path(self.broadcast(checkpoint_path))
        assert self.lightning_module is not None
        goes_on = self.lightning_module.trainer.state.fn == "fit"
        fault = checkpoint_fault("ckpt_path", str(path), goes_on=goes_on)
        if fault:
            raise UserError(fault)
        if goes_on:
            return super().load_checkpoint(path, weights_only)
        left, self.optimizers = self.optimizers, []  # of a fit before: their states stay
        try:
            return super().load_checkpoint(path, weights_only)
        finally:
            self.optimizers = left

    def is_joined(self, step: int) -> bool:
        """Return whether all ranks ask this soon, after the same step; once a run.

        For a rank that has failed: to save, all must meet, and others may be at work still.

        Args:
            step: That this rank has taken last.
        """
        if self._store is None:
            return True
        ranks = [f"rank {rank}" for rank in range(self.world_size)]
        try:
            self._store.set(ranks[self.global_rank], str(step))
            try:
                self._store.wait(ranks, _SOON)
                joined = len({self._store.get(rank) for rank in ranks}) == 1
            except RuntimeError:
                joined = False
            # The first to decide decides for all.
            return bool(self._store.compare_set("joined", "", str(joined)) == b"True")
        except RuntimeError:  # the store went with the rank that held it
            return False

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
