"""What several commands take, as typer reads it from their signatures."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from adamix.config import Config


class Preset(str, Enum):
    adamix = "adamix"
    paper = "paper"


class Decomposition(str, Enum):
    output_aware = "output-aware"
    plain = "plain"


class Objective(str, Enum):
    v_and_u = "v+u"
    v = "v"


class Solver(str, Enum):
    highs = "highs"
    cbc = "cbc"


class Allocation(str, Enum):
    matrix = "matrix"
    model = "model"


class Writer(str, Enum):
    auto = "auto"
    finetuned = "finetuned"
    both = "both"
    base = "base"


class Dtype(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Base = Annotated[str, typer.Argument(help="Base model: a folder or a Hugging Face name.")]
Finetuned = Annotated[str, typer.Argument(help="Fine-tuned model: a folder or a name.")]
Delta = Annotated[Path, typer.Argument(help="A delta folder that `compress` wrote.")]
MaxMemory = Annotated[float | None, typer.Option(
    metavar="GB", help="Memory that a process keeps to; the result is the same [default: no "
                       "bound].")]
Device = Annotated[str | None, typer.Option(
    help="cpu, cuda or cuda:N [default: a GPU where there is one; under torchrun one each].")]
Restart = Annotated[bool, typer.Option(
    "--restart", help="Throw away what an interrupted run has left, and begin anew.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object only.")]
Unbiased = Annotated[bool | None, typer.Option(
    "--unbiased/--no-unbiased", help="Scales make up for what rounding takes off.")]
Gain = Annotated[float | None, typer.Option(
    help="How much more of it: a power of the factors, in [0, 2]; above 1 less KL of the model for "
         "more error of each matrix [default: 1].")]
Ratio = Annotated[float | None, typer.Option(
    help="16-bit size over compressed size, everything counted [default: 16].")]
Bits = Annotated[float | None, typer.Option(help="Bits a weight instead of --ratio.")]
StartingPoint = Annotated[Preset, typer.Option(help="The starting point of all other options.")]
Calibration = Annotated[str | None, typer.Option(
    help="Text or .jsonl file, token ids (.npy, .safetensors), or dataset [default: what "
         "--sample-from writes].")]
SampleFrom = Annotated[Writer | None, typer.Option(
    help="Who writes the calibration text where none is given: the fine-tune, the base, both (half "
         "of it each), or auto: the fine-tune, and both where its texts are short "
         "[default: auto].")]
Sequences = Annotated[int | None, typer.Option(help="Calibration sequences.")]
Length = Annotated[int | None, typer.Option(help="Tokens of a calibration sequence.")]
Threads = Annotated[int | None, typer.Option(
    min=1, help="Matrices at a time; the result is the same [default: all cores; under torchrun "
                "each process's share of them].")]
Passes = Annotated[int | None, typer.Option(help="How often U is quantized.")]
Widths = Annotated[str | None, typer.Option(help="Bit-widths to choose from: 8,4,3,2.")]
SeparateWidths = Annotated[bool | None, typer.Option(
    "--separate-widths/--no-separate-widths",
    help="A width each for a component's row of V and column of U, or one for both.")]
Decomposed = Annotated[Decomposition | None, typer.Option(
    help="SVD of the output's change, or of the plain difference.")]
Predicted = Annotated[Objective | None, typer.Option(help="Error of both factors, or of V alone.")]
Allocate = Annotated[Allocation | None, typer.Option(
    help="One ratio for every matrix, or one budget for all, spent where it lowers the error most "
         "(twice the time).")]
Embeddings = Annotated[bool | None, typer.Option(
    "--embeddings/--no-embeddings", help="Compress embedding and head, or keep them whole.")]

Vision = Annotated[bool | None, typer.Option(
    "--vision/--no-vision", help="Compress a vision tower, or keep it whole.")]


def configuration(preset: Preset, widths: str | None, **choices: object) -> Config:
    """The preset with the choices that were made, those that are not None."""
    choices["bit_widths"] = _widths(widths)
    given = {name: value.value if isinstance(value, Enum) else value
             for name, value in choices.items() if value is not None}
    try:
        return Config.preset(preset.value, **given)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def in_bytes(gigabytes: float | None) -> int | None:
    """`--max-memory` as the library takes it."""
    return None if gigabytes is None else int(1e9 * gigabytes)


def _widths(text: str | None) -> tuple[int, ...] | None:
    try:
        return None if text is None else tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"--widths must be numbers like 8,4,3,2, got {text!r}") from None
