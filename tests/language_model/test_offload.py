"""Activations on the host, with the CPU in the place of a device."""

from contextlib import nullcontext

import torch

from grao_lightning.language_model.offload import activations_on_host
from tests.conftest import tiny_model


def test_activations_that_wait_on_the_host_give_the_same_gradients_and_weights_stay():
    model = tiny_model("Llama").train()
    ids = torch.arange(24).view(2, 12)
    moved = []

    def gradients(context) -> list[torch.Tensor]:
        model.zero_grad()
        with context:
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    hooks = activations_on_host(model, "cpu")
    pack = hooks.pack_hook

    def counted(tensor):
        packed = pack(tensor)
        moved.append((tensor, packed[1]))
        return packed

    hooks.pack_hook = counted
    expected = gradients(nullcontext())
    assert all(map(torch.equal, gradients(hooks), expected))
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    stayed = [own for own, kept in moved if kept.data_ptr() == own.data_ptr()]
    assert stayed and all(own.data_ptr() in weights for own in stayed)
    assert len(moved) > len(stayed)
