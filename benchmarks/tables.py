"""The README's tables in Markdown, from rows: nothing in them is typed by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rows import CEILING, Row, ServingRow, latest

RIVALS = ("full weights", "low rank", "base GEMM", "PyTorch unpack", "one-bit Triton")
HEADINGS = {"full weights": "full weights", "low rank": "low rank, same bytes",
            "base GEMM": "base GEMM alone", "PyTorch unpack": "plain PyTorch",
            "one-bit Triton": "one-bit, Triton", "adamix one by one": "a call a matrix"}
PREFILL = 128  # tokens a model, from here on


def markdown(rows: Sequence[Row]) -> str:
    """Every table that these rows suffice for, each under a line that says what it shows."""
    order = list(dict.fromkeys(row.shape for row in rows))
    rows = sorted(rows, key=lambda row: (order.index(row.shape), row.tokens or 0, row.models or 0))
    parts = [part for make in TABLES if (part := make(rows))]
    return "\n\n".join([*parts, origin(rows)]) if parts else "no rows"


def table(heading: Sequence[str], lines: Sequence[Sequence[str]], *, numbers: bool = False) -> str:
    """numbers: all columns but the first are lined up on the right."""
    under = ["---", *["--:" if numbers else "---"] * (len(heading) - 1)]
    rows = [heading, under, *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def ceilings(rows: Sequence[Row]) -> str:
    """The best of all runs: every run measures them, and its shares are of its own."""
    found: dict[str, Row] = {}
    for row in rows:
        if row.op == CEILING and row.us is not None:
            name = "copy" if row.impl.startswith("copy") else row.impl
            best = found.setdefault(name, row)
            if (row.gb_per_s or 0, row.tflop_per_s or 0) > (best.gb_per_s or 0,
                                                            best.tflop_per_s or 0):
                found[name] = row
    cells: dict[str, Callable[[Row], str]] = {
        "copy": lambda row: f"copy {(row.gb_per_s or 0) / 1e3:.2f} TB/s read and written",
        "matmul bfloat16": lambda row: f"bf16 matrix product {row.tflop_per_s:.0f} TFLOP/s",
        "matmul float32": lambda row: f"fp32 without TF32 {row.tflop_per_s:.1f} TFLOP/s",
        "empty kernel": lambda row: f"an empty kernel {row.us:.2f} µs"}
    said = [cell(found[name]) for name, cell in cells.items() if name in found]
    return f"The device's own ceilings (the roof): {', '.join(said)}." if said else ""


def one_token(rows: Sequence[Row]) -> str:
    """One matrix, one token a model: adamix and whatever rival was measured."""
    some = [row for row in rows if row.op == "delta_gemm" and row.tokens == 1
            and "+" not in row.shape]
    return compared(some, "One token a model, one matrix: µs a call, in brackets the time over "
                    "adamix's (below 1 is quicker):", RIVALS)


def grouped(rows: Sequence[Row]) -> str:
    some = [row for row in rows if row.op == "delta_gemm" and "+" in row.shape]
    return compared(some, "One token a model, several matrices of one input: µs, as above:",
                    ("adamix one by one", "base GEMM"))


def compared(rows: Sequence[Row], title: str, rivals: Sequence[str]) -> str:
    found = latest(rows)
    shown = [name for name in rivals if any(row.impl == name and row.us for row in rows)]
    lines = []
    for key, row in found.items():
        if row.impl != "adamix" or row.us is None:
            continue
        cells = [shape_of(row), str(row.models), f"**{micros(row.us)}**",
                 percent(row.roof_share or 0)]
        for name in shown:
            rival = found.get((*key[:-1], name))
            cells.append(ratio(rival, row.us) if rival else "")
        lines.append(cells)
    heading = ["in × out", "models", "adamix", "of the roof", *(HEADINGS[name] for name in shown)]
    return f"{title}\n\n{table(heading, lines)}" if lines else ""


def prefill(rows: Sequence[Row]) -> str:
    found = latest(row for row in rows if row.op == "delta_gemm" and (row.tokens or 0) >= PREFILL)
    lines = []
    for key, row in found.items():
        base = found.get((*key[:-1], "base GEMM"))
        if row.impl == "adamix" and row.us and base and base.us:
            lines.append([shape_of(row), str(row.models), str(row.tokens), micros(row.us),
                          micros(base.us), f"{row.us / base.us:.2f}", f"{row.tflop_per_s:.0f}"])
    heading = ["in × out", "models", "tokens a model", "adamix, µs", "base GEMM, µs",
               "adamix / base", "adamix, TFLOP/s"]
    title = "Many tokens a model: the delta's time beside the base GEMM that it comes on top of:"
    return f"{title}\n\n{table(heading, lines)}" if lines else ""


def gptq(rows: Sequence[Row]) -> str:
    found = latest(row for row in rows if row.op == "gptq" and row.us is not None)
    lines = []
    for key, row in found.items():
        if row.impl == "adamix":
            loop = found.get((*key[:-1], "torch loop"))
            lines.append([shape_of(row), row.path, row.bits, f"{(row.us or 0) / 1e3:.3g}",
                          f"{row.tflop_per_s:.1f}", percent(row.roof_share or 0),
                          f"{(loop.us or 0) / 1e3:.3g} ({(loop.us or 0) / (row.us or 1):.0f}×)"
                          if loop else ""])
    heading = ["rows × n", "order", "bits", "adamix, ms", "TFLOP/s", "of the fp32 roof",
               "torch loop, ms"]
    return f"`gptq`:\n\n{table(heading, lines)}" if lines else ""


def bitpack(rows: Sequence[Row]) -> str:
    found = [row for row in latest(rows).values()
             if row.op in ("pack", "unpack") and row.us is not None]
    if not found:
        return ""
    widths = sorted({row.bits for row in found}, key=int)
    lines = []
    for op, shape in dict.fromkeys((row.op, shape_of(row)) for row in found):
        by_width = {row.bits: row for row in found if (row.op, shape_of(row)) == (op, shape)}
        lines.append([f"`{op}`", shape, *(
            f"{by_width[bits].gb_per_s:.0f} ({percent(by_width[bits].roof_share or 0)})"
            if bits in by_width else "" for bits in widths)])
    heading = ["", "lanes × codes", *(f"{bits} bit{'s' * (bits != '1')}" for bits in widths)]
    title = "Codes to words and back: GB/s of codes and words, in brackets of the copy's:"
    return f"{title}\n\n{table(heading, lines)}"


def shape_of(row: Row) -> str:
    return row.shape.replace("x", " × ").replace("+", " + ")


def micros(us: float) -> str:
    return f"{us:.2f}" if us < 10 else f"{us:.1f}" if us < 100 else f"{us:.0f}"


def percent(share: float, digits: int = 0) -> str:
    return f"{share * 100:.{digits}f} %"


def ratio(rival: Row, us: float) -> str:
    if rival.us is None:
        return "out of memory" if "out of memory" in rival.note else "did not run"
    return f"{micros(rival.us)} ({rival.us / us:.1f}×)"


def origin(rows: Sequence[Row] | Sequence[ServingRow]) -> str:
    """Device, commit, date and commands of every row, in one line."""
    def every(field: str) -> list[str]:
        return list(dict.fromkeys(value for row in rows if (value := getattr(row, field))))

    commands = "; ".join(f"`{command}`" for command in sorted(every("command")))
    return (f"{', '.join(every('device'))}, commit {', '.join(every('commit'))}, "
            f"{', '.join(every('date'))}; {commands}")


TABLES = (ceilings, one_token, grouped, prefill, gptq, bitpack)
