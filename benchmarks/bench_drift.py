"""Does it pay to correct each layer for the drift of the layers before it? Pairs block by block.

    python benchmarks/bench_drift.py --base examples/base --finetunes examples/finetuned \\
        --asked examples/eval.jsonl --text examples/heldout_text.jsonl --ratios 16 32
    python benchmarks/bench_drift.py --base BASE --finetunes PAIR --ratios 32 --sequences 16 \\
        --length 128 --no-answers

Layers are compressed in the order of the forward pass. With X the input of a layer in the fine-tune
and X̂ that in the model whose layers before it are base + compressed delta already:

- `as now`: ΔW with H = X Xᵀ; what `adamix.compress` does, to the bit;
- `inputs of the compressed model`: ΔW with Ĥ = X̂ X̂ᵀ;
- `drift, share a, damping d`: the output W X of the fine-tune is asked of X̂ (asymmetric
  calibration, as GPTAQ and QEP have it). With W = W_base + ΔW

      Δ* = ΔW + a W (X − X̂) X̂ᵀ (X̂ X̂ᵀ + λ I)⁻¹,  λ = d · mean diagonal

  is compressed with Ĥ: at a = 1 it minimizes ‖(W_base + Δ) X̂ − W X‖² + λ ‖Δ − ΔW‖²;
- `residual`: o_proj and down_proj also make up for the drift of the residual stream that their
  output is added to, W X + (h − ĥ) in the place of W X;
- `writers`: only o_proj and down_proj are corrected; `own inputs`: Δ* with H = X Xᵀ;
- `scales`: ΔW is compressed as now, then its scales alone make up for the drift.

All else is as preset `adamix` stores it, and no matrix takes more bytes than there. KL on the
calibration's own tokens says what of a gain is not held out.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import transformers
from accuracy_models import Compression, Result
from bench_accuracy import Bench, Questions, trying_arguments
from drift_models import WRITERS, Drifting, Variant
from rows import AccuracyRow

from adamix.evaluation import Window, score_windows

CALIBRATION_WINDOWS = 16  # sequences of the calibration that are scored
AS_NOW = "as now"
VARIANTS = {
    AS_NOW: Variant(own_inputs=True),
    "inputs of the compressed model": Variant(),
    **{f"drift, share {share:g}, damping {damping:g}": Variant(share=share, damping=damping)
       for share in (0.5, 1.0) for damping in (0.01, 0.1, 1.0)},
    "drift, own inputs, share 0.5": Variant(own_inputs=True, share=0.5),
    "drift, own inputs": Variant(own_inputs=True, share=1.0),
    "drift, writers, share 0.5": Variant(share=0.5, kinds=WRITERS),
    "drift, writers": Variant(share=1.0, kinds=WRITERS),
    "drift, residual, share 0.5": Variant(share=0.5, residual=1.0),
    "drift, residual": Variant(share=1.0, residual=1.0),
    "drift, residual, damping 0.01": Variant(share=1.0, residual=1.0, damping=0.01),
    "drift, residual, damping 1": Variant(share=1.0, residual=1.0, damping=1.0),
    "drift, residual, writers, share 0.5": Variant(share=0.5, residual=1.0, kinds=WRITERS),
    "drift, residual, writers": Variant(share=1.0, residual=1.0, kinds=WRITERS),
    "drift, scales": Variant(own_inputs=True, share=1.0, scales=True),
    "drift, scales, residual": Variant(own_inputs=True, share=1.0, scales=True, residual=1.0),
}


class Drift(Bench):
    """The variants on each fine-tune, with every seed and ratio."""

    def finetune(self, folder: Path) -> None:
        pair, _ = self.pair(folder)
        base, reference = self.load(self.args.base), self.load(folder)
        questions = self.questions(reference, pair.family)
        for seed in self.args.seeds:
            with tempfile.TemporaryDirectory(prefix="adamix-drift-") as made:
                compression = self.compression(folder, base, reference, questions, seed,
                                               Path(made))
                self.gram_seconds = None
                for ratio in self.args.ratios:
                    self._variants(replace(pair, seed=seed, ratio=ratio), compression, questions)

    def _variants(self, pair: AccuracyRow, compression: Compression, questions: Questions) -> None:
        drifting = Drifting(compression, pair.ratio)
        if self.gram_seconds is None:
            start = time.perf_counter()
            assert compression.grams
            self.gram_seconds = time.perf_counter() - start
        for name in self.args.variants:
            row, tuned = replace(pair, method=name), replace(pair, method=f"{name}, tuned")
            if not (self.missing(row) or self.args.tuned and self.missing(tuned)):
                continue
            start = time.perf_counter() - self.gram_seconds * VARIANTS[name].own_inputs
            made = drifting.packed(VARIANTS[name])
            result = drifting.result(made, start)
            if self.missing(row):
                self.write(self.scored(row, questions, result, compression))
            if self.args.tuned:
                with tempfile.TemporaryDirectory(prefix="adamix-drift-") as folder:
                    result = drifting.tuned(made, Path(folder))
                    self.write(self.scored(tuned, questions, result, compression))
            del result
            gc.collect()

    gram_seconds: float | None = None  # of the fine-tune's Gram matrices

    def scored(self, row: AccuracyRow, questions: Questions, result: Result,
               compression: Compression) -> AccuracyRow:
        """The row with errors, KLs and, unless left out, answers."""
        reference, model = compression.reference, result.model

        def kl(windows: list[Window]) -> float | None:
            return score_windows(model, windows, reference)[1]

        own = [Window(ids, 1) for ids in compression.tokens[:CALIBRATION_WINDOWS]]
        row = replace(row, bytes=result.bytes, error=result.error,
                      error_held_out=result.error_held_out, seconds=result.seconds,
                      note=f"KL calibration {kl(own):.4g}")
        if self.args.no_answers:
            return replace(row, kl_prompts=kl(questions.answered), kl_text=kl(questions.text))
        return questions.score(row, model, reference)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    trying_arguments(parser)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, metavar="NAME",
                        default=list(VARIANTS))
    parser.add_argument("--no-answers", action="store_true", help="KL alone")
    parser.add_argument("--tuned", action="store_true", help="and each after `adamix.tune`")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    transformers.utils.logging.disable_progress_bar()
    bench = Drift(args, "bench_drift.py")
    for folder in args.finetunes:
        bench.finetune(folder)


if __name__ == "__main__":
    main()
