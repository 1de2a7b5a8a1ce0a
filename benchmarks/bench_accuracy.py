"""Accuracy and KL of compressed fine-tunes by method and ratio, on pairs of train_pair.py.

    python benchmarks/bench_accuracy.py --base BASE --finetunes PAIR .. --lora LORA .. \\
        --csv benchmarks/results/accuracy.csv
    python benchmarks/bench_accuracy.py --base examples/base --finetunes examples/finetuned \\
        --asked examples/eval.jsonl --text examples/heldout_text.jsonl    # a pair of other making
    python benchmarks/bench_accuracy.py --table      # the tables, from the rows alone

Greedy answers to held-out prompts, exact or wrong; KL(fine-tune ‖ model) a token on these prompts
with their answers and on general text; relative error of the blocks' outputs on the calibration's
inputs and on those of the prompts. Methods: this project's presets, and by their names those of
`methods/`. All models compute in fp32. Rows that the CSV has are not measured again, so a run that
was cut short goes on.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from accuracy_models import DISTILLED, PRESETS, Compression, NoSuchSize, Result, model_bytes
from accuracy_tables import BASE, FINETUNE, LORA, ROWS, markdown
from questions import Questions
from rows import AccuracyRow, append_row, command_of, commit, read_rows
from train_pair import RECORD
from transformers import PreTrainedModel

import adamix
from adamix.arguments import Writer
from adamix.errors import BudgetError
from adamix.generation import tokenizer_of
from adamix.source.models import load_model


class Bench:
    """The rows that are there, and the measuring of those that are not."""

    def __init__(self, args: argparse.Namespace, program: str = "bench_accuracy.py") -> None:
        self.args = args
        self.device = torch.device(
            args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        there = read_rows([args.csv], AccuracyRow) if args.csv and args.csv.exists() else []
        self.done = {row.key for row in there}
        self.deadline = time.monotonic() + 60 * args.minutes
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        self.origin = {"device": name, "commit": commit(Path(__file__).parent),
                       "command": command_of([program, *sys.argv[1:]]),
                       "date": date.today().isoformat()}

    def missing(self, row: AccuracyRow) -> bool:
        """Whether to measure this row, in the time that is left."""
        return row.key not in self.done and time.monotonic() < self.deadline

    def write(self, row: AccuracyRow) -> None:
        row = replace(row, **self.origin)
        self.done.add(row.key)
        if self.args.csv:
            append_row(self.args.csv, row)
        ratio = "" if row.ratio is None else f" 1/{row.ratio:g}"
        shown = [f"{name} {value:.4g}" for name, value in (
            ("right %", row.accuracy), ("KL prompts", row.kl_prompts), ("KL text", row.kl_text),
            ("error", row.error), ("held out", row.error_held_out),
            ("MB", row.bytes and row.bytes / 1e6), ("seconds", row.seconds)) if value is not None]
        seed = "" if row.seed is None else f" seed {row.seed}"
        print(f"{row.family} {row.method}{ratio}{seed}: {', '.join(shown)} {row.note}", flush=True)

    def load(self, folder: Path) -> PreTrainedModel:
        return load_model(folder).to(self.device)

    def pair(self, folder: Path) -> tuple[AccuracyRow, dict[str, Any]]:
        """A row of the pair's, and what its training.json says. A pair whose questions are in a
        file needs none, and is called after the folder that has its base."""
        if self.args.asked is None:
            training = json.loads((folder / RECORD).read_text())
            name, family = self.args.base.name, training["family"]
        else:
            training = {"seed": 0, "seconds": None}
            name, family = self.args.base.resolve().parent.name, ""
        return AccuracyRow(name, family, BASE, None, training["seed"], None), training

    def questions(self, model: PreTrainedModel, family: str) -> Questions:
        return Questions.of(tokenizer_of([self.args.base]), self.args.asked or family,
                            self.args.prompts, self.args.text,
                            model.config.max_position_embeddings)

    def compression(self, folder: Path, base: PreTrainedModel, reference: PreTrainedModel,
                    questions: Questions, seed: int, made: Path) -> Compression:
        """A fine-tune calibrated with one seed; `made` takes delta folders."""
        return Compression(self.args.base, folder, base, reference, self.config(seed), made,
                           [window.ids for window in questions.answered])

    def config(self, seed: int) -> adamix.Config:
        """What calibrates, with one seed."""
        return adamix.Config(seed=seed, calibration_sequences=self.args.sequences,
                             calibration_length=self.args.length,
                             sample_from=self.args.sample_from, gain=self.args.gain)

    def finetune(self, folder: Path) -> None:
        """All methods, ratios and seeds on one fine-tune, and what stands at both ends."""
        start, training = self.pair(folder)
        base, reference = self.load(self.args.base), self.load(folder)
        questions = self.questions(reference, start.family)
        if self.missing(start):
            self.write(questions.score(start, base, reference))
        end = replace(start, method=FINETUNE, bytes=model_bytes(reference),
                      seconds=training["seconds"])
        if self.missing(end):
            self.write(questions.score(end, reference, None))
        for seed in self.args.seeds:
            with tempfile.TemporaryDirectory(prefix="adamix-accuracy-") as made:
                compression = self.compression(folder, base, reference, questions, seed,
                                               Path(made))
                self._methods(replace(start, seed=seed), compression, questions, reference)

    def _methods(self, start: AccuracyRow, compression: Compression, questions: Questions,
                 reference: PreTrainedModel) -> None:
        for name, ratio in runs(self.args.methods, self.args.ratios):
            row = replace(start, method=name, ratio=ratio)
            if not self.missing(row):
                continue
            try:
                result = restored(compression, name, ratio)
            except (NoSuchSize, BudgetError) as error:
                self.write(replace(row, note=str(error)))
                continue
            note = "one size" if name in one_size() else ""
            row = replace(row, bytes=result.bytes, error=result.error,
                          error_held_out=result.error_held_out, seconds=result.seconds, note=note)
            self.write(questions.score(row, result.model, reference))
            del result
            gc.collect()

    def lora(self, folder: Path) -> None:
        """A LoRA, at that of the ratios which is nearest to its size."""
        start, training = self.pair(folder)
        if not training.get("lora"):
            raise SystemExit(f"{folder} is no LoRA's: name it after --finetunes")
        model = self.load(folder)
        exact = model_bytes(model) / training["adapter_bytes"]
        ratio = min(self.args.ratios, key=lambda ratio: abs(math.log(ratio / exact)))
        row = replace(start, method=LORA, ratio=ratio, bytes=training["adapter_bytes"],
                      seconds=training["seconds"], note=f"rank {training['lora']}")
        if self.missing(row):
            self.write(self.questions(model, row.family).score(row, model, None))


def runs(names: list[str], ratios: list[float]) -> Iterator[tuple[str, float]]:
    """Every method at every ratio; one of a single size once, the rest of the model as at the
    first ratio.

    Raises:
        SystemExit: a name is neither a preset's nor one of `methods/`.
    """
    fixed = one_size()
    known = [*PRESETS, *other_methods()[0], *fixed]
    for name in names:
        if name not in known:
            raise SystemExit(f"no method {name!r}: it is one of {'; '.join(known)}")
    yield from ((name, ratio) for ratio in ratios for name in names
                if name not in fixed or ratio == ratios[0])


def restored(compression: Compression, name: str, ratio: float) -> Result:
    """The fine-tune as a method gives it back."""
    if name in PRESETS:
        return compression.by_preset(name, ratio)
    if name == DISTILLED:
        return compression.by_distillation(ratio)
    fit, fixed = other_methods()
    return compression.by_method((fit | fixed)[name], ratio, one_size=name in fixed)


def other_methods() -> tuple[dict[str, Callable[..., object]], dict[str, Callable[..., object]]]:
    """Those of `methods/`, where that is here: that fit any budget, and that have one size."""
    try:
        from methods import FIXED, METHODS
    except ImportError:
        return {}, {}
    return dict(METHODS), dict(FIXED)


def one_size() -> list[str]:
    """The methods that have one size, whatever the ratio."""
    return [DISTILLED, *other_methods()[1]]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, help="folder of the base")
    parser.add_argument("--finetunes", type=Path, nargs="+", default=[],
                        help=f"folders with a {RECORD}, to compress")
    parser.add_argument("--lora", type=Path, nargs="+", default=[],
                        help="folders of LoRAs, to stand beside")
    parser.add_argument("--methods", nargs="+", default=list(PRESETS), metavar="NAME")
    parser.add_argument("--ratios", type=float, nargs="+", default=[16.0, 32.0, 64.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2],
                        help="of the calibration")
    measuring_arguments(parser)
    parser.add_argument("--csv", type=Path, help="append the rows here")
    parser.add_argument("--table", type=Path, nargs="*", metavar="CSV",
                        help="print the Markdown of these rows")
    args = parser.parse_args(arguments)
    if args.table is None and args.base is None:
        parser.error("--base: the base's folder")
    return args


def trying_arguments(parser: argparse.ArgumentParser) -> None:
    """Of what compares variants of this project's own, on a CPU: pairs, sizes, seeds, and the rest.
    """
    parser.add_argument("--base", type=Path, required=True, help="folder of the base")
    parser.add_argument("--finetunes", type=Path, nargs="+", required=True,
                        help=f"folders with a {RECORD}, or of pairs that --asked is for")
    parser.add_argument("--ratios", type=float, nargs="+", default=[16.0, 32.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the calibration")
    measuring_arguments(parser)
    parser.set_defaults(device="cpu")
    parser.add_argument("--csv", type=Path, help="append the rows here")


def measuring_arguments(parser: argparse.ArgumentParser) -> None:
    """What calibrates, what is asked, where and for how long."""
    parser.add_argument("--prompts", type=int, default=500, help="held-out ones")
    parser.add_argument("--asked", type=Path, metavar="JSONL",
                        help=f"prompts and answers of pairs without a {RECORD}")
    parser.add_argument("--text", type=Path, help="a file of general text, for KL")
    parser.add_argument("--sequences", type=int, default=128, help="that calibrate")
    parser.add_argument("--length", type=int, default=256, help="tokens of each")
    parser.add_argument("--sample-from", default="auto", choices=[one.value for one in Writer],
                        help="who writes these")
    parser.add_argument("--gain", type=float, default=1.0, help="of this project's scales")
    parser.add_argument("--device", help="default: a GPU where there is one")
    parser.add_argument("--minutes", type=float, default=math.inf,
                        help="begin nothing after these")


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    if args.table is not None:
        print(markdown(read_rows(args.table or [ROWS], AccuracyRow)))
        return
    bench = Bench(args)
    for folder in args.finetunes:
        bench.finetune(folder)
    for folder in args.lora:
        bench.lora(folder)


if __name__ == "__main__":
    main()
