"""Where a compression computes, and what it may take of a GPU's memory."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from adamix.calibration.sums import ALONE
from adamix.compression.hessian import COLUMNS
from adamix.compression.matrix import component_bits
from adamix.compression.simulate import AT_A_TIME
from adamix.config import Config
from adamix.costs import planned_rank
from adamix.errors import DeviceError
from adamix.memory import MemoryPlan, Sizes

JOBS = 4  # groups of matrices at a time on a GPU: some wait for solvers, others keep it busy
DEVICE_BYTES = 23e9  # of a GPU's memory that are used where there is more: enough to keep it busy
SHARE = 0.9  # of its free memory at most
HELD = 1.04  # times what is planned that torch may hold, with what was freed and workspaces
ALLOCATOR_OPTIONS = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}  # what a user sets them by
RANK_SPREAD = 1.35  # times the planned rank that a matrix keeps at most, as test_costs.py has it


@dataclass(frozen=True)
class Compute:
    """The CPU, whose forward passes are fp32, or a GPU, where they are of 16 bits if the model's
    weights are; the matrices' own sums are fp64 on both."""

    device: torch.device
    dtype: torch.dtype  # of the calibration's forward passes

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @contextmanager
    def bounded(self) -> Iterator[None]:
        """What `bound` says holds until the block's end."""
        before = torch.cuda.get_per_process_memory_fraction(self.device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(before, self.device)

    def bound(self, size: int) -> None:
        """Let torch hold no more than so many bytes of the GPU, and what its libraries take: each
        stream's freed memory waits for that stream, and is given back rather than more taken."""
        whole = torch.cuda.get_device_properties(self.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, HELD * size / whole), self.device)

    def begin_thread(self) -> None:
        """Give this thread a stream of its own on the GPU: copies, eigenvalues and all else that
        leaves most of it idle then run beside the kernels of other threads."""
        torch.cuda.set_device(self.device)
        torch.cuda.set_stream(torch.cuda.Stream(self.device))

    def queued(self) -> torch.cuda.Event | None:
        """What this thread has asked of the GPU up to here, for `after` in another thread."""
        return torch.cuda.current_stream(self.device).record_event() if self.is_cuda else None

    def after(self, queued: torch.cuda.Event | None, *tensors: Tensor) -> None:
        """Let this thread's stream wait for what another had `queued`, and use its tensors; their
        memory is not taken anew before this stream is past what it does with them up to then."""
        if queued is None:
            return
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(queued)
        for tensor in tensors:
            tensor.record_stream(stream)

    @property
    def label(self) -> str:
        """What the bytes depend on: not which CPU, but which GPU."""
        return torch.cuda.get_device_name(self.device) if self.is_cuda else "cpu"


CPU = Compute(torch.device("cpu"), torch.float32)


def expand_segments() -> None:
    """Matrices of many sizes come and go: torch would hold a third more than is in use at any time.
    Of no effect once CUDA is in use, or where the user has set options of torch's allocator."""
    if not torch.cuda.is_initialized() and not ALLOCATOR_OPTIONS & os.environ.keys():
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"


def find_device(device: str | torch.device) -> torch.device:
    """The CPU or a GPU that is here.

    Raises:
        DeviceError: there is no such device.
    """
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise DeviceError(f"expected a device like cpu or cuda:0, got {device!r}") from error
    if found.type != "cpu" and (found.type != "cuda" or not torch.cuda.is_available() or
                                (found.index or 0) >= torch.cuda.device_count()):
        raise DeviceError(f"there is no device {device}: {torch.cuda.device_count()} CUDA devices "
                          f"are here")
    return found


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
    found = find_device(device)
    if found.type == "cpu":
        return CPU
    if not has_kernels:
        raise DeviceError("this adamix was built without CUDA: build it with ADAMIX_CUDA=ON, or "
                          "give --device cpu")
    expand_segments()
    index = torch.cuda.current_device() if found.index is None else found.index
    # torch loads its linear algebra at the first use, and fails where two threads are first.
    torch.linalg.cholesky(torch.eye(1, device=torch.device("cuda", index)))
    counts = Counter(dtype for dtype in dtypes if dtype.is_floating_point)
    main = max(counts, key=counts.__getitem__, default=torch.float32)
    return Compute(torch.device("cuda", index), main if main.itemsize == 2 else torch.float32)


def matrix_device_bytes(shape: tuple[int, int], itemsize: int, budget_bits: int, config: Config, *,
                        weighted: bool = False) -> int:
    """The most that compressing one matrix `[out, in]` holds of a GPU, array by array, its inputs'
    Hessian included.

    Args:
        itemsize: of a weight as stored.
        weighted: its rows have weights, as an embedding's have.
    """
    out, n = shape
    least = component_bits(shape, min(config.bit_widths))
    candidates = min(budget_bits // least, out, n)
    lanes, small = candidates * len(config.bit_widths), min(out, n)
    rank = min(candidates, int(RANK_SPREAD * planned_rank(shape, budget_bits, config)))
    weights, U, V = out * n, candidates * out, candidates * n
    # H, H in GPTQ's order and its factor; then that factor's inverse, some columns at a time.
    hessian = max(24 * n * n, 20 * n * n + 24 * n * min(n, COLUMNS))
    kept = (20 if out > n else 12) * n * n
    pair = (2 * itemsize + 12) * weights  # both sides, and ΔW in fp32 on its way to fp64
    delta = 8 * weights
    by_row = delta if weighted else 0
    eigen = 48 * small * small  # the matrix, its eigenvectors, and the solver's workspace
    if out > n:
        decompose = 8 * weights + max(eigen, 16 * n * n + 16 * U + 24 * V)
    else:
        decompose = max(8 * weights + 8 * out * out, eigen, 8 * out * out + 16 * U + 24 * V)
    entries = min(max(AT_A_TIME["cuda"], lanes), lanes * out)  # of U at all widths, at a time
    columns = lanes * n + (12 if weighted else 8) * U + 32 * entries
    simulate = 8 * (U + V) + max(14 * (lanes + 128) * n, lanes * n + 32 * V, columns)
    quantize = 8 * (U + V) + lanes * n + 28 * rank * (out + n)
    restored = 4 * weights + 2 * rank * (out + n) + 16 * rank * max(out, n)  # Δ̂ from codes
    error = 16 * weights + restored  # ΔW − Δ̂ and what the inputs see of it
    return max(hessian, kept + pair,
               kept + delta + max(by_row + max(decompose, simulate, quantize), error))


def held_bytes(compute: Compute, found: Sizes) -> int:
    """Of a GPU, all the while that blocks are calibrated: hidden states, and the block at work."""
    return int(compute.dtype.itemsize / 4 * (found.states + found.block))


def plan_device(compute: Compute, found: Sizes, grams: int, largest_job: int,
                sums: int = ALONE.at_once, *, whole: bool = False) -> MemoryPlan:
    """How calibrating and compressing share a GPU's memory.

    Args:
        compute: the GPU.
        found: what calibrating handles, counted in fp32.
        grams: bytes of the Gram matrices of the block that has most of them.
        largest_job: of `matrix_device_bytes`.
        sums: of one Gram matrix that are alive at a time.
        whole: the model is in memory whole.
    """
    share = compute.dtype.itemsize / 4
    free, _ = torch.cuda.mem_get_info(compute.device)
    free += torch.cuda.memory_reserved(compute.device)
    states = held_bytes(compute, found)
    activations = int(share * found.activations)
    making = max(sums * grams + activations, 0 if whole else int(share * found.resident))
    wanted = max(DEVICE_BYTES, states + max(making, largest_job))
    limit = int(min(SHARE * free, wanted)) - states
    return MemoryPlan(limit, max(min(sums * grams, limit - activations), 0), min(making, limit), 1,
                      False)
