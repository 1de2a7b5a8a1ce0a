"""What the commands print of their results: for programs, and for people."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from adamix import display
from adamix.config import SHORT_TEXT
from adamix.errors import ResumeError

if TYPE_CHECKING:
    from adamix.estimation import Estimate
    from adamix.evaluation import Evaluation
    from adamix.inspection import Inspection, KindRow
    from adamix.merging import MergeSummary
    from adamix.pipeline import Summary
    from adamix.storage.log import MatrixRow
    from adamix.tuning import TuneSummary


def summary_json(summary: Summary) -> dict[str, object]:
    worst = max(summary.rows, key=lambda row: row.relative_error, default=None)
    return {"out": str(summary.out), "bytes": summary.bytes, "bytes_16bit": summary.bytes_16bit,
            "ratio": summary.ratio, "kept_whole": summary.whole,
            "bytes_beside": summary.bytes_beside,
            "matrices": len(summary.rows), "mean_error": summary.relative_error,
            "worst_error": worst.relative_error if worst else None,
            "worst_matrix": worst.name if worst else None,
            "few_tokens": [row.name for row in _of_layer(summary)], "seconds": summary.seconds,
            "peak_bytes": summary.peak_bytes, "resumed": summary.resumed,
            "document_length": summary.document_length, "sample_from": summary.sample_from}


def show_summary(summary: Summary) -> None:
    size = display.bytes_text
    worst = max(summary.rows, key=lambda row: row.relative_error, default=None)
    errors = "no matrix differs"
    if worst is not None:
        errors = (f"mean {display.percent_text(summary.relative_error)}, worst "
                  f"{display.percent_text(worst.relative_error)} ({worst.name})")
    stages = ", ".join(f"{stage} {display.seconds_text(spent)}"
                       for stage, spent in summary.seconds.items())
    display.show_facts([
        ("wrote", str(summary.out)),
        ("size", f"{size(summary.bytes)}, everything counted: 1/{summary.ratio:.2f} of the "
                 f"{size(summary.bytes_16bit)} that differ"),
        *_kept_whole(summary.whole),
        ("beside it", f"{size(summary.bytes_beside)} of logs and copies, not needed to load"),
        ("output error", errors),
        *_short_texts(summary),
        *([("few tokens", f"{len(_of_layer(summary))} experts' matrices, calibrated by all tokens "
                          f"of their layer (gram in compression_log.csv)")]
          if _of_layer(summary) else []),
        *([("resumed", f"{summary.resumed} of {len(summary.rows)} matrices were finished before")]
          if summary.resumed else []),
        ("time", stages),
        ("peak memory", size(summary.peak_bytes))])


def _short_texts(summary: Summary) -> list[tuple[str, str]]:
    """A line on a fine-tune that writes hardly any text by itself."""
    if (summary.document_length or SHORT_TEXT) >= SHORT_TEXT:
        return []
    then = ("the base wrote half of what calibrates" if summary.sample_from == "both" else
            "try --sample-from both")
    return [("short texts", f"{summary.document_length:.1f} tokens in the mean are all that the "
                            f"fine-tune writes: {then}, or give --calibration FILE")]


def changed_json(done: TuneSummary | MergeSummary) -> dict[str, object]:
    return dataclasses.asdict(done) | {"out": str(done.out)}


def show_tuning(done: TuneSummary) -> None:
    change = f"{done.kl_before:.3g} nats a token before, {done.kl_after:.3g} after"
    display.show_facts([
        ("wrote", f"{done.out}: {display.bytes_text(done.bytes)}, as before"),
        ("trained", f"{done.scales} scales of {done.matrices} matrices on {done.tokens} tokens"),
        ("KL, held out", change if done.kept else f"{change}: the scales are left as they were"),
        ("time", display.seconds_text(done.seconds))])


def show_merging(done: MergeSummary) -> None:
    worst = f", worst {done.worst_rounding_error:.3g} ({done.worst_matrix})"
    display.show_facts([
        ("wrote", f"{done.out}: {done.tensors} tensors, {display.bytes_text(done.bytes)}"),
        (f"rounding to {done.dtype} adds", f"{done.rounding_error:.3g} of ‖Δ̂‖²"
         + (worst if done.worst_matrix else "")),
        ("time", display.seconds_text(done.seconds))])


@contextmanager
def kept_work(out: Path) -> Iterator[None]:
    """Where the block ends before `compress` has: a line on stderr on how to go on."""
    try:
        yield
    except ResumeError:  # says so itself
        raise
    except BaseException:
        from adamix.storage.work import count_finished, work_path

        if work_path(out).exists():
            print(f"adamix: {count_finished(out)} finished matrices are kept in {work_path(out)}: "
                  f"the same command goes on from there, with --restart it starts over",
                  file=sys.stderr)
        raise


def _of_layer(summary: Summary) -> list[MatrixRow]:
    """Experts' matrices that saw too few tokens."""
    return [row for row in summary.rows if row.gram == "layer"]


def estimate_json(found: Estimate) -> dict[str, object]:
    return {"bytes": found.bytes, "bytes_16bit": found.bytes_16bit, "ratio": found.ratio,
            "kept_whole": found.whole, "matrices": found.matrices, "threads": found.threads,
            "device": found.device, "seconds": found.seconds, "total_seconds": found.total_seconds,
            "memory": found.memory, "peak_bytes": found.peak_bytes, "gpu_bytes": found.gpu_bytes}


def show_estimate(found: Estimate) -> None:
    size = display.bytes_text
    stages = ", ".join(f"{stage} {display.seconds_text(spent)}"
                       for stage, spent in found.seconds.items())
    fullest = max(found.memory, key=found.memory.__getitem__)
    gpu, where = "none: compress works on the CPU", f"{found.threads} threads"
    if found.gpu_bytes:
        gpu, where = f"{size(found.gpu_bytes)} at most", f"{found.device} and {where}"
    display.show_facts([
        ("size", f"{size(found.bytes)}, everything counted: 1/{found.ratio:.2f} of the "
                 f"{size(found.bytes_16bit)} that differ if all of the fine-tune does"),
        *_kept_whole(found.whole),
        ("time", f"{display.seconds_text(found.total_seconds)} on {where}, to a factor of "
                 f"2: {stages}"),
        ("memory", f"{size(found.peak_bytes)} at most, in the stage: {fullest}"),
        ("GPU memory", gpu)])


def _kept_whole(whole: dict[str, int]) -> list[tuple[str, str]]:
    """A line on matrices that were not compressed, where there are any."""
    if not whole:
        return []
    largest = max(whole, key=whole.__getitem__)
    total = display.bytes_text(sum(whole.values()))
    return [("kept whole", f"{len(whole)} tensors, {total}, the largest {largest}")]


def show_inspection(found: Inspection) -> None:
    size, percent = display.bytes_text, display.percent_text
    calibration = ", ".join(f"{key} {value}" for key, value in found.calibration.items()
                            if key != "sha256")
    display.show_facts([
        ("delta", f"{found.path}: {size(found.bytes)}, 1/{found.ratio:.2f} of the "
                  f"{size(found.bytes_16bit)} that differ"),
        ("base", found.base), ("fine-tune", f"{found.finetuned} ({found.dtype})"),
        ("config", ", ".join(f"{key} {_brief(value)}" for key, value in found.config.items()
                             if value is not None)),
        ("calibration", calibration)])
    names = [row.kind.removesuffix(".weight").removeprefix("model.") for row in found.kinds]
    rows = [[name, str(row.tensors), f"{row.shape[0]}×{row.shape[1]}", f"{row.mean_rank:.0f}",
             size(row.bytes), f"{row.bits_per_weight:.3f}", percent(row.mean_error),
             percent(row.worst_error)] for name, row in zip(names, found.kinds, strict=True)]
    rows.append(["all", str(sum(row.tensors for row in found.kinds)), "", "",
                 size(found.bytes_matrices), f"{found.bits_per_weight:.3f}",
                 percent(found.mean_error), percent(found.worst_error)])
    display.show_table(["compressed", "tensors", "shape", "rank", "bytes", "bits/weight", "error",
                        "worst"], rows, last_is_total=True)
    _show_widths(dict(zip(names, found.kinds, strict=True)))
    display.show_facts([
        ("whole", f"{len(found.whole)} tensors, {size(found.bytes_whole)}"),
        ("extra rows", f"{sum(found.extra_rows.values())} in {len(found.extra_rows)} tensors, "
                       f"{size(found.bytes_extra_rows)}"),
        ("as in the base", f"{len(found.equal)} tensors"),
        ("tied", f"{len(found.tied)} tensors"),
        ("headers, config", size(found.bytes_overhead)),
        ("total", f"{size(found.bytes)} ({found.bytes} bytes)"),
        ("beside it", f"{size(found.bytes_beside)} of logs and copies")])


def _show_widths(kinds: dict[str, KindRow]) -> None:
    """Of each kind two rows: V's rows at each width, U's columns at each width."""
    widths = sorted({b for row in kinds.values() for b in (*row.v_widths, *row.u_widths)},
                    reverse=True)
    rows = []
    for name, row in kinds.items():
        for factor, counts in ((f"{name}, V", row.v_widths), (f"{name}, U", row.u_widths)):
            rows.append([factor, *(str(counts.get(bits, 0)) for bits in widths)])
    display.show_table(["rows of V, columns of U at", *(f"{bits} bit" for bits in widths)], rows)


def _brief(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def show_evaluation(found: Evaluation) -> None:
    models = (found.base, found.finetuned, found.compressed)
    number = display.number_text

    def row(title: str, field: str, show: object = number) -> list[str]:
        return [title, *("-" if scores is None else show(getattr(scores, field))  # type: ignore
                         for scores in models)]

    rows = []
    if found.text_tokens:
        rows += [row(f"perplexity ({found.text_tokens} tokens)", "perplexity"),
                 row("KL from the fine-tune, text (nats a token)", "kl_text")]
    if found.prompts:
        rows += [row("KL from the fine-tune, prompts (nats a token)", "kl_prompts"),
                 row(f"exact answers ({found.prompts} prompts)", "accuracy", display.percent_text)]
    rows.append(row("time", "seconds", display.seconds_text))
    display.show_table(["", "base", "fine-tune", "base + delta"], rows)
