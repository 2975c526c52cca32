"""What is sent to a device arrives as it was, in one copy."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from grao_lightning.language_model.transfer import sent


class Copies(TorchDispatchMode):
    """Counts copies between devices; on the way, everything stays on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if kwargs.get("device") == torch.device("meta"):
            self.number += 1
            assert kwargs["non_blocking"]
            kwargs = {**kwargs, "device": torch.device("cpu")}
        return func(*args, **kwargs)


def test_tensors_of_any_shape_arrive_as_they_were_in_one_copy_at_even_places():
    parts = [torch.arange(5), torch.zeros(2, 3).long() + 7, torch.empty(0).long(), torch.tensor(9)]
    with Copies() as copies:
        found = sent(torch.device("meta"), *parts)
    assert copies.number == 1
    for own, part in zip(found, parts, strict=True):
        assert own.shape == part.shape and torch.equal(own, part)
        assert own.storage_offset() * own.element_size() % 16 == 0


def test_on_the_host_nothing_is_copied():
    part = torch.arange(5)
    assert sent(torch.device("cpu"), part)[0] is part
