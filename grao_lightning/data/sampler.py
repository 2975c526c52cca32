"""Which prompts a step sees: a pure function of (seed, step), so that a resume is exact."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


def even_batches(num_rows: int, batch_size: int, *, rank: int, world_size: int) -> list[list[int]]:
    """Return one rank's batches of the rows 0, 1, ..., as many as every other rank has.

    >>> [even_batches(5, 2, rank=rank, world_size=2) for rank in (0, 1)]
    [[[0, 2], [4]], [[1], [3]]]

    Args:
        num_rows: Rows of all ranks, at least one for each.
        batch_size: Most rows of a batch; one more where a rank could not fill as many batches.
        rank: This process.
        world_size: Number of processes.
    """
    assert num_rows >= world_size
    least, most = num_rows // world_size, -(-num_rows // world_size)
    number = min(least, -(-most // batch_size))
    return [part.tolist() for part in np.array_split(range(num_rows)[rank::world_size], number)]


class StepBatchSampler(Sampler[list[int]]):
    """Endless batches of one rank, addressed by step: the data set is shuffled anew every pass.

    All ranks cut their share out of the same global batch, so that the prompts of a step do not
    depend on the number of devices.

    Args:
        num_rows: Rows of the data set.
        prompts_per_step: Size of the global batch.
        seed: Of the run.
        first_step: Step of the first batch; the global step on resume.
        rank: This process.
        world_size: Number of processes; must divide ``prompts_per_step``.
    """

    def __init__(
        self,
        num_rows: int,
        prompts_per_step: int,
        *,
        seed: int,
        first_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        assert num_rows > 0 and prompts_per_step % world_size == 0
        self._num_rows = num_rows
        self._prompts_per_step = prompts_per_step
        self._seed = seed
        self._first_step = first_step
        self._rank = rank
        self._world_size = world_size

    def __iter__(self) -> Iterator[list[int]]:
        step = self._first_step
        while True:
            yield self.batch(step)[self._rank :: self._world_size]
            step += 1

    def batch(self, step: int) -> list[int]:
        """Return the rows of the global batch of a step."""
        first = step * self._prompts_per_step
        positions = range(first, first + self._prompts_per_step)
        passes = {position // self._num_rows for position in positions}
        orders = {
            number: np.random.default_rng([self._seed, number]).permutation(self._num_rows)
            for number in passes
        }
        return [int(orders[at // self._num_rows][at % self._num_rows]) for at in positions]
