"""Modules whose parameters are on the meta device but for as long as they are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn


def own_tensors(module: nn.Module, *, recurse: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers by name, as a checkpoint holds them."""
    owners = module.named_modules() if recurse else [("", module)]
    for prefix, owner in owners:
        tensors = owner._parameters | {name: buffer for name, buffer in owner._buffers.items()
                                       if name not in owner._non_persistent_buffers_set}
        for name, tensor in tensors.items():
            if tensor is not None:
                yield f"{prefix}.{name}".lstrip("."), tensor


def put(module: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, last = name.rpartition(".")
    owner = module.get_submodule(path)
    if last in owner._parameters:
        owner._parameters[last] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[last] = tensor


def fill(module: nn.Module, read: Callable[[str], Tensor], device: torch.device,
         dtype: torch.dtype, *, recurse: bool = True) -> None:
    """Give a module its tensors, read by their names in it; those of floats in the dtype."""
    for name, _ in list(own_tensors(module, recurse=recurse)):
        tensor = read(name)
        kept = dtype if tensor.is_floating_point() else tensor.dtype
        put(module, name, tensor.to(device, kept, copy=not kept.is_floating_point))


def empty(module: nn.Module, *, recurse: bool = True) -> None:
    """Back to the meta device with the parameters; buffers are small."""
    for owner in module.modules() if recurse else [module]:
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                owner._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)


def move_buffers(model: nn.Module, device: torch.device) -> None:
    """Those that have values, rotary frequencies say."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[name] = buffer.to(device)
