"""What an operation of each kind takes on this machine, measured in about a second."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Executor

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PretrainedConfig

from adamix import ops
from adamix.calibration.sampling import cache_bytes, chunk_rows
from adamix.compression.allocate import allocate
from adamix.compression.hessian import hessian
from adamix.compression.quantize import search_scales
from adamix.costs import Work, activation_bytes
from adamix.source.checkpoints import Fingerprint

LARGEST = 512  # sides, lanes, tokens of what is measured, so that all takes about a second
CACHED = 2**24  # bytes of keys and values at most
SURVEYED = 2**22  # bytes
LAYERS = 2
REPEATS = 3  # the first call warms caches and the allocator up

Time = Callable[[Callable[[], object]], float]


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

    n, lanes = (max(32, min(size, LARGEST)) for size in (n, lanes))
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(n, 2 * n, generator=generator)
    W = torch.randn(lanes, n, generator=generator)
    square, gram = X[:, :n].contiguous(), X @ X.T
    bits = torch.arange(lanes, dtype=torch.int32) % 7 + 2
    H, scales = hessian(gram, 0.01), search_scales(W, bits)
    errors = W[:, :8].square().cumprod(dim=1) / torch.arange(1, lanes + 1)[:, None]
    tensor = torch.zeros(SURVEYED // 2, dtype=torch.bfloat16)
    fp32 = seconds(lambda: _repeat(square, square)) / (4 * 2 * n**3)
    return Work(
        products_fp32=fp32,
        products_fp64=seconds(lambda: _repeat(H.matrix, H.matrix)) / (4 * 2 * n**3),
        factors=seconds(lambda: hessian(gram, 0.01)) / n**3,
        eigen=seconds(lambda: torch.linalg.eigh(H.matrix)) / n**3,
        gptq=seconds(lambda: ops.gptq(W, H.inverse_upper, bits, scales, by_row=True)
                     ) / (lanes * n * n),
        scales=seconds(lambda: search_scales(W, bits)) / (lanes * n),
        candidates=seconds(lambda: allocate(errors, [*range(8, 1, -1), 0], 2 * lanes)) / lanes,
        **_decoding(config, tokens, fp32, seconds),
        surveyed=seconds(lambda: _survey(tensor)) / (2 * SURVEYED))


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


def _repeat(a: Tensor, b: Tensor) -> None:
    for _ in range(4):
        torch.mm(a, b)


def _survey(tensor: Tensor) -> None:
    for _ in range(2):
        Fingerprint().add("tensor", tensor)
        torch.isfinite(tensor).all()
    torch.equal(tensor, tensor.clone())


def _decoding(config: PretrainedConfig, tokens: tuple[int, int], fp32: float, seconds: Time
              ) -> dict[str, float]:
    """Rates of a decoder layer's work beside its matrix products, at `fp32` seconds each: over
    whole sequences, and over one token of each sequence."""
    model = _decoder(config.get_text_config())
    small, (count, length) = model.config, tokens
    text = torch.zeros(max(1, min(count, LARGEST // length)), min(length, LARGEST),
                       dtype=torch.long)
    outputs = sum(module.out_features for module in model.model.layers[0].modules()
                  if isinstance(module, torch.nn.Linear))
    flops = 2 * text.numel() * sum(parameter.numel() for parameter in model.parameters())
    spent = seconds(lambda: model(text, use_cache=False)) - flops * fp32
    made = LAYERS * activation_bytes(text.numel(), outputs, small.hidden_size)

    half = max(1, length // 2)
    rows = min(chunk_rows(config, length), count, max(1, CACHED // cache_bytes(small, half)))
    shape = rows, small.num_key_value_heads, half, small.head_dim
    keys, step = torch.zeros(shape), torch.zeros(rows, 1, dtype=torch.long)

    def decode() -> None:
        cache = DynamicCache()
        for layer in range(LAYERS):
            cache.update(keys, keys, layer)
        for _ in range(REPEATS):
            model(step, past_key_values=cache, use_cache=True)

    return {"activations": max(spent, 0.0) / made,
            "cached": seconds(decode) / (REPEATS * rows * cache_bytes(small, half))}


def _decoder(text: PretrainedConfig) -> LlamaForCausalLM:
    """Layers with attention as the model's, few heads where they are large."""
    shared = text.num_attention_heads // (getattr(text, "num_key_value_heads", None)
                                          or text.num_attention_heads)
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    most = min(text.hidden_size, LARGEST) // (width * shared)
    groups = max(1, min(text.num_attention_heads // shared, most))
    hidden = groups * shared * width
    config = LlamaConfig(
        vocab_size=32, hidden_size=hidden, num_hidden_layers=LAYERS, head_dim=width,
        intermediate_size=min(getattr(text, "intermediate_size", 4 * hidden), 3 * hidden),
        num_attention_heads=groups * shared, num_key_value_heads=groups)
    return LlamaForCausalLM(config).eval()
