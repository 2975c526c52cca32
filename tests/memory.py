"""How much memory a piece of work needs, counted by PyTorch's own allocator."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch.profiler import ProfilerActivity, profile


@dataclass
class Peak:
    """Most bytes of CPU tensors that lived at once, beyond those that were there before."""

    extra_bytes: int = 0


@contextmanager
def peak_memory() -> Iterator[Peak]:
    """Measure the body; the figure stands in what this gives once the body has ended.

    Every allocation counts, those inside kernels and backward passes among them. Unlike the
    process's resident memory the figure is the same in every run.
    """
    peak = Peak()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield peak
    results = profiler.profiler.kineto_results
    changes = [event for event in results.events() if event.name() == "[memory]"]
    live = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        live += change.nbytes()
        peak.extra_bytes = max(peak.extra_bytes, live)
