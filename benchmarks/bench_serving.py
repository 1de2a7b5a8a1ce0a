"""Memory, prefill and decode speed of a model that serves many fine-tunes, beside other ways to.

    python benchmarks/bench_serving.py --csv benchmarks/results/serving.csv

A batch has one row a fine-tune. Beside adamix: as many separate models, each called in turn with a
CUDA graph of its own, until memory ends; the base alone with the same batch; 16-bit LoRA of the
deltas' bytes in PEFT's mixed batches. The model has Qwen2.5-7B's shapes and random weights.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from rows import FINETUNES, ServingRow, append_row, command_of, commit
from serving_models import (
    MODELS,
    Sequences,
    Times,
    measure,
    measure_decode,
    model_bytes,
    random_finetune,
    random_model,
)
from torch import Tensor, nn
from transformers import PreTrainedModel

import adamix
from adamix.serving.image import words_of

IMPLS = ("adamix", "base", "LoRA", "separate models")
DISTINCT = 4  # fine-tunes that are drawn; with more, names share them, each with its own place
CHECKED_ROWS = 2
PREFILLS = 3
GB = 1e9


class Bench:
    """A run: its options, its model, and where its rows go."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device: str = args.device
        self.end = time.monotonic() + 60 * args.minutes
        self.base = self.new_model(0)
        generator = torch.Generator().manual_seed(0)
        self.prompts = torch.randint(0, self.base.config.vocab_size,
                                     (max(args.finetunes), args.prompt), generator=generator)
        self.row = ServingRow(
            args.model, self.base.config.num_hidden_layers, args.dtype, 0, "", prompt=args.prompt,
            model_gb=model_bytes(self.base) / GB,
            device=torch.cuda.get_device_name() if self.device == "cuda" else "CPU",
            commit=commit(Path(__file__).parent),
            command=command_of(sys.argv),
            date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"))

    def new_model(self, seed: int) -> PreTrainedModel:
        return random_model(self.args.model, self.args.layers, getattr(torch, self.args.dtype),
                            self.device, seed)

    def rows_of(self, count: int) -> Tensor:
        return self.prompts[:count].to(self.device)

    def measure(self, impl: str, count: int, batches: list[Sequences], weights: int,
                check: Callable[[Sequences], float] | None = None, **facts: float) -> None:
        """Prefill, then decode, of batches that follow each other."""
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        error = None if check is None else check(batches[0])

        def prefill() -> None:
            for batch in batches:
                batch.prefill()

        prefill()
        first = measure(prefill, PREFILLS, self.device)
        decode, path = measure_decode(batches, self.device)
        compiled = "compiled, " if self.args.compile else ""
        self.write(replace(
            self._filled(self.row, decode, count), finetunes=count, impl=impl,
            path=compiled + path, prefill_ms=first.ms, weights_gb=weights / GB,
            cache_gb=sum(batch.cache_bytes for batch in batches) / GB, error=error,
            peak_gb=torch.cuda.max_memory_allocated() / GB if self.device == "cuda" else None,
            **facts))

    def _filled(self, row: ServingRow, decode: Times, count: int) -> ServingRow:
        return replace(row, decode_ms=decode.ms, decode_ms_min=decode.ms_min,
                       decode_ms_max=decode.ms_max, tokens_per_s=1e3 * count / decode.ms,
                       replays=decode.count)

    def write(self, row: ServingRow) -> None:
        if self.args.csv is not None:
            append_row(self.args.csv, row)
        print(line(row), flush=True)

    def attempt(self, impl: str, count: int, run: Callable[[], None]) -> bool:
        """Whether it could be measured; a row says why where it could not."""
        if time.monotonic() > self.end:
            print(f"{impl} with {count} fine-tunes not begun: out of --minutes")
            return False
        try:
            run()
        except (RuntimeError, ValueError, ImportError) as error:  # out of memory among them
            why = "out of memory" if isinstance(error, torch.OutOfMemoryError) else str(error)
            self.write(replace(self.row, finetunes=count, impl=impl,
                               note=(why.strip().splitlines() or [type(error).__name__])[0][:200]))
            return False
        finally:
            _free(self.device)
        return True

    # --- the ways to serve

    def adamix(self) -> None:
        most = max(self.args.finetunes)
        drawn = [random_finetune(self.base, seed) for seed in range(min(DISTINCT, most))]
        bank = adamix.attach(self.base, verify=None, slots=most, max_rank=self.args.max_rank,
                             capacity_bytes=most * 4 * max(map(words_of, drawn)))
        for count in sorted(self.args.finetunes):
            names = [f"{i}" for i in range(count)]
            for name in names[len(bank.names):]:
                bank.load(name, drawn[int(name) % DISTINCT])
            bank.route(names)
            batch = Sequences(self.base, self.rows_of(count), compiled=self.args.compile)
            weights = model_bytes(self.base) + bank.nbytes
            load_s = bank.metrics.read_seconds / len(drawn[:count])

            def run(batch: Sequences = batch, names: list[str] = names, weights: int = weights,
                    load_s: float = load_s) -> None:
                self.measure("adamix", len(names), [batch], weights,
                             lambda batch: self._compare_alone(bank, batch, names), load_s=load_s)

            if not self.attempt("adamix", count, run):
                break
        bank.detach()

    def _compare_alone(self, bank: adamix.DeltaBank, batch: Sequences, names: list[str]) -> float:
        """Logits of the first rows in the batch and in a batch of their own: rounding is all that
        may be between them, since products of other sizes are summed in another order."""
        together, worst = batch.prefill().float(), 0.0
        for i, name in enumerate(names[-CHECKED_ROWS:], len(names) - len(names[-CHECKED_ROWS:])):
            with bank.route([name]):
                alone = Sequences(self.base, self.rows_of(i + 1)[i:]).prefill().float()[0]
            worst = max(worst, ((together[i] - alone).abs().max() / alone.abs().max()).item())
        return worst

    def base_alone(self) -> None:
        for count in self.args.finetunes:
            batch = Sequences(self.base, self.rows_of(count), compiled=self.args.compile)
            self.attempt("base", count, lambda batch=batch, count=count: self.measure(
                "base", count, [batch], model_bytes(self.base)))

    def lora(self) -> None:
        for count in self.args.finetunes:
            if not self.attempt("LoRA", count, lambda count=count: self._lora(count)):
                break

    def _lora(self, count: int) -> None:
        from peft import LoraConfig, get_peft_model

        ranks = {f"^{name}$": max(out * n // (16 * (out + n)), 1) for name, (out, n) in (
            (name, tuple(module.weight.shape)) for name, module in self.base.named_modules()
            if isinstance(module, nn.Linear) and name != "lm_head")}
        config = LoraConfig(r=8, target_modules=[name.strip("^$") for name in ranks],
                            rank_pattern=ranks, alpha_pattern=ranks, init_lora_weights=False)
        before = model_bytes(self.base)
        model = get_peft_model(self.base, config, adapter_name="0")
        try:
            for i in range(1, count):
                model.add_adapter(f"{i}", config)
            model.to(getattr(torch, self.args.dtype)).eval()
            names = [f"{i}" for i in range(count)]
            inner = model.base_model.model
            hooks = model.base_model._enable_peft_forward_hooks(adapter_names=names)
            with hooks:
                batch = Sequences(inner, self.rows_of(count))
                self.measure("LoRA", count, [batch], model_bytes(model))
        finally:
            self.base = model.unload()
        assert model_bytes(self.base) == before

    def separate(self) -> None:
        models = [self.base]
        for count in sorted(self.args.finetunes):
            def run(count: int = count) -> None:
                while len(models) < count:
                    models.append(self.new_model(len(models)))
                batches = [Sequences(model, self.rows_of(i + 1)[i:], compiled=self.args.compile)
                           for i, model in enumerate(models)]
                self.measure("separate models", count, batches, sum(map(model_bytes, models)))

            if not self.attempt("separate models", count, run):
                break


def _free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def line(row: ServingRow) -> str:
    what = f"{row.model} {row.layers} layers  {row.finetunes:>3} fine-tunes  {row.impl:<16}"
    if row.decode_ms is None:
        return f"{what} skipped: {row.note}"
    text = (f"{what} decode {row.decode_ms:8.3f} ms ({row.tokens_per_s:7.1f} tokens/s)  "
            f"prefill {row.prefill_ms:9.2f} ms  weights {row.weights_gb:6.2f} GB")
    if row.peak_gb is not None:
        text += f"  peak {row.peak_gb:6.2f} GB"
    if row.error is not None:
        text += f"  error {row.error:.1e}"
    return f"{text}  [{row.path}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="qwen2.5-7b")
    parser.add_argument("--layers", type=int, help="instead of the model's own number")
    parser.add_argument("--finetunes", type=int, nargs="+", default=list(FINETUNES))
    parser.add_argument("--impls", nargs="+", choices=IMPLS, default=list(IMPLS))
    parser.add_argument("--prompt", type=int, default=512, help="tokens a row")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--max-rank", type=int, help="of a matrix [default: adamix.attach's]")
    parser.add_argument("--compile", action="store_true", help="torch.compile the decode steps")
    parser.add_argument("--minutes", type=float, default=float("inf"),
                        help="start no further measurement after these")
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit(f"bench_serving.py measures on an NVIDIA GPU; torch {torch.__version__} sees none "
                 f"on this machine (--device cpu --model tiny tries it out).")
    bench = Bench(args)
    ways = {"adamix": bench.adamix, "base": bench.base_alone, "LoRA": bench.lora,
            "separate models": bench.separate}
    for impl in args.impls:
        ways[impl]()
        _free(args.device)


if __name__ == "__main__":
    main()
