"""Free memory of the heap goes back to the system."""

import pytest
import torch

from grao_lightning.modules.host_memory import _malloc_trim, give_back_memory


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.skipif(_malloc_trim() is None, reason="no glibc: nothing is handed back")
def test_what_lies_free_between_tensors_that_live_is_handed_back():
    tensors = [torch.ones(16_000) for _ in range(3200)]  # 64 kB each, 205 MB, of the heap
    kept = tensors[::100]  # the heap cannot shrink from its end
    full = resident_bytes()
    del tensors
    give_back_memory()
    assert full - resident_bytes() > 150e6
    assert all(bool((part == 1).all()) for part in kept)
