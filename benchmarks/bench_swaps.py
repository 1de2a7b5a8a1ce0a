"""Whether many resident fine-tunes stay right while rows are rerouted and fine-tunes are swapped.

    python benchmarks/bench_swaps.py --resident 100 --swaps 1000

One captured decode step; between two replays of it some rows go to other fine-tunes, and one
fine-tune is brought from the host, in the place of the least recently routed. Every token's logits
must be those, bit by bit, that its row gets where all rows have the same fine-tune. Memory on the
device must not change. Random weights of Qwen2.5-7B's shapes; several names share each of a few
fine-tunes that are drawn, every name with a place of its own on the device.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path

import torch
from rows import command_of, commit
from serving_models import MODELS, Sequences, random_finetune, random_model
from torch import Tensor

import adamix
from adamix.serving.image import words_of

SPARE = 20  # names that have no place on the device, at any time


class Decoder:
    """A step on fixed prompts that leaves its logits in a tensor; captured where there is a GPU."""

    def __init__(self, model: torch.nn.Module, prompts: Tensor) -> None:
        self.sequences = Sequences(model, prompts)
        self.logits: Tensor | None = None
        self.sequences.prefill()
        self.tokens = self.sequences.tokens.clone()
        self.graph: torch.cuda.CUDAGraph | None = None
        if prompts.is_cuda:
            self._run()
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self._run()

    @torch.inference_mode()
    def _run(self) -> None:
        """A step that goes back to where it began, so that each is the same but for the route."""
        one = self.sequences
        for layer in one.cache.layers:
            layer.cumulative_length.fill_(one.prompts.shape[1])
        output = one.model(input_ids=self.tokens, position_ids=one.positions,
                           past_key_values=one.cache, use_cache=True)
        self.logits = output.logits[:, -1]

    def run(self) -> Tensor:
        """Logits `[rows, vocabulary]`, valid until the next call."""
        if self.graph is not None:
            self.graph.replay()
        else:
            self._run()
        assert self.logits is not None
        return self.logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="qwen2.5-7b")
    parser.add_argument("--layers", type=int, help="instead of the model's own number")
    parser.add_argument("--resident", type=int, default=100, help="fine-tunes on the device")
    parser.add_argument("--drawn", type=int, default=4, help="different ones among them")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--swaps", type=int, default=1000)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("bench_swaps.py needs an NVIDIA GPU (--device cpu --model tiny tries it out).")
    choose = random.Random(0)
    model = random_model(args.model, args.layers, torch.bfloat16, args.device)
    drawn = [random_finetune(model, seed) for seed in range(args.drawn)]
    bank = adamix.attach(model, verify=None, slots=args.resident,
                         capacity_bytes=args.resident * 4 * max(map(words_of, drawn)))
    names = [f"{i}" for i in range(args.resident + SPARE)]
    start = time.perf_counter()
    for i, name in enumerate(names):
        bank.load(name, drawn[i % args.drawn])
    print(f"{torch.cuda.get_device_name() if args.device == 'cuda' else 'CPU'}, commit "
          f"{commit(Path(__file__).parent)}: {command_of(sys.argv)}")
    print(f"{len(names)} fine-tunes loaded in {time.perf_counter() - start:.1f} s, "
          f"{len(bank.resident)} of them resident: {bank.nbytes / 1e9:.2f} GB beside "
          f"{sum(p.nbytes for p in model.parameters()) / 1e9:.2f} GB of weights")
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, model.config.vocab_size, (args.rows, 64), generator=generator)
    bank.route([None] * args.rows)
    decoder = Decoder(model, prompts.to(args.device))
    expected = {}
    for of in (None, *range(args.drawn)):
        bank.route([None if of is None else names[of]] * args.rows)
        expected[of] = decoder.run().clone()
    different = (expected[0] != expected[1]).any(-1).all().item()
    before, wrong, tokens = bank.metrics, 0, 0
    memory = _memory(args.device)
    start = time.perf_counter()
    while bank.metrics.copies - before.copies < args.swaps:
        away = choose.choice(sorted(set(names) - set(bank.resident)))
        routed = [choose.choice([None, away, *choose.sample(bank.resident, 4)])
                  for _ in range(args.rows - 1)] + [away]
        choose.shuffle(routed)
        if choose.random() < 0.1:  # loaded anew instead of brought back
            bank.unload(away)
            bank.load(away, drawn[int(away) % args.drawn])
        bank.route(routed)
        of = [None if name is None else int(name) % args.drawn for name in routed]
        wrong += count_wrong(decoder.run(), [expected[which][i] for i, which in enumerate(of)])
        tokens += args.rows
    seconds = time.perf_counter() - start
    swaps = bank.metrics.copies - before.copies
    print(f"{swaps} swaps in {seconds:.1f} s ({1e3 * seconds / swaps:.1f} ms each, a step and the "
          f"comparison included), {(bank.metrics.copied_bytes - before.copied_bytes) / 1e9:.0f} GB "
          f"copied\n{tokens} tokens, {wrong} of them wrong; fine-tunes differ in every row: "
          f"{different}\nmemory on the device before {memory:,} bytes, after "
          f"{_memory(args.device):,}")
    sys.exit(wrong > 0 or not different or _memory(args.device) != memory)


def count_wrong(logits: Tensor, exact: list[Tensor]) -> int:
    """Rows of `[rows, vocabulary]` that differ anywhere."""
    return int((logits != torch.stack(exact)).any(-1).sum())


def _memory(device: str) -> int:
    if device != "cuda":
        return 0
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


if __name__ == "__main__":
    main()
