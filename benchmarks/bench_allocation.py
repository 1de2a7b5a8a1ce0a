"""One ratio for every matrix, or one budget for all? Errors on real deltas at equal bytes.

    python benchmarks/bench_allocation.py --data PATH/smollm2-arith

The data is that of `bench_quality.py`. `summed` is what `--allocate model` lowers: the summed
output error of all matrices for inputs of mean square one, over its value with one ratio for every
matrix.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from bench_quality import matrices

import adamix
from adamix import relative_error
from adamix.budget import COUNTS_BYTES
from adamix.compression.hessian import hessian
from adamix.compression.matrix import quantize_matrix
from adamix.compression.pairs import sets_of_pairs, union
from adamix.compression.share import energies, share_out
from adamix.storage.pack import pack


def measure(data: Path, config: adamix.Config, shares: dict[str, int]
            ) -> tuple[int, float, float, float]:
    """(bytes, mean error on calibration inputs, the same held out, summed output error)."""
    size, errors, held_out, summed = 0, [], [], 0.0
    for name, delta, calibration, other in matrices(data):
        H = hessian(calibration, config.damping)
        packed = pack(quantize_matrix(delta, H, config, budget_bits=shares[name]).delta)
        restored = packed.dequantize()
        size += packed.nbytes
        errors.append(relative_error(delta, restored, calibration))
        held_out.append(relative_error(delta, restored, other))
        summed += errors[-1] * float(energies(delta, H).sum())
    return size, sum(errors) / len(errors), sum(held_out) / len(held_out), summed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the real deltas")
    parser.add_argument("--bits", type=float, nargs="+", default=[1.0, 0.5], help="bits a weight")
    args = parser.parse_args()
    for bits in args.bits:
        config = adamix.Config(bits_per_weight=bits)
        even, spectra, shapes = {}, {}, {}
        for name, delta, calibration, _ in matrices(args.data):
            even[name] = config.budget_bits(delta.shape) - 8 * COUNTS_BYTES
            spectra[name] = energies(delta, hessian(calibration, config.damping))
            shapes[name] = delta.shape
        shared = share_out(spectra, shapes, even, union(sets_of_pairs(config)))
        first = None
        for allocate, shares in (("matrix", even), ("model", shared)):
            size, error, held_out, summed = measure(
                args.data, replace(config, allocate=allocate), shares)
            first = first or summed
            print(f"{bits:g} bits  --allocate {allocate:<6} {size:>8} bytes  calibration "
                  f"{error:.5f}  held out {held_out:.5f}  summed {summed / first:.3f}", flush=True)


if __name__ == "__main__":
    main()
