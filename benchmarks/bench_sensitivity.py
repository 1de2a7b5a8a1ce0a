"""Does it pay to share one budget out by what a matrix's error costs the model?

    python benchmarks/bench_sensitivity.py --base examples/base --finetunes examples/finetuned \\
        --asked examples/eval.jsonl --text examples/heldout_text.jsonl --ratios 16 32 64

KL(fine-tune ‖ model) a token is, to second order in the errors E of the matrices and where those
are as good as random,

    ½ Σ over matrices of  mean ‖E x‖² · mean ‖G‖² / (‖x‖² out tokens),

x the inputs of a matrix and G the gradient of its weights, of the log-likelihood of a sequence that
the fine-tune would write (Fisher information with a scalar for each matrix). `one ratio` and
`one budget` are `--allocate matrix` and `model`; the latter adds errors mean ‖E x‖² / mean x² of
the outputs alone. `sensitive, power p` is one budget for all too, with relative errors weighted by
(the KL were all of ΔW missing)^p: 1 is the sum above, 0 no more than their own.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
import transformers
from bench_accuracy import Bench, trying_arguments
from questions import Questions
from rows import AccuracyRow
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

import adamix
from adamix import matrices
from adamix.compression.share import share_out
from adamix.merging import restored_model
from adamix.storage.log import TOKENS_FILE

RATIO, BUDGET = "one ratio", "one budget"


def sensitivities(model: PreTrainedModel, tokens: Tensor) -> dict[str, float]:
    """{a matrix: KL a token for an error of its output of 1}, in the unit of `share_out`: errors
    summed over outputs, for inputs of mean square one; of an embedding over the rows, which weigh 1
    in the mean. Gradients are those of whole sequences, as an error is the same at every token."""
    weights = {name: weight for name, weight in model.named_parameters() if weight.dim() == 2}
    squares = dict.fromkeys(weights, 0.0)
    model.requires_grad_(False)
    generator = torch.Generator(model.device).manual_seed(0)
    for weight in weights.values():
        weight.requires_grad_(True)
    for ids in tokens.to(model.device).split(1):
        likely = model(input_ids=ids, use_cache=False).logits.float().log_softmax(dim=-1)
        drawn = torch.multinomial(likely.detach().exp()[0], 1, generator=generator)
        likely[0].gather(-1, drawn).sum().backward()
        for name, weight in weights.items():
            squares[name] += weight.grad.square().sum(dtype=torch.float64).item()
            weight.grad = None
    model.requires_grad_(False)
    return {name: 0.5 * squares[name] / (tokens.numel() * weight.numel())
            for name, weight in weights.items()}


@contextmanager
def shared_by(costs: Mapping[str, float], power: float) -> Iterator[None]:
    """`allocate="model"` with weighted errors, in the block."""
    def weighted(spectra: Mapping[str, Tensor], *given: object) -> dict[str, int]:
        whole = {name: float(values.sum()) for name, values in spectra.items()}
        return share_out({name: values * ((whole[name] * costs[name]) ** power / whole[name])
                          if whole[name] else values for name, values in spectra.items()}, *given)

    with patch.object(matrices, "share_out", weighted):
        yield


class Sensitivity(Bench):
    """The ways to share a budget out, on each fine-tune, with every seed and ratio."""

    def finetune(self, folder: Path) -> None:
        pair, _ = self.pair(folder)
        reference = self.load(folder)
        questions = self.questions(reference, pair.family)
        for seed in self.args.seeds:
            with tempfile.TemporaryDirectory(prefix="adamix-sensitivity-") as made:
                config = self.config(seed)
                adamix.compress(self.args.base, folder, Path(made) / "first", config,
                                device=self.args.device)
                tokens = load_file(Path(made) / "first" / TOKENS_FILE)["input_ids"].long()
                costs = sensitivities(reference, tokens)
                for ratio in self.args.ratios:
                    self._each(replace(pair, seed=seed, ratio=ratio), replace(config, ratio=ratio),
                               folder, Path(made), tokens, costs, questions, reference)

    def _each(self, pair: AccuracyRow, config: adamix.Config, folder: Path, made: Path,
              tokens: Tensor, costs: dict[str, float], questions: Questions,
              reference: PreTrainedModel) -> None:
        powers = {f"sensitive, power {power:g}": power for power in self.args.powers}
        for number, name in enumerate([RATIO, BUDGET, *powers]):
            row = replace(pair, method=name)
            if not self.missing(row):
                continue
            out = made / f"{config.ratio}-{number}"
            shared = replace(config, allocate="matrix" if name == RATIO else "model")
            with shared_by(costs, powers[name]) if name in powers else nullcontext():
                summary = adamix.compress(self.args.base, folder, out, shared, calibration=tokens,
                                          device=self.args.device)
            model = restored_model(self.args.base, out).to(reference.device)
            row = replace(row, bytes=summary.bytes, error=summary.relative_error,
                          seconds=sum(summary.seconds.values()))
            self.write(questions.score(row, model, reference))
            del model
            gc.collect()


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    trying_arguments(parser)
    parser.add_argument("--powers", type=float, nargs="+", default=[1.0, 0.75, 0.5])
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    transformers.utils.logging.disable_progress_bar()
    bench = Sensitivity(args, "bench_sensitivity.py")
    for folder in args.finetunes:
        bench.finetune(folder)


if __name__ == "__main__":
    main()
