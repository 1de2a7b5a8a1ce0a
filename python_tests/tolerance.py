"""Tolerances that are derived from rounding, not tuned."""

import torch
from torch import Tensor

FP32_ROUNDOFF = 2.0**-24


def assert_within_rounding(got: Tensor, exact: Tensor, magnitude: Tensor, terms: int) -> None:
    """|got - exact| <= fp32 summation error over `terms` + one rounding to got's dtype.

    `exact` is float64, `magnitude` the same expression with every product by its absolute value, so
    that cancellation can neither hide nor fake an error. The rounding is eps of the result, or of
    the smallest normal number where the result is below it.
    """
    assert got.shape == exact.shape, f"shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    if got.numel() == 0:
        return
    kind = torch.finfo(got.dtype)
    bound = terms * FP32_ROUNDOFF * magnitude + kind.eps * exact.abs().clamp(min=kind.tiny)
    worst = ((got.double() - exact).abs() / bound).max().item()
    assert worst <= 1, f"{worst:.2f}x the rounding bound"  # a NaN fails too
