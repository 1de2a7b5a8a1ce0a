"""This project's method, `adamix.compress_matrix`; stored is what its file has of a matrix."""

from __future__ import annotations

from torch import Tensor

import adamix
from adamix.errors import BudgetError
from methods.reconstruction import Reconstruction


def preset_adamix(delta: Tensor, gram: Tensor, budget_bits: int) -> Reconstruction | None:
    return _compress("adamix", delta, gram, budget_bits)


def least_error(delta: Tensor, gram: Tensor, budget_bits: int) -> Reconstruction | None:
    """Without what lowers the KL of a whole model at the cost of each matrix's error on the
    calibration's inputs: scales that keep a component's size, and much damping."""
    return _compress("adamix", delta, gram, budget_bits, unbiased=False, damping=0.01)


def preset_paper(delta: Tensor, gram: Tensor, budget_bits: int) -> Reconstruction | None:
    """The paper's choices with this project's quantizer."""
    return _compress("paper", delta, gram, budget_bits)


def _compress(preset: str, delta: Tensor, gram: Tensor, budget_bits: int, **changes: object
              ) -> Reconstruction | None:
    config = adamix.Config.preset(preset, bits_per_weight=budget_bits / delta.numel(), **changes)
    try:
        packed = adamix.compress_matrix(delta, gram, config)
    except BudgetError:
        return None
    return Reconstruction(packed.dequantize(), 8 * packed.nbytes, packed.rank)
