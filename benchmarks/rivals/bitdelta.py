"""One bit a weight, ΔW ≈ α · sign(ΔW), after BitDelta's description (arXiv 2402.10193), in Triton.

Our own kernels. y [models, tokens, out] += α[model] · x [models, tokens, in] · sign[model]. Signs
are packed 32 a word along the input dimension: words [models, in / 32, out]; within a group of 512
inputs, bit j of word w is input 16 j + w, so that one word's bits meet 32 tiles of x in turn and
the words are read once. A set bit is +1.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from banks import Case
from harness import Prepared, SkippedError, Work, random_words
from torch import Tensor

from rivals.signs import GROUP, sign_product

ONE = {torch.bfloat16: 0x3F80, torch.float16: 0x3C00}  # 1.0, bit by bit
LARGEST_ERROR = 1e-2


@triton.jit
def _sign_gemv(x, words, alpha, y, in_features, out_features, BLOCK: tl.constexpr):
    """One token a model: x's sign bit is flipped by the stored one, then added, all in fp32."""
    model = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, 16)
    x_at = x + model * in_features + k
    word_at = words + (model * (in_features // 32) + k[:, None]) * out_features + n[None, :]
    inside = n[None, :] < out_features
    sums = tl.zeros((16, BLOCK), dtype=tl.float32)
    for group in range(0, in_features, 512):
        packed = tl.load(word_at, mask=inside, other=0)
        for j in tl.static_range(32):
            value = tl.load(x_at + group + j * 16).to(tl.float32).to(tl.int32, bitcast=True)
            flip = (packed << (31 - j)) & (-2147483648)
            sums += (value[:, None] ^ flip).to(tl.float32, bitcast=True)
        word_at += 16 * out_features
    total = -tl.load(alpha + model) * tl.sum(sums, axis=0)
    y_at = y + model * out_features + n
    old = tl.load(y_at, mask=n < out_features, other=0).to(tl.float32)
    tl.store(y_at, (old + total).to(y.dtype.element_ty), mask=n < out_features)


@triton.jit
def _sign_gemm(x, words, alpha, y, tokens, in_features, out_features, ONE_BITS: tl.constexpr,
               ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Tiles of tokens on tensor cores: a sign is a 16-bit 1.0 with the stored bit as its sign."""
    model = tl.program_id(2).to(tl.int64)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, 16)
    x_at = x + (model * tokens + m[:, None]) * in_features + k[None, :]
    word_at = words + (model * (in_features // 32) + k[:, None]) * out_features + n[None, :]
    inside = n[None, :] < out_features
    sums = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for group in range(0, in_features, 512):
        packed = tl.load(word_at, mask=inside, other=0)
        for j in tl.static_range(32):
            tile = tl.load(x_at + group + j * 16, mask=m[:, None] < tokens, other=0)
            bit = (packed << (15 - j)) if j < 16 else (packed >> (j - 15))
            sign = ((bit & 0x8000) ^ (ONE_BITS | 0x8000)).to(tl.int16)
            sums = tl.dot(tile, sign.to(x.dtype.element_ty, bitcast=True), sums)
        word_at += 16 * out_features
    mask = (m[:, None] < tokens) & inside
    y_at = y + (model * tokens + m[:, None]) * out_features + n[None, :]
    old = tl.load(y_at, mask=mask, other=0).to(tl.float32)
    tl.store(y_at, (old + tl.load(alpha + model) * sums).to(y.dtype.element_ty), mask=mask)


def sign_gemv(x: Tensor, words: Tensor, alpha: Tensor, y: Tensor, block: int, warps: int) -> None:
    models, tokens, in_features = x.shape
    check(x, tokens == 1)
    grid = (triton.cdiv(y.shape[2], block), models)
    _sign_gemv[grid](x, words, alpha, y, in_features, y.shape[2], BLOCK=block, num_warps=warps)


def sign_gemm(x: Tensor, words: Tensor, alpha: Tensor, y: Tensor, rows: int, block: int,
              warps: int) -> None:
    models, tokens, in_features = x.shape
    check(x, True)
    grid = (triton.cdiv(y.shape[2], block), triton.cdiv(tokens, rows), models)
    _sign_gemm[grid](x, words, alpha, y, tokens, in_features, y.shape[2], ONE_BITS=ONE[x.dtype],
                     ROWS=rows, BLOCK=block, num_warps=warps, num_stages=3 if rows <= 16 else 2)


def check(x: Tensor, shaped: bool) -> None:
    if x.shape[2] % GROUP or x.dtype not in ONE or not shaped:
        raise ValueError(f"needs 16-bit x with a multiple of {GROUP} inputs, got {x.dtype} "
                         f"{list(x.shape)}")


def configurations(tokens: int) -> dict[str, partial[None]]:
    """What is tried, by the path's name; the fastest is kept."""
    kernels: dict[str, partial[None]] = {}
    if tokens == 1:
        for block, warps in ((32, 4), (64, 4), (128, 4), (128, 8)):
            kernels[f"adds, {block} outputs, {warps} warps"] = partial(
                sign_gemv, block=block, warps=warps)
    rows = 16 if tokens <= 16 else 64
    for block, warps in ((32, 2), (64, 4), (128, 4), (128, 8)):
        kernels[f"mma, {rows} tokens x {block} outputs, {warps} warps"] = partial(
            sign_gemm, rows=rows, block=block, warps=warps)
    return kernels


def first_error(kernel: partial[None], x: Tensor, words: Tensor, alpha: Tensor, y: Tensor) -> float:
    """Relative error of the first model's delta against plain torch in fp32."""
    size = (alpha.mean() * x.shape[2] ** 0.5).item()
    before = torch.randn_like(y).mul_(size)  # a larger y would hide the delta by its rounding
    after = before.clone()
    kernel(x, words, alpha, after)
    exact = sign_product(x[:1], words.view(len(x), -1, y.shape[2])[:1], alpha[:1], before[:1])
    delta = exact - before[:1].float()
    error = ((after[:1].float() - exact).norm() / delta.norm()).item()
    if not error <= LARGEST_ERROR:
        raise SkippedError(f"wrong: error {error:.1e} against plain torch")
    return error


def sign_work(case: Case) -> Work:
    packed = case.models * case.in_features * case.out_features // 8

    def build(sets: int) -> Prepared:
        kernels = configurations(case.tokens)
        paths: dict[str, list[partial[None]]] = {path: [] for path in kernels}
        for _ in range(sets):
            x = case.random(case.models, case.tokens, case.in_features)
            y = case.random(case.models, case.tokens, case.out_features)
            words = random_words(packed // 4, case.device)
            alpha = torch.rand(case.models, device=case.device) * 1e-3
            for path, kernel in kernels.items():
                paths[path].append(partial(kernel, x, words, alpha, y))
        moved = packed + 4 * case.models + case.activation_bytes
        return Prepared(paths, moved, 2 * case.rows * case.in_features * case.out_features,
                        max(first_error(kernel, *paths[path][0].args)
                            for path, kernel in kernels.items()))

    return Work(packed + case.stored_activation_bytes, build)
