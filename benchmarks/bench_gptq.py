"""Time of torch.ops.adamix.gptq: rows of V at seven widths in one call, columns of U.

    python benchmarks/bench_gptq.py --csv rows.csv

A call does rows · n² operations: half of n² multiply-adds a row. The rival is a plain loop of torch
calls for one width (rivals/gptq_loop.py), eager, timed a few times.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from harness import Prepared, Session, Work, add_arguments, require_gpu
from rivals.gptq_loop import gptq_loop
from rows import Row
from torch import Tensor

from adamix import ops

WIDTHS = range(2, 9)
ROWS_SHAPES = {"7168x3584": (7 * 1024, 3584), "10549x18944": (7 * 1507, 18944)}
LOOP_SHAPE, LOOP_BITS = "1024x3584", 3
COLUMN_SHAPE = "3584x1024"
EXACT_COLUMNS = 8192  # up to here hinv comes from a Gram matrix; beyond, a triangle stands for it
SETS = 3  # 51 MB of hinv at n = 3584, more at 18944: together beyond the L2 cache
DAMPING = 0.01
REPEATS = 3  # of the rival


def inverse_factor(n: int, device: str = "cuda") -> Tensor:
    """Upper Cholesky factor fp32 of the inverse of a random damped Gram matrix."""
    if n > EXACT_COLUMNS:
        triangle = torch.randn(n, n, device=device).mul_(0.1 / n**0.5).triu_(1)
        triangle.diagonal().copy_(torch.rand(n, device=device) + 0.5)
        return triangle
    spread = torch.arange(1, n + 1, dtype=torch.float64, device=device).pow(-0.5)
    x = torch.randn(n, 2 * n, dtype=torch.float64, device=device) * spread[:, None]
    gram = x @ x.T
    gram.diagonal().add_(DAMPING * gram.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    return torch.linalg.cholesky(inverse, upper=True).float().contiguous()


def lanes(rows: int, n: int, by_row: bool, widths: range, device: str = "cuda"
          ) -> tuple[Tensor, Tensor]:
    """(bits, scales), one a row or one a column: the widths in equal shares; for weights N(0, 1)
    the highest level stands at 2 .. 4."""
    count = rows if by_row else n
    bits = torch.arange(count, dtype=torch.int32, device=device) * len(widths) // count
    bits = (bits + widths[0]).to(torch.int32)
    return bits, (1.5 + 0.3 * bits) / (2.0**bits - 1)


def gptq_work(rows: int, n: int, by_row: bool, widths: range) -> Work:
    def build(sets: int) -> Prepared:
        bits, scales = lanes(rows, n, by_row, widths)
        calls = [partial(ops.gptq, torch.randn(rows, n, device="cuda"), inverse_factor(n), bits,
                         scales, by_row=by_row) for _ in range(sets)]
        return Prepared({"by row" if by_row else "by column": calls}, moved(rows, n),
                        float(rows) * n * n)

    return Work(4.0 * n * (rows + n), build, SETS)


def loop_work(rows: int, n: int, width: int) -> Work:
    def build(sets: int) -> Prepared:
        _, scales = lanes(rows, n, True, range(width, width + 1))
        calls = [partial(gptq_loop, torch.randn(rows, n, device="cuda"), inverse_factor(n), width,
                         scales)]
        return Prepared({"blocks of 128": calls}, moved(rows, n), float(rows) * n * n)

    return Work(4.0 * n * (rows + n), build, 1)


def moved(rows: int, n: int) -> float:
    """Bytes: the weight, the triangle of hinv, the codes."""
    return 4.0 * rows * n + 2.0 * n * (n + 1) + rows * n


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shapes = [*ROWS_SHAPES, LOOP_SHAPE, COLUMN_SHAPE]
    parser.add_argument("--shapes", nargs="+", choices=shapes, default=shapes, metavar="ROWSxN",
                        help=f"of {', '.join(shapes)}")
    parser.add_argument("--impls", nargs="+", choices=["adamix", "torch loop"],
                        default=["adamix", "torch loop"])
    add_arguments(parser)
    args = parser.parse_args()
    require_gpu("bench_gptq.py")
    torch.manual_seed(0)
    session = Session(args)
    several = f"{WIDTHS[0]}..{WIDTHS[-1]}"
    cases = [(name, several, "adamix", partial(gptq_work, *size, True, WIDTHS))
             for name, size in ROWS_SHAPES.items()]
    one = range(LOOP_BITS, LOOP_BITS + 1)
    cases += [(LOOP_SHAPE, str(LOOP_BITS), "adamix", partial(gptq_work, 1024, 3584, True, one)),
              (LOOP_SHAPE, str(LOOP_BITS), "torch loop", partial(loop_work, 1024, 3584, LOOP_BITS)),
              (COLUMN_SHAPE, several, "adamix", partial(gptq_work, 3584, 1024, False, WIDTHS))]
    for shape, bits, impl, work in cases:
        if shape in args.shapes and impl in args.impls:
            session.measure(Row("gptq", shape, None, None, "float32", bits, impl), work(),
                            REPEATS if impl == "torch loop" else None)
    session.close()


if __name__ == "__main__":
    main()
