"""The README's tables of the compression's rows.

    python benchmarks/compression_tables.py
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rows import WHOLE, CompressionRow, read_rows
from tables import table

ROWS = Path(__file__).with_name("results") / "compression.csv"


def samples(row: CompressionRow) -> bool:
    """Whether the fine-tune sampled the tokens that calibrated it."""
    return "--self" in row.command


def runs(rows: Sequence[CompressionRow], scope: str) -> list[list[CompressionRow]]:
    """The latest run of each kind: its stages, the whole last."""
    found: dict[object, list[CompressionRow]] = {}
    run: list[CompressionRow] = []
    for row in rows:
        run.append(row)
        if row.stage == WHOLE:
            key = row.impl, row.processes, row.length, row.model, samples(row)
            if row.scope == scope:
                found[key] = run
            run = []
    return list(found.values())


def of_model(rows: Sequence[CompressionRow]) -> str:
    """Seconds by stage and peak memories of whole models, a column a run."""
    found = sorted(runs(rows, "model"), key=lambda run: (samples(run[-1]), run[-1].processes))
    if not found:
        return ""
    stages = list(dict.fromkeys(row.stage for run in sorted(found, key=len, reverse=True)
                                for row in run if row.stage != WHOLE))
    seconds = [{row.stage: f"{row.seconds:.1f}" for row in run} for run in found]
    lines = [[stage, *(of.get(stage, "") for of in seconds)] for stage in (*stages, WHOLE)]
    last = [run[-1] for run in found]
    lines += [["host, GB", *(f"{row.host_gb:.1f}" for row in last)],
              ["GPU, GB allocated (reserved)",
               *(f"{row.device_gb:.1f} ({row.reserved_gb:.1f})" for row in last)],
              ["delta, MB", *(f"{(row.bytes or 0) / 1e6:.1f}" for row in last)],
              ["its SHA-256", *(f"{row.sha256[:8]}…" for row in last)]]
    title = (f"{last[0].model}, {last[0].layers} layers, calibrated by {last[0].sequences} × "
             f"{last[0].length} given tokens"
             + "".join(f", or by {row.sequences} × {row.length} that the fine-tune samples"
                       for row in last if samples(row))
             + ": seconds by stage, from the start of the process to the finished file; memories "
               "are the largest process's:")
    heads = [f"{row.processes} GPU{'s' * (row.processes > 1)}" + ", sampled" * samples(row)
             for row in last]
    return f"{title}\n\n{table(['', *heads], lines)}"


def of_layer(rows: Sequence[CompressionRow]) -> str:
    """One layer's matrices in both ways."""
    found = {run[-1].impl: run for run in runs(rows, "layer")}
    if len(found) < 2:
        return ""
    ours, theirs = found["adamix"][-1], found["straightforward"]
    parts = ", ".join(f"{row.stage} {row.seconds:.1f}" for row in theirs[:-1])
    whole = theirs[-1].seconds or 0.0
    return (f"The seven matrices of one layer, from the Gram matrices on: {ours.seconds:.2f} s, in "
            f"plain PyTorch {whole:.0f} s ({parts}): {whole / (ours.seconds or 1):.0f} times as "
            f"fast, with a mean error of {ours.error:.4f} and {theirs[-1].error:.4f}.")


def origin(rows: Sequence[CompressionRow]) -> str:
    """Where the rows are from."""
    runs_of = dict.fromkeys(f"{row.device}, commit {row.commit}, {row.date}: `{row.command}`"
                            for row in rows)
    return "; ".join(runs_of)


def markdown(rows: Sequence[CompressionRow]) -> str:
    """All of it."""
    shown = [row for scope in ("model", "layer") for run in runs(rows, scope) for row in run]
    return "\n\n".join(filter(None, [of_model(rows), of_layer(rows), origin(shown)]))


if __name__ == "__main__":
    print(markdown(read_rows([ROWS], CompressionRow)))
