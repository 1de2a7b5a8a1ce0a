"""The device that a test runs on, and the seed that all random numbers come from."""

import os
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch

from adamix import ops  # noqa: F401  registers the operators that `device` asks about


def has_cuda_kernel(operator: str) -> bool:
    """`operator` may name an overload: "delta_gemm.layers"."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"adamix::{operator}", "CUDA")


def skip_without_cuda(*operators: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for operator in operators:
        if not has_cuda_kernel(operator):
            pytest.skip(f"{operator} has no CUDA kernel yet")


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    """Both back ends. The operators that a test needs are those in its module's OPERATORS, and the
    one in its parameter `overload`."""
    if request.param == "cuda":
        own = request.node.callspec.params.get("overload")
        skip_without_cuda(*getattr(request.module, "OPERATORS", ()), *([own] if own else ()))
    return request.param


@pytest.fixture(scope="module")
def without_gpu() -> Iterator[None]:
    """What goes to a GPU where there is one goes to the CPU, here and in processes begun here."""
    if torch.cuda.is_available():  # CUDA reads the variable once, and later tests use the GPU
        torch.cuda.init()
        torch.cuda.device_count()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield


@pytest.fixture(scope="module")
def apart() -> Iterator[Executor]:
    """A process to measure memory in: no other test has used its allocator, and what it frees of
    large arrays goes back to the system at once."""
    before = os.environ.get("MALLOC_MMAP_THRESHOLD_")
    os.environ["MALLOC_MMAP_THRESHOLD_"] = f"{2**17}"  # fixed: it grows with what is freed else
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
            executor.submit(os.getpid).result()  # it has begun
            yield executor
    finally:
        del os.environ["MALLOC_MMAP_THRESHOLD_"]
        if before is not None:
            os.environ["MALLOC_MMAP_THRESHOLD_"] = before


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Threads inside products of this size cost more than they save, the more so on busy cores."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seed() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
