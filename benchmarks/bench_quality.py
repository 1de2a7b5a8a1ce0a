"""Relative output error of the method on real deltas, a row a matrix, everything counted.

    python benchmarks/bench_quality.py --data PATH/smollm2-arith

The data: `w<layer>.safetensors` with `base.<module>` and `ft.<module>`, and Gram matrices of
calibration inputs (`hgen<layer>`) and of inputs held out from them (`hdom<layer>`), each an upper
triangle in `torch.triu_indices` order. Error: tr(E H Eᵀ) / tr(ΔW H ΔWᵀ), E = ΔW − Δ̂, undamped.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from rows import command_of, commit
from safetensors.torch import load_file

import adamix
from adamix import relative_error

LAYERS = (3, 27)
GRAM_OF = {"q_proj": "q", "k_proj": "q", "v_proj": "q", "o_proj": "o", "gate_proj": "gate",
           "up_proj": "gate", "down_proj": "down"}


def matrices(data: Path) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(name, ΔW, Gram matrix of calibration inputs, Gram matrix of held-out inputs)."""
    for layer in LAYERS:
        weights = load_file(data / f"w{layer}.safetensors")
        general = load_file(data / f"hgen{layer}.safetensors")
        domain = load_file(data / f"hdom{layer}.safetensors")
        for name in sorted(key.removeprefix("ft.") for key in weights if key.startswith("ft.")):
            delta = weights[f"ft.{name}"].float() - weights[f"base.{name}"].float()
            gram = GRAM_OF[name.split(".")[-1]]
            n = delta.shape[1]
            yield (f"layers.{layer}.{name}", delta, full_matrix(general[gram], n),
                   full_matrix(domain[gram], n))


def full_matrix(triangle: torch.Tensor, n: int) -> torch.Tensor:
    """The symmetric matrix `[n, n]` whose upper triangle this is, row by row."""
    matrix = torch.zeros(n, n, dtype=triangle.dtype)
    rows, columns = torch.triu_indices(n, n)
    matrix[rows, columns] = triangle
    return torch.triu(matrix) + torch.triu(matrix, 1).T


def measure(data: Path, config: adamix.Config, preset: str) -> list[dict[str, object]]:
    """Compress every matrix and print its row."""
    rows: list[dict[str, object]] = []
    for name, delta, calibration, held_out in matrices(data):
        start = time.perf_counter()
        packed = adamix.compress_matrix(delta, calibration, config)
        seconds = time.perf_counter() - start
        restored = packed.dequantize()
        row = {"preset": preset, "matrix": name, "out": delta.shape[0], "in": delta.shape[1],
               "bits_per_weight": packed.bits_per_weight, "rank": packed.rank,
               "error_calibration": relative_error(delta, restored, calibration),
               "error_held_out": relative_error(delta, restored, held_out), "seconds": seconds}
        rows.append(row)
        print(f"{preset:<7} {name:<28} {row['out']:>5} x {row['in']:<5} "
              f"{row['bits_per_weight']:.4f} bits  rank {packed.rank:>4}  "
              f"calibration {row['error_calibration']:.5f}  held out {row['error_held_out']:.5f}  "
              f"{seconds:5.1f} s  {packed.widths}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the real deltas")
    parser.add_argument("--bits", type=float, default=1.0, help="bits a weight, everything counted")
    parser.add_argument("--presets", nargs="+", default=["adamix", "paper"])
    parser.add_argument("--passes", type=int, help="other than the preset's")
    parser.add_argument("--damping", type=float, help="share of the mean diagonal")
    parser.add_argument("--gain", type=float, help="power of what makes up for shrinking")
    parser.add_argument("--csv", type=Path, help="write the rows here")
    args = parser.parse_args()
    rows, changes = [], {name: value for name in ("passes", "damping", "gain")
                         if (value := getattr(args, name)) is not None}
    for preset in args.presets:
        config = adamix.Config.preset(preset, bits_per_weight=args.bits, **changes)
        measured = measure(args.data, config, preset)
        rows += measured
        means = [sum(float(row[key]) for row in measured) / len(measured)
                 for key in ("bits_per_weight", "error_calibration", "error_held_out")]
        print(f"{preset:<7} mean of {len(measured)}: {means[0]:.4f} bits, "
              f"calibration {means[1]:.4f}, held out {means[2]:.4f}\n")
    if args.csv:
        origin = {"commit": commit(Path(__file__).parent),
                  "command": command_of(["bench_quality.py", *sys.argv[1:]])}
        rows = [row | origin for row in rows]
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
