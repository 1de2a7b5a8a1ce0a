"""A layer's experts, as transformers keeps them: one module with parameters `[experts, .., ..]`.

What is known of them is transformers' interface for experts (5.17 to 5.23), which lets its users
replace their forward pass: `forward(hidden_states, top_k_index, top_k_weights)`, parameters
`gate_up_proj` (`up_proj` without a gate) and `down_proj`, their biases, and the flags below.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

DOWN = "down_proj"


def is_experts(module: nn.Module) -> bool:
    """Whether a module's matrices are those of experts, `[experts, out, in]` or, where
    `module.is_transposed`, `[experts, in, out]`."""
    flags = ("has_gate", "has_bias", "is_transposed", "_apply_gate")
    return all(hasattr(module, flag) for flag in flags) and all(
        isinstance(getattr(module, name, None), Tensor) and getattr(module, name).dim() == 3
        for name in expert_parameters(module))


def expert_parameters(module: nn.Module) -> tuple[str, str]:
    """Names of an experts module's parameters, in the order of their use."""
    return ("gate_up_proj" if module.has_gate else "up_proj"), DOWN


def expert_shape(module: nn.Module, parameter: str) -> tuple[int, int]:
    """(out, in) of each expert's matrix."""
    rows, columns = getattr(module, parameter).shape[1:]
    return (columns, rows) if module.is_transposed else (rows, columns)


def project(module: nn.Module, parameter: str, expert: int, x: Tensor) -> Tensor:
    """What an expert makes of x `[tokens, in]` by one of its matrices: `[tokens, out]`."""
    weight = getattr(module, parameter)[expert]
    bias = getattr(module, f"{parameter}_bias")[expert] if module.has_bias else None
    return F.linear(x, weight.T if module.is_transposed else weight, bias)


def activate(module: nn.Module, y: Tensor) -> Tensor:
    """What stands between an expert's matrices."""
    return module._apply_gate(y) if module.has_gate else module.act_fn(y)


def finish(module: nn.Module, y: Tensor) -> Tensor:
    """What stands behind an expert's matrices."""
    return module.post_expert_norm(y) if getattr(module, "has_post_expert_norm", False) else y


class OneByOne:
    """A forward pass of an experts module that runs one expert after the other, all its tokens at
    once, and tells what enters each matrix. On the meta device it only gives back the shape."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.see: list[Callable[[str, int, Tensor], None]] = []  # (parameter, expert, [tokens, in])

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        if hidden_states.is_meta:
            return torch.empty_like(hidden_states)
        module, result = self._module, torch.zeros_like(hidden_states)
        first, second = expert_parameters(module)
        for expert in top_k_index.unique().tolist():
            if not 0 <= expert < getattr(module, first).shape[0]:
                continue  # how transformers marks what other devices compute
            tokens, places = torch.where(top_k_index == expert)
            x = hidden_states[tokens]
            self._tell(first, expert, x)
            x = activate(module, project(module, first, expert, x))
            self._tell(second, expert, x)
            y = finish(module, project(module, second, expert, x))
            y = y * top_k_weights[tokens, places, None]
            result.index_add_(0, tokens, y.to(result.dtype))
        return result

    def _tell(self, parameter: str, expert: int, x: Tensor) -> None:
        for see in self.see:
            see(parameter, expert, x)
