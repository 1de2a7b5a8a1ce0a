"""What delta_gemm is measured against: each on its best path, on the same case, in the same run.

A rival is a function of a case that returns the work to time. It adds to y in place where the
method adds a delta to a base's output, as delta_gemm does.
"""

from __future__ import annotations

from collections.abc import Callable

from banks import Case
from harness import Work

from rivals.dense import base_gemm, low_rank, naive
from rivals.unpacked import unpacked


def sign_kernel(case: Case) -> Work:
    """rivals/bitdelta.py, imported when it is needed: Triton is not everywhere."""
    from rivals.bitdelta import sign_work

    return sign_work(case)


RIVALS: dict[str, Callable[[Case], Work]] = {
    "full weights": naive,
    "low rank": low_rank,
    "base GEMM": base_gemm,
    "PyTorch unpack": unpacked,
    "one-bit Triton": sign_kernel,
}
