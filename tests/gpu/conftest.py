"""Where the suite runs: on CUDA, or as a rehearsal of its code on the CPU."""

import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def device() -> torch.device:
    """Return the device: CUDA, or what ``GRAO_TEST_DEVICE`` names (``cpu`` rehearses the suite)."""
    name = os.environ.get("GRAO_TEST_DEVICE", "cuda")
    if name.startswith("cuda") and not torch.cuda.is_available():
        pytest.skip("no CUDA device at hand; GRAO_TEST_DEVICE=cpu rehearses the suite without one")
    return torch.device(name)


@pytest.fixture
def plain_products() -> Iterator[None]:
    """Keep float32 products in float32, whatever the card would do (TF32)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)
