"""What the steps of a compression cost, counted in operations of a few kinds.

Every count is taken from the code that it stands for; `rates.py` measures what one of each kind
takes on this machine, and `estimation.py` multiplies the two.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import astuple, dataclass

from transformers import PretrainedConfig

from adamix.calibration.gram import CHUNK
from adamix.calibration.sampling import cache_bytes, chunk_rows
from adamix.compression.matrix import SCALE_BITS, component_bits
from adamix.config import Config

# Of the components that are kept at 1 bit a weight and below, when all widths may be chosen: 3.3 to
# 3.7 on two real fine-tunes, whatever their sizes.
MEAN_WIDTH = 3.5


@dataclass(frozen=True)
class Work:
    """Operations by kind; or, of the same kinds, seconds an operation."""

    products_fp32: float = 0.0  # floating-point operations of matrix products
    products_fp64: float = 0.0
    factors: float = 0.0  # n³: a Hessian's Cholesky factor, its inverse, and that one's factor
    eigen: float = 0.0  # n³ of an eigendecomposition
    gptq: float = 0.0  # lanes · n²
    scales: float = 0.0  # lanes · n: the search for the scales of so many entries
    candidates: float = 0.0  # components that an integer program chooses from
    activations: float = 0.0  # bytes that a decoder layer makes beside its matrix products
    cached: float = 0.0  # bytes of keys and values that a layer appends a token to and attends to
    surveyed: float = 0.0  # bytes of tensors read, compared and hashed

    def __add__(self, other: Work) -> Work:
        return Work(*map(sum, zip(astuple(self), astuple(other), strict=True)))

    def seconds(self, rates: Work) -> float:
        """On one thread, at these seconds an operation."""
        return sum(map(math.prod, zip(astuple(self), astuple(rates), strict=True)))


# Seconds an operation, roughly and in any unit: to weigh one matrix against another, anywhere.
RELATIVE = Work(products_fp32=1, products_fp64=2, factors=2, eigen=20, gptq=2, scales=30,
                candidates=1e6)


def group_cost(shapes: Collection[tuple[int, int]], bits: Iterable[int], config: Config) -> float:
    """The weight of matrices that read one input, beside other such groups."""
    n = next(iter(shapes))[1]
    works = [matrix_work(shape, budget, config)
             for shape, budget in zip(shapes, bits, strict=True)]
    return sum(works, hessian_work(n)).seconds(RELATIVE)


def planned_rank(shape: tuple[int, int], budget_bits: int, config: Config) -> int:
    """How many components a matrix `[out, in]` keeps, about."""
    mean = min(max(MEAN_WIDTH, min(config.bit_widths)), max(config.bit_widths))
    return min(round(budget_bits / (mean * _step(shape) + SCALE_BITS)), *shape)


def planned_bits(shape: tuple[int, int], budget_bits: int, config: Config) -> int:
    """The bits of words and scales that a matrix takes of its budget: whole steps of width."""
    rank, step = planned_rank(shape, budget_bits, config), _step(shape)
    steps = min((budget_bits - SCALE_BITS * rank) // step, rank * max(config.bit_widths))
    return steps * step + SCALE_BITS * rank


def _step(shape: tuple[int, int]) -> int:
    """What one bit more for a component takes."""
    return component_bits(shape, 1) - SCALE_BITS


def hessian_work(n: int) -> Work:
    """H and its factors for n inputs."""
    return Work(factors=n**3)


def matrix_work(shape: tuple[int, int], budget_bits: int, config: Config) -> Work:
    """Compressing one matrix `[out, in]` whose Hessian is there, and measuring its error."""
    out, n = shape
    least, widths = component_bits(shape, min(config.bit_widths)), len(config.bit_widths)
    candidates = min(budget_bits // least, out, n)
    rank = min(planned_rank(shape, budget_bits, config), candidates)
    lanes = candidates * widths
    error = Work(products_fp64=4 * out * n * n, products_fp32=2 * out * n * rank)
    simulation = Work(gptq=lanes * n * n, scales=lanes * (n + out),
                      products_fp64=2 * (lanes + candidates) * n * n)
    u = Work(products_fp64=4 * rank * n * n + 2 * rank * rank * (n + out) + 2 * rank * n * out,
             factors=rank**3, scales=rank * out, gptq=out * rank * rank)
    v = Work(products_fp64=2 * rank * n * out + 2 * rank * rank * (n + out),
             factors=rank**3, scales=rank * n, gptq=rank * n * n)
    work = _decomposition(shape, candidates, config) + simulation + u + error
    for _ in range(config.passes - 1):
        work += v + u
    return work + Work(candidates=candidates)


def measuring_work(shape: tuple[int, int]) -> Work:
    """The energies of a matrix's components, for a budget that is shared out."""
    out, n = shape
    small = min(out, n)
    return Work(products_fp64=2 * out * n * (n + small), eigen=small**3 / 3)  # no eigenvectors


def _decomposition(shape: tuple[int, int], candidates: int, config: Config) -> Work:
    out, n = shape
    small = min(out, n)
    rows = Work(products_fp64=2 * candidates * out * n)
    if config.decomposition == "plain":  # an SVD takes two to three eigendecompositions' time
        return rows + Work(eigen=3 * small**3, products_fp64=4 * out * n * small)
    if out <= n:
        grams = 2 if config.svd_damping else 1  # of the outputs, and of ΔW alone
        return rows + Work(eigen=out**3, products_fp64=2 * out * n * (n + grams * out))
    return rows + Work(eigen=n**3, products_fp64=4 * out * n * n + 2 * candidates * out * n)


def activation_bytes(tokens: int, outputs: int, hidden: int, expert: int = 0) -> int:
    """What a decoder layer makes in fp32: what its linear layers put out twice, hidden states, and
    so many numbers a token of its experts, which run one by one."""
    return 4 * tokens * (2 * outputs + 8 * hidden + expert)


def calibration_work(linears: Mapping[str, tuple[int, ...]], inputs: Iterable[int], layers: int,
                     tokens: tuple[int, int], activations: int) -> Work:
    """Running all blocks over the calibration text, with a Gram matrix of each distinct input.

    Args:
        linears: shapes of the weights in the blocks.
        inputs: sizes of the distinct inputs.
        layers: decoder blocks.
        tokens: sequences and their length.
        activations: bytes of one chunk of sequences in one block.
    """
    count, chunks = math.prod(tokens), tokens[0] / CHUNK
    weights = sum(map(math.prod, linears.values()))
    grams = sum(n * n for n in inputs)
    return Work(products_fp32=2 * count * (weights + grams),
                activations=chunks * layers * activations)


def sampling_work(weights: int, config: PretrainedConfig, tokens: tuple[int, int], *,
                  gpu: bool = False) -> Work:
    """One chunk of text that the model writes itself, token by token.

    Args:
        weights: that a token is multiplied by.
        config: the model's.
        tokens: sequences and their length.
    """
    rows, steps = min(chunk_rows(config, tokens[1], gpu=gpu), tokens[0]), tokens[1] - 1
    return Work(products_fp32=2 * rows * steps * weights,  # and of the cache half on average
                cached=steps * rows * cache_bytes(config, tokens[1]) / 2)


def sampling_chunks(config: PretrainedConfig, tokens: tuple[int, int], *, gpu: bool = False) -> int:
    """How many chunks the text is written in, each by one thread."""
    return -(-tokens[0] // chunk_rows(config, tokens[1], gpu=gpu))
