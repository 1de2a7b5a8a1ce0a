"""What an operation of each kind takes on this machine, measured in a second or a few."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PretrainedConfig

from adamix import ops
from adamix.calibration.sampling import cache_bytes, chunk_rows
from adamix.compression.allocate import allocate
from adamix.compression.hessian import hessian
from adamix.compression.quantize import search_scales
from adamix.costs import Work, activation_bytes
from adamix.devices import CPU, Compute
from adamix.source.checkpoints import digest

SURVEYED = 2**23  # bytes
LAYERS = 2
REPEATS = 3  # the first call warms caches and the allocator up
ENOUGH = 0.2  # seconds of a call on a GPU, which is not repeated then
PROGRAM = 512  # components of the integer program that is solved

Time = Callable[[Callable[[], object]], float]


@dataclass(frozen=True)
class Limits:
    """The most of what is measured, so that all takes about a second; on a GPU two or three, of
    what keeps it busy."""

    side: int  # of matrices
    lanes: int
    widest: int  # side of a Hessian whose factors are made
    tokens: int
    cached: int  # bytes of keys and values


ON_CPU = Limits(512, 512, 512, 512, 2**24)
ON_GPU = Limits(4096, 8192, 8192, 2**14, 2**28)


def measure(config: PretrainedConfig, tokens: tuple[int, int], n: int, lanes: int,
            executor: Executor, threads: int) -> Work:
    """Seconds an operation of each kind while all threads do the same, as in a compression.

    Args:
        config: of the model to compress: its attention is what is measured, its other sizes as far
            as they are small.
        tokens: calibration sequences and their length.
        n: what most matrices of the model have as inputs.
        lanes: rows of V that most of its simulations quantize.
        executor: of `threads` threads.
        threads: that work side by side.
    """
    def seconds(function: Callable[[], object]) -> float:
        return _seconds(function, executor, threads)

    matrices = _matrices(n, lanes, n, seconds, CPU, ON_CPU)
    return Work(**matrices, candidates=_program(seconds), surveyed=_surveying(seconds),
                **_decoding(config, tokens, matrices["products_fp32"], seconds, CPU, ON_CPU))


def measure_gpu(compute: Compute, config: PretrainedConfig, tokens: tuple[int, int], n: int,
                lanes: int, widest: int, executor: Executor, threads: int,
                limits: Limits = ON_GPU) -> tuple[Work, Work]:
    """Seconds an operation of each kind: of the matrices' work, and of the forward passes, whose
    products are of 16 bits where the model is.

    A GPU's are those of one job; what jobs do side by side takes turns there. Integer programs and
    the reading of both models are the CPU's.

    Args:
        compute: the GPU.
        widest: the most inputs of a matrix of the model.
        config, tokens, n, lanes, executor, threads: as in `measure`.
        limits: of what is measured.
    """
    def seconds(function: Callable[[], object]) -> float:
        return _seconds_on(compute, function)

    def on_cpu(function: Callable[[], object]) -> float:
        return _seconds(function, executor, threads)

    def alone(function: Callable[[], object]) -> float:
        return _seconds(function, executor, 1)

    with torch.cuda.device(compute.device) if compute.is_cuda else nullcontext():
        matrices = _matrices(n, lanes, widest, seconds, compute, limits)
        side = min(max(n, 32), limits.side)
        square = torch.randn(side, side, device=compute.device).to(compute.dtype)
        forward = seconds(lambda: _repeat(square, square)) / (4 * 2 * side**3)
        decoding = _decoding(config, tokens, forward, seconds, compute, limits)
    if compute.is_cuda:
        torch.cuda.empty_cache()
    work = Work(**matrices, **decoding, candidates=_program(alone), surveyed=_surveying(on_cpu))
    return work, replace(work, products_fp32=forward)


@torch.inference_mode()
def _matrices(n: int, lanes: int, widest: int, seconds: Time, compute: Compute, limits: Limits
              ) -> dict[str, float]:
    """Rates of what is done to a matrix, where it is done."""
    n, lanes, widest = (max(32, min(size, most)) for size, most in (
        (n, limits.side), (lanes, limits.lanes), (widest, limits.widest)))
    device, generator = compute.device, torch.Generator().manual_seed(0)
    X = torch.randn(n, 2 * n, generator=generator).to(device)
    W = torch.randn(lanes, n, generator=generator).to(device)
    square, gram = X[:, :n].contiguous(), X @ X.T
    bits = torch.arange(lanes, dtype=torch.int32, device=device) % 7 + 2
    H, scales = hessian(gram, 0.01), search_scales(W, bits)
    wide = gram if widest == n else torch.eye(widest, device=device)
    return dict(
        products_fp32=seconds(lambda: _repeat(square, square)) / (4 * 2 * n**3),
        products_fp64=seconds(lambda: _repeat(H.matrix, H.matrix)) / (4 * 2 * n**3),
        factors=seconds(lambda: hessian(wide, 0.01)) / widest**3,
        eigen=seconds(lambda: torch.linalg.eigh(H.matrix)) / n**3,
        gptq=seconds(lambda: ops.gptq(W, H.inverse_upper, bits, scales, by_row=True)
                     ) / (lanes * n * n),
        scales=seconds(lambda: search_scales(W, bits)) / (lanes * n))


def _program(seconds: Time) -> float:
    """A component of an integer program."""
    generator = torch.Generator().manual_seed(0)
    errors = torch.randn(PROGRAM, 8, generator=generator).square().cumprod(dim=1)
    errors /= torch.arange(1, PROGRAM + 1)[:, None]
    return seconds(lambda: allocate(errors, [*range(8, 1, -1), 0], 2 * PROGRAM)) / PROGRAM


def _surveying(seconds: Time) -> float:
    """A byte of two tensors in files, read as `survey` does it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "both.safetensors"
        half = torch.zeros(SURVEYED // 2, dtype=torch.bfloat16)
        save_file({"base": half, "finetuned": half.clone()}, path)
        return seconds(lambda: _survey(path)) / (2 * SURVEYED)


def _seconds(function: Callable[[], object], executor: Executor, threads: int) -> float:
    """Of one call, the mean over threads that call it at the same time of each one's median."""
    @torch.inference_mode()
    def run(_: int) -> float:
        spent = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            function()
            spent.append(time.perf_counter() - start)
        return sorted(spent)[REPEATS // 2]

    found = list(executor.map(run, range(threads)))
    return sum(found) / len(found)


def _seconds_on(compute: Compute, function: Callable[[], object]) -> float:
    """Of one call that has a GPU to itself: the least of a few, until it has ended."""
    spent: list[float] = []

    @torch.inference_mode()
    def call() -> float:
        start = time.perf_counter()
        function()
        if compute.is_cuda:
            torch.cuda.synchronize(compute.device)
        return time.perf_counter() - start

    call()  # loads kernels, and grows the allocator
    while len(spent) < REPEATS and sum(spent) < ENOUGH:
        spent.append(call())
    return min(spent)


def _repeat(a: Tensor, b: Tensor) -> None:
    for _ in range(4):
        torch.mm(a, b)


def _survey(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        sides = [file.get_tensor(name) for name in ("base", "finetuned")]
    for side in sides:
        digest("tensor", side)
        side.aminmax()
    torch.equal(*sides)


def _decoding(config: PretrainedConfig, tokens: tuple[int, int], product: float, seconds: Time,
              compute: Compute, limits: Limits) -> dict[str, float]:
    """Rates of a decoder layer's work beside its matrix products, at `product` seconds each: over
    whole sequences, and over one token of each sequence."""
    model = _decoder(config.get_text_config(), compute, limits.side)
    small, (count, length) = model.config, tokens
    text = torch.zeros(max(1, min(count, limits.tokens // length)), min(length, limits.tokens),
                       dtype=torch.long, device=compute.device)
    outputs = sum(module.out_features for module in model.model.layers[0].modules()
                  if isinstance(module, torch.nn.Linear))
    flops = 2 * text.numel() * sum(parameter.numel() for parameter in model.parameters())
    spent = seconds(lambda: model(text, use_cache=False)) - flops * product
    made = LAYERS * activation_bytes(text.numel(), outputs, small.hidden_size)

    half = max(1, length // 2)
    rows = min(chunk_rows(config, length), count, max(1, limits.cached // cache_bytes(small, half)))
    shape = rows, small.num_key_value_heads, half, small.head_dim
    keys = torch.zeros(shape, device=compute.device, dtype=compute.dtype)
    step = torch.zeros(rows, 1, dtype=torch.long, device=compute.device)

    def decode() -> None:
        cache = DynamicCache()
        for layer in range(LAYERS):
            cache.update(keys, keys, layer)
        for _ in range(REPEATS):
            model(step, past_key_values=cache, use_cache=True)

    return {"activations": max(spent, 0.0) / made,
            "cached": seconds(decode) / (REPEATS * rows * cache_bytes(small, half))}


def _decoder(text: PretrainedConfig, compute: Compute, largest: int) -> LlamaForCausalLM:
    """Layers with attention as the model's, few heads where they are large."""
    shared = text.num_attention_heads // (getattr(text, "num_key_value_heads", None)
                                          or text.num_attention_heads)
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    most = min(text.hidden_size, largest) // (width * shared)
    groups = max(1, min(text.num_attention_heads // shared, most))
    hidden = groups * shared * width
    config = LlamaConfig(
        vocab_size=32, hidden_size=hidden, num_hidden_layers=LAYERS, head_dim=width,
        intermediate_size=min(getattr(text, "intermediate_size", 4 * hidden), 3 * hidden),
        num_attention_heads=groups * shared, num_key_value_heads=groups)
    with compute.device:
        return LlamaForCausalLM(config).to(compute.dtype).eval()
