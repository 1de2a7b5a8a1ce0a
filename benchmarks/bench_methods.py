"""The methods of the papers side by side, at equal bits with everything counted, on real deltas.

    python benchmarks/bench_methods.py --data PATH/smollm2-arith \\
        --csv benchmarks/results/methods.csv
    python benchmarks/bench_methods.py --table      # QUALITY.md's tables, from the rows alone

The data and the errors are bench_quality.py's; the methods are in `methods/`, each a dense
reconstruction with an exact count of what it would store. A row a method, matrix and budget.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path

import torch
from bench_quality import matrices
from method_tables import ROWS, markdown, mean_of, read
from methods import FIXED, METHODS
from methods.reconstruction import Method
from rows import MethodRow, append_row, command_of, commit
from torch import Tensor

from adamix import relative_error

ANY_SIZE = 2**62  # bits, for a method that has one size only
Case = tuple[str, Tensor, Tensor, Tensor]  # name, ΔW, Gram matrices of calibration and held out


def measure(method: str, compress: Method, case: Case, budget: float | None) -> MethodRow:
    """Compress one matrix; a method over its budget is an error of the benchmark's."""
    name, delta, calibration, held_out = case
    budget_bits = ANY_SIZE if budget is None else int(budget * delta.numel())
    start = time.perf_counter()
    result = compress(delta, calibration, budget_bits)
    seconds = time.perf_counter() - start
    row = MethodRow(method, name, f"{delta.shape[0]}x{delta.shape[1]}", budget,
                    threads=torch.get_num_threads(), commit=commit(Path(__file__).parent),
                    command=command_of(["bench_methods.py", *sys.argv[1:]]),
                    date=date.today().isoformat())
    if result is None:
        return replace(row, note="has no size so small")
    if result.bits > budget_bits:
        raise RuntimeError(f"{method} took {result.bits} bits of {budget_bits} for {name}")
    return replace(row, bits_per_weight=result.bits / delta.numel(), rank=result.rank,
                   error_calibration=relative_error(delta, result.dense, calibration),
                   error_held_out=relative_error(delta, result.dense, held_out), seconds=seconds)


def runs(names: list[str], budgets: list[float]) -> Iterator[tuple[str, Method, float | None]]:
    for name in names:
        if name in FIXED:
            yield name, FIXED[name], None
        else:
            yield from ((name, METHODS[name], budget) for budget in budgets)


def main() -> None:
    every = [*METHODS, *FIXED]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of the real deltas")
    parser.add_argument("--bits", type=float, nargs="+", default=[1.0, 0.5, 0.25],
                        help="budgets in bits a weight, everything counted")
    parser.add_argument("--methods", nargs="+", choices=every, default=every, metavar="NAME",
                        help="some of: " + "; ".join(every))
    parser.add_argument("--csv", type=Path, help="append the rows here")
    parser.add_argument("--table", action="store_true", help="print the Markdown of --csv")
    args = parser.parse_args()
    if args.table:
        print(markdown(read(args.csv or ROWS)))
        return
    if args.data is None:
        parser.error("--data: the folder of the real deltas")
    cases = list(matrices(args.data))
    for name, method, budget in runs(args.methods, args.bits):
        rows = []
        for case in cases:
            rows.append(measure(name, method, case, budget))
            if args.csv:
                append_row(args.csv, rows[-1])
        size = "one size " if budget is None else f"{budget:.2f} bits"
        if any(row.bits_per_weight is None for row in rows):
            print(f"{name:<27} {size}: too large for some matrices", flush=True)
            continue
        mean = mean_of(rows)
        print(f"{name:<27} {size}: used {mean.bits:.4f}, rank {mean.rank:5.1f}, calibration "
              f"{mean.calibration:.4f}, held out {mean.held_out:.4f}, {mean.seconds:5.1f} s",
              flush=True)


if __name__ == "__main__":
    main()
