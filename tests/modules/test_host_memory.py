"""Free memory of the heap goes back to the system."""

from types import SimpleNamespace

import pytest
import torch

from grao_lightning.modules import host_memory
from grao_lightning.modules.host_memory import give_back_memory


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def used_bytes() -> int:
    return host_memory._glibc().mallinfo2().uordblks


@pytest.mark.skipif(host_memory._glibc() is None, reason="no glibc: nothing is handed back")
def test_what_lies_free_between_tensors_that_live_is_handed_back_where_it_is_the_larger_part():
    used = used_bytes()
    # 64 kB each, 205 MB and more, of the heap
    tensors = [torch.ones(16_000) for _ in range(3200 + 2 * used // 64_000)]
    kept = tensors[::100]  # the heap cannot shrink from its end
    full = resident_bytes()
    assert used_bytes() - used > 190e6, "the heap is told"
    del tensors
    give_back_memory()
    assert full - resident_bytes() > 150e6
    assert all(bool((part == 1).all()) for part in kept)


@pytest.mark.parametrize(("free", "trimmed"), [(2, False), (5, True)])
def test_a_heap_of_which_most_is_in_use_is_left_alone(free, trimmed, monkeypatch):
    calls = []
    library = SimpleNamespace(
        mallinfo2=lambda: SimpleNamespace(fordblks=free, uordblks=3, hblkhd=1),
        malloc_trim=calls.append,
    )
    monkeypatch.setattr(host_memory, "_glibc", lambda: library)
    give_back_memory()
    assert calls == [0] * trimmed
