"""What bounds the kernels of delta_gemm: Nsight Compute's counters of single calls, as a table.

    python benchmarks/profile_kernels.py > benchmarks/results/profile.txt

Runs bench_delta_gemm.py under `ncu --clock-control none`, a case after the other. Kernels are
profiled one by one with cold caches, so none overlaps the one before it, as in a call they do.
"""

from __future__ import annotations

import argparse
import csv
import io
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import torch
from rows import commit

CASES = (("3584x3584", 1, 1), ("gate_up", 1, 1), ("4096x4096", 32, 1), ("3584x18944", 32, 1),
         ("3584x3584", 1, 512), ("18944x3584", 1, 512))  # shape, models, tokens a model
CALLS, BEFORE = 2, 4  # calls that are profiled, after so many that are not
KERNELS = {False: ("down", "up"), True: ("sort", "down", "join", "up")}  # by many tokens
MANY = 128
SECTIONS = ("SpeedOfLight", "SchedulerStats", "WarpStateStats")
TIME = "gpu__time_duration.sum"
SHARES = {"memory": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
          "L2": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
          "issue": "smsp__issue_active.avg.pct_of_peak_sustained_active"}
STALL, STALL_END = "smsp__average_warps_issue_stalled_", "_per_issue_active.ratio"
SELECTED = {"selected", "not_selected"}  # what are no stalls
SHOWN = 4  # reasons


def profile(shape: str, models: int, tokens: int) -> dict[str, list[dict[str, str]]]:
    """{kernel: its launches' counters} of one case."""
    kernels = KERNELS[models * tokens > MANY]
    bench = Path(__file__).with_name("bench_delta_gemm.py")
    command = ["ncu", "--clock-control", "none", "--csv", "--page", "raw", "--print-units", "base",
               "--kernel-name", f"regex:({'|'.join(kernels)})_kernel",
               "--launch-skip", str(BEFORE * len(kernels)),
               "--launch-count", str(CALLS * len(kernels)),
               "--metrics", ",".join([TIME, *SHARES.values()])]
    for section in SECTIONS:
        command += ["--section", section]
    command += [sys.executable, str(bench), "--suite", "all", "--shapes", shape, "--models",
                str(models), "--tokens", str(tokens), "--impls", "adamix", "--quick"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = done.stdout.splitlines()
    begin = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if begin is None:
        sys.exit(f"ncu found nothing (exit code {done.returncode}):\n{done.stdout[-2000:]}")
    table = csv.DictReader(io.StringIO("\n".join(lines[begin:])))
    found = defaultdict(list)
    for row in table:
        if (row["ID"] or "").isdigit():  # not the line of units
            found[row["Kernel Name"].split("(")[0].split("<")[0].split("::")[-1].split()[-1]
                  ].append(row)
    return found


def number(row: dict[str, str], name: str) -> float | None:
    text = (row.get(name) or "").replace(",", "")
    return float(text) if text else None


def median(rows: list[dict[str, str]], name: str) -> float | None:
    values = [value for row in rows if (value := number(row, name)) is not None]
    return statistics.median(values) if values else None


def stalls(rows: list[dict[str, str]]) -> str:
    """The reasons for which warps wait most, in warps a scheduler at any cycle that issues."""
    names = {name for name in rows[0] if name.startswith(STALL) and name.endswith(STALL_END)}
    waits = {name.removeprefix(STALL).removesuffix(STALL_END): median(rows, name) or 0.0
             for name in names}
    largest = sorted((name for name in waits if name not in SELECTED), key=waits.__getitem__,
                     reverse=True)
    return ", ".join(f"{name} {waits[name]:.1f}" for name in largest[:SHOWN])


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    print(f"{torch.cuda.get_device_name()}, commit {commit(Path(__file__).parent)}; "
          f"shares of the peak; stalls: warps that wait, for each that issues")
    for shape, models, tokens in CASES:
        print(f"\n{shape}, {models} models, {tokens} tokens a model")
        for kernel, rows in profile(shape, models, tokens).items():
            shares = "  ".join(f"{name} {share:3.0f} %" for name, metric in SHARES.items()
                               if (share := median(rows, metric)) is not None)
            print(f"  {kernel:<26}{(median(rows, TIME) or 0) / 1e3:7.1f} us  {shares}  "
                  f"{stalls(rows)}", flush=True)


if __name__ == "__main__":
    main()
