"""Makes a program on the ``meta`` device fail where a GPU would have to wait for the host."""

from contextlib import ExitStack, contextmanager, nullcontext
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
_MAKES = (torch.tensor, torch.as_tensor)
_INDEXES = (Tensor.__getitem__, Tensor.__setitem__)


class HostRead(AssertionError):
    """A device waits for the host, or the host for it."""


class _NoMixing(TorchDispatchMode):
    """Refuses host tensors in the work of a device, and copies that are waited for.

    Numbers of no dimension may mix: they travel with the kernel's arguments.
    """

    supports_higher_order_operators = True  # such as flex_attention, uncompiled

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        devices = {part.device.type for part in tensors}
        if func in _COPIES:
            devices |= {torch.device(kwargs["device"]).type} if kwargs.get("device") else set()
            waited_for = devices == {"cpu", "meta"} and not _is_non_blocking(func, args, kwargs)
            if waited_for:
                raise HostRead(f"{func}: a copy to the device that is waited for")
        elif "meta" in devices and any(
            part.device.type == "cpu" and part.dim() > 0 for part in tensors
        ):
            raise HostRead(f"{func}: a tensor of the host among those of the device")
        return func(*args, **kwargs)


def _is_non_blocking(func, args, kwargs) -> bool:
    return bool(kwargs.get("non_blocking") or (func is _COPIES[1] and len(args) > 2 and args[2]))


def _parts(index):
    return index if isinstance(index, tuple) else (index,)


def _is_list(part) -> bool:
    return isinstance(part, list)


class _NoLists(TorchFunctionMode):
    """Refuses to make a tensor of the device from numbers of the host, which is waited for."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        of_host = not isinstance(args[0] if args else None, Tensor)
        if (
            func in _MAKES
            and of_host
            and torch.device(kwargs.get("device") or "cpu").type == "meta"
        ):
            raise HostRead("torch.tensor: numbers of the host are copied and waited for")
        if func in _INDEXES and args[0].is_meta and any(map(_is_list, _parts(args[1]))):
            raise HostRead("an index by a list: its numbers are copied and waited for")
        return func(*args, **kwargs)


@contextmanager
def no_host_reads():
    """Fail where a tensor on ``meta`` is read, or its work waits for a copy from the host.

    ``.item()``, ``.tolist()``, boolean indices and shapes that depend on values raise there by
    themselves, since nothing has a value.
    """
    enabled, autocast = torch.is_autocast_enabled, torch.autocast

    def is_enabled(device: str = "cpu") -> bool:  # autocast does not know the device
        return device != "meta" and enabled(device)

    def cast(device: str, *args, **options):
        return nullcontext() if device == "meta" else autocast(device, *args, **options)

    with ExitStack() as stack:
        stack.enter_context(patch.object(torch, "is_autocast_enabled", is_enabled))
        stack.enter_context(patch.object(torch, "autocast", cast))
        stack.enter_context(_NoLists())
        stack.enter_context(_NoMixing())
        yield
