"""The command line. Heavy imports stand inside the commands, so that `--help` is quick."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperGroup

from adamix import display, reports
from adamix.arguments import (
    Allocate,
    AsJson,
    Base,
    Bits,
    Calibration,
    Decomposed,
    Delta,
    Device,
    Dtype,
    Embeddings,
    Finetuned,
    Gain,
    Length,
    MaxMemory,
    Passes,
    Predicted,
    Preset,
    Ratio,
    Restart,
    SampleFrom,
    SeparateWidths,
    Sequences,
    Solver,
    StartingPoint,
    Threads,
    Unbiased,
    Vision,
    Widths,
    configuration,
    in_bytes,
)
from adamix.environment import is_launched, rank_here
from adamix.errors import AdamixError
from adamix.version import __version__

INTERRUPTED = 130  # as shells report a process that Ctrl-C ended


class OneLineErrors(TyperGroup):
    """A user's fault is one line on stderr and exit code 1; Ctrl-C one line and 130."""

    def invoke(self, ctx: typer.Context) -> object:
        try:
            return super().invoke(ctx)
        except (AdamixError, OSError) as error:
            if getattr(error, "errno", None) == errno.EPIPE:
                raise
            _fail(str(error))
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            _fail("interrupted")
            raise typer.Exit(INTERRUPTED) from error


def _fail(reason: str) -> None:
    print(f"adamix: error: {' '.join(reason.split())}", file=sys.stderr)


app = typer.Typer(cls=OneLineErrors, no_args_is_help=True, add_completion=False,
                  pretty_exceptions_enable=False, rich_markup_mode=None,
                  help="Compress the difference between a fine-tuned model and its base, "
                       "and serve it.")

def main() -> None:
    """The console script. Of several processes that torchrun started the first one alone speaks."""
    if not is_launched():
        app(prog_name="adamix")
        return
    status: object = 1
    try:
        with open(os.devnull, "w") as nowhere:
            if rank_here():
                sys.stdout = sys.stderr = nowhere
            app(prog_name="adamix")
    except SystemExit as ended:
        status = ended.code
    except BaseException:  # a fault of ours, which is looked for where it is
        traceback.print_exc(file=sys.__stderr__)
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    if status:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 1)  # threads may wait for those that ended


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"adamix {__version__}")
        raise typer.Exit


@app.callback()
def _root(version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True,
                                                help="Print the version.")] = False) -> None:
    pass


@app.command()
def compress(
    base: Base,
    finetuned: Finetuned,
    out: Annotated[Path, typer.Option("--out", "-o", help="Delta folder to write.")],
    ratio: Ratio = None,
    bits: Bits = None,
    preset: StartingPoint = Preset.adamix,
    calibration: Calibration = None,
    sample_from: SampleFrom = None,
    sequences: Sequences = None,
    length: Length = None,
    seed: Annotated[int | None, typer.Option(help="Of the calibration's sampling.")] = None,
    threads: Threads = None,
    passes: Passes = None,
    widths: Widths = None,
    max_widths: Annotated[int | None, typer.Option(
        help="Different widths in one matrix at most, 0 bits counted.")] = None,
    separate_widths: SeparateWidths = None,
    decomposition: Decomposed = None,
    objective: Predicted = None,
    correction: Annotated[bool | None, typer.Option(
        "--correction/--no-correction", help="Solve for U again once V is quantized.")] = None,
    allocate: Allocate = None,
    solver: Annotated[Solver | None, typer.Option(help="Of the integer program.")] = None,
    damping: Annotated[float | None, typer.Option(help="Of the Hessian, in (0, 1).")] = None,
    unbiased: Unbiased = None,
    gain: Gain = None,
    svd_damping: Annotated[float | None, typer.Option(
        help="What the SVD adds to that, in [0, 1).")] = None,
    embeddings: Embeddings = None,
    vision: Vision = None,
    device: Device = None,
    max_memory: MaxMemory = None,
    restart: Restart = False,
    as_json: AsJson = False,
) -> None:
    """Compress FINETUNED's difference from BASE into a delta folder.

    With several GPUs, or machines: torchrun --nproc-per-node N -m adamix compress ..
    """
    config = configuration(
        preset, widths, ratio=ratio, bits_per_weight=bits, calibration_sequences=sequences,
        calibration_length=length, sample_from=sample_from, seed=seed, passes=passes, solver=solver,
        separate_widths=separate_widths, max_widths=max_widths, decomposition=decomposition,
        objective=objective, correction=correction, allocate=allocate, damping=damping,
        svd_damping=svd_damping, unbiased=unbiased, gain=gain, embeddings=embeddings, vision=vision)
    _quiet()
    from adamix.pipeline import compress as run

    with reports.kept_work(out), display.shown_progress() as progress:
        summary = run(base, finetuned, out, config, calibration=calibration, threads=threads,
                      device=device, max_memory=in_bytes(max_memory), restart=restart,
                      progress=progress)
    if as_json:
        display.show_json(reports.summary_json(summary))
    else:
        reports.show_summary(summary)


@app.command()
def estimate(
    base: Base,
    finetuned: Finetuned,
    ratio: Ratio = None,
    bits: Bits = None,
    preset: StartingPoint = Preset.adamix,
    calibration: Calibration = None,
    sample_from: SampleFrom = None,
    sequences: Sequences = None,
    length: Length = None,
    threads: Threads = None,
    passes: Passes = None,
    widths: Widths = None,
    allocate: Allocate = None,
    embeddings: Embeddings = None,
    device: Device = None,
    max_memory: MaxMemory = None,
    as_json: AsJson = False,
) -> None:
    """Say what `compress` would take: time, memory and size, from headers and configs alone."""
    config = configuration(
        preset, widths, ratio=ratio, bits_per_weight=bits, calibration_sequences=sequences,
        calibration_length=length, sample_from=sample_from, passes=passes, allocate=allocate,
        embeddings=embeddings)
    _quiet()
    from adamix.estimation import estimate as run

    found = run(base, finetuned, config, calibration=calibration, threads=threads, device=device,
                max_memory=in_bytes(max_memory))
    if as_json:
        display.show_json(reports.estimate_json(found))
    else:
        reports.show_estimate(found)


@app.command()
def inspect(
    delta: Delta,
    plot: Annotated[Path | None, typer.Option(
        help="Draw the bits by layer: a .png, or a folder for all pictures.")] = None,
    matrix: Annotated[str | None, typer.Option(
        help="Whose singular values to draw [default: the last q_proj].")] = None,
    as_json: AsJson = False,
) -> None:
    """Show where a delta's bytes go and what they cost in exactness."""
    from adamix.inspection import inspect as run

    found = run(delta)
    drawn: list[Path] = []
    if plot is not None:
        try:
            from adamix.plots import plot_delta
        except ImportError as error:
            raise AdamixError(f"pictures need matplotlib: pip install adamix[plot] ({error})"
                              ) from error
        drawn = plot_delta(delta, plot, matrix=matrix)
    if as_json:
        display.show_json(found.to_dict() | {"plots": [str(path) for path in drawn]})
        return
    reports.show_inspection(found)
    for path in drawn:
        print(f"wrote {path}")


@app.command()
def evaluate(
    base: Base,
    finetuned: Finetuned,
    delta: Annotated[Path | None, typer.Argument(help="A delta folder.")] = None,
    prompts: Annotated[Path | None, typer.Option(
        help='.jsonl of {"prompt", "answer"}: share of exact answers.')] = None,
    text: Annotated[Path | None, typer.Option(help="Text file: perplexity.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Prompts at most.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 32,
    batch: Annotated[int, typer.Option(min=1, help="Prompts at a time.")] = 16,
    as_json: AsJson = False,
) -> None:
    """Score base, fine-tune and base + delta on the same prompts and text."""
    if prompts is None and text is None:
        raise typer.BadParameter("nothing to measure: give --prompts, --text, or both")
    _quiet()
    from adamix.evaluation import evaluate as run

    with display.shown_progress() as progress:
        found = run(base, finetuned, delta, prompts=prompts, text=text, limit=limit,
                    max_new_tokens=max_new_tokens, batch_size=batch, progress=progress)
    if as_json:
        display.show_json(found.to_dict())
    else:
        reports.show_evaluation(found)


@app.command()
def tune(
    base: Base,
    finetuned: Finetuned,
    delta: Delta,
    out: Annotated[Path, typer.Option("--out", "-o", help="Delta folder to write.")],
    calibration: Annotated[str | None, typer.Option(
        help="What to train on, as for compress [default: the tokens that calibrated].")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Of training.")] = 200,
    seed: Annotated[int, typer.Option(help="Of the order of the samples.")] = 0,
    device: Annotated[str | None, typer.Option(
        help="cpu, cuda or cuda:N [default: a GPU where there is one].")] = None,
    dtype: Annotated[Dtype, typer.Option(
        help="That both models compute in: float32 or bfloat16.")] = Dtype.float32,
    as_json: AsJson = False,
) -> None:
    """Train a delta's scales through the whole model: nearer to FINETUNED, at the same bytes."""
    if dtype is Dtype.float16:
        raise typer.BadParameter("--dtype must be float32 or bfloat16, got float16")
    _quiet()
    from adamix.tuning import tune as run

    with display.shown_progress() as progress:
        done = run(base, finetuned, delta, out, calibration=calibration, steps=steps, seed=seed,
                   device=device, dtype=dtype.value, progress=progress)
    (display.show_json(reports.changed_json(done)) if as_json else reports.show_tuning(done))


@app.command()
def merge(
    base: Base,
    delta: Delta,
    out: Annotated[Path, typer.Option("--out", "-o", help="Checkpoint folder to write.")],
    dtype: Annotated[Dtype | None, typer.Option(
        help="Of all weights [default: the fine-tune's].")] = None,
    as_json: AsJson = False,
) -> None:
    """Write the restored fine-tune as an ordinary Hugging Face checkpoint."""
    _quiet()
    from adamix.merging import merge as run

    with display.shown_progress() as progress:
        done = run(base, delta, out, dtype=dtype.value if dtype else None, progress=progress)
    (display.show_json(reports.changed_json(done)) if as_json else reports.show_merging(done))


@app.command()
def generate(
    base: Base,
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="Texts to go on from.")],
    delta: Annotated[list[str] | None, typer.Option(
        metavar="[NAME=]PATH", help="A delta folder to add to BASE; several answer side by side, "
                                    "in one batch, one prompt each or all the same.")] = None,
    with_base: Annotated[bool, typer.Option(
        "--with-base", help="BASE answers too, first.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="At most.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the drawing.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ..")] = "cpu",
    dtype: Annotated[Dtype, typer.Option(help="Of the model.")] = Dtype.float32,
    as_json: AsJson = False,
) -> None:
    """Let BASE and fine-tunes of it go on from prompts."""
    deltas = _named(delta)
    _quiet()
    import torch

    from adamix.generation import generate as run

    torch.manual_seed(seed)
    written = run(base, deltas, prompts, with_base=with_base, max_new_tokens=max_new_tokens,
                  temperature=temperature, device=device, dtype=getattr(torch, dtype.value))
    if as_json:
        display.show_json({"generations": [vars(one) for one in written]})
        return
    several = len({one.finetune for one in written}) > 1
    for one in written:
        print((f"[{one.finetune or 'base'}] " if several else "") + f"{one.prompt}{one.text}")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    base: Base,
    delta: Annotated[list[str] | None, typer.Option(
        metavar="[NAME=]PATH", help="A delta folder, and the model name that asks for it.")] = None,
    slots: Annotated[int | None, typer.Option(
        min=1, help="Fine-tunes in one batch at most [default: all, up to 8].")] = None,
    capacity_bytes: Annotated[int | None, typer.Option(
        min=1, help="Of all slots on a device [default: 1/15 of the 16-bit layers each].")] = None,
    max_rank: Annotated[int | None, typer.Option(
        min=1, help="Components of a matrix at most [default: what 1/16 can have].")] = None,
    strict: Annotated[bool, typer.Option(
        "--strict", help="Refuse fine-tunes of which vLLM cannot route everything.")] = False,
) -> None:
    """Serve BASE and its fine-tunes by vLLM's OpenAI server, which takes all other options."""
    deltas = _named(delta)
    from adamix.engines.vllm_server import serve as run

    run(base, deltas, context.args, slots=slots, capacity_bytes=capacity_bytes, max_rank=max_rank,
        strict=strict)


def _named(given: list[str] | None) -> dict[str, str]:
    """`[NAME=]PATH` each -> {name: path}; a folder's own name where none is given."""
    deltas: dict[str, str] = {}
    for text in given or []:
        name, _, path = text.partition("=") if "=" in text else (Path(text).name, "", text)
        if name in deltas:
            raise typer.BadParameter(f"two deltas are called {name}: give names, --delta NAME=PATH")
        deltas[name] = path
    return deltas


def _quiet() -> None:
    """Keep transformers' own bars and warnings out of ours."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


if __name__ == "__main__":
    main()
