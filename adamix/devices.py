"""Where a compression computes, and what it may take of a GPU's memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from adamix.calibration.sums import ALONE
from adamix.compression.matrix import component_bits
from adamix.config import Config
from adamix.errors import DeviceError
from adamix.memory import MemoryPlan, Sizes

JOBS = 4  # groups of matrices at a time on a GPU: some wait for solvers, others keep it busy
DEVICE_BYTES = 20e9  # of a GPU's memory that are used where there is more: enough to keep it busy
SHARE = 0.9  # of its free memory at most


@dataclass(frozen=True)
class Compute:
    """The CPU, whose forward passes are fp32, or a GPU, where they are of 16 bits if the model's
    weights are; the matrices' own sums are fp64 on both."""

    device: torch.device
    dtype: torch.dtype  # of the calibration's forward passes

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def label(self) -> str:
        """What the bytes depend on: not which CPU, but which GPU."""
        return torch.cuda.get_device_name(self.device) if self.is_cuda else "cpu"


CPU = Compute(torch.device("cpu"), torch.float32)


def find_compute(device: str | torch.device | None, dtypes: Iterable[torch.dtype]) -> Compute:
    """The device that a user asked for, or a GPU where there is one.

    Args:
        device: "cpu", "cuda", "cuda:1" ..; None for the current GPU, or the CPU where none is.
        dtypes: of the model's tensors.

    Raises:
        DeviceError: there is no such device, or nothing here runs on it.
    """
    has_kernels = torch._C._dispatch_has_kernel_for_dispatch_key("adamix::gptq", "CUDA")
    if device is None:
        device = "cuda" if torch.cuda.is_available() and has_kernels else "cpu"
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise DeviceError(f"expected a device like cpu or cuda:0, got {device!r}") from error
    if found.type == "cpu":
        return CPU
    if found.type != "cuda" or not torch.cuda.is_available() or (
            (found.index or 0) >= torch.cuda.device_count()):
        raise DeviceError(f"there is no device {device}: {torch.cuda.device_count()} CUDA devices "
                          f"are here")
    if not has_kernels:
        raise DeviceError("this adamix was built without CUDA: build it with ADAMIX_CUDA=ON, or "
                          "give --device cpu")
    index = torch.cuda.current_device() if found.index is None else found.index
    # torch loads its linear algebra at the first use, and fails where two threads are first.
    torch.linalg.cholesky(torch.eye(1, device=torch.device("cuda", index)))
    counts = Counter(dtype for dtype in dtypes if dtype.is_floating_point)
    main = max(counts, key=counts.__getitem__, default=torch.float32)
    return Compute(torch.device("cuda", index), main if main.itemsize == 2 else torch.float32)


def matrix_device_bytes(shape: tuple[int, int], budget_bits: int, config: Config) -> int:
    """What compressing one matrix `[out, in]` takes of a GPU, its inputs' Gram matrix included."""
    out, n = shape
    least = component_bits(shape, min(config.bit_widths))
    candidates = min(budget_bits // least, out, n)
    lanes = candidates * len(config.bit_widths)
    weights = out * n
    hessian = 32 * n * n  # the Gram matrix, H, H in GPTQ's order, its factor, and the inverse's
    kept = (24 if out > n else 16) * n * n
    pair = 12 * weights  # ΔW in fp32 and fp64
    decompose = 16 * weights + 8 * candidates * (out + n)
    simulate = 24 * lanes * n + 16 * candidates * (out + n)
    error = 16 * weights + 8 * n * n
    return max(hessian, kept + pair + max(decompose, simulate, error))


def plan_device(compute: Compute, found: Sizes, grams: int, largest_job: int,
                sums: int = ALONE.at_once) -> MemoryPlan:
    """How calibrating and compressing share a GPU's memory.

    Args:
        compute: the GPU.
        found: what calibrating handles, counted in fp32.
        grams: bytes of the Gram matrices of the block that has most of them.
        largest_job: of `matrix_device_bytes`.
        sums: of one Gram matrix that are alive at a time.
    """
    share = compute.dtype.itemsize / 4
    free, _ = torch.cuda.mem_get_info(compute.device)
    free += torch.cuda.memory_reserved(compute.device)
    states = int(share * (found.states + found.resident))
    activations = int(share * found.activations)
    making = (sums + 1) * grams + activations  # a chunk's part is made beside the sums
    # The sums of groups of chunks come on top of what keeps a GPU busy.
    wanted = max(DEVICE_BYTES + (sums - 1) * grams, states + max(making, largest_job))
    limit = int(min(SHARE * free, wanted)) - states
    return MemoryPlan(limit, max(min((sums + 1) * grams, limit - activations), 0),
                      min(making, limit), 1, False)
