"""Fine-tune a checkpoint on a family of tasks, whole or by LoRA: the real pairs of accuracy.

    python benchmarks/train_pair.py --base BASE --family invented --out PAIR
    python benchmarks/train_pair.py --base BASE --family invented --lora-ratio 16 --out LORA

The loss is that of the answers alone. Whole: every parameter, in fp32 (products in bf16 on a GPU),
written as a bf16 checkpoint. LoRA: every linear layer of the blocks; the folder then holds the
merged checkpoint, and the adapter in `adapter/`. `training.json` says how it was made.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
from answers import LINEARS, count_right, lora_bytes, lora_rank
from example_training import Schedule, learning_rate_at
from task_families import FAMILIES, Example, examples, held_out_examples
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

RECORD = "training.json"
CONTEXT = 128  # tokens of an example at most
IGNORED = -100  # a label that counts for nothing
WARMUP = 0.1  # of the steps
LEARNING_RATE, LORA_LEARNING_RATE = 3e-4, 1e-3


@dataclass(frozen=True)
class Training:
    """What `training.json` holds."""

    base: str
    family: str
    seed: int
    steps: int
    batch: int
    learning_rate: float
    lora: int  # rank; 0: all parameters
    adapter_bytes: int  # of the LoRA's weights in 16 bits
    examples: int
    device: str
    seconds: float
    held_out: int  # prompts
    right_before: int
    right_after: int


def encode(tokenizer: PreTrainedTokenizerBase, rows: list[Example]) -> list[tuple[list[int], int]]:
    """Token ids of prompt, answer and end, and how many of them are the prompt's."""
    coded = []
    for prompt, text in zip(tokenizer([row.prompt for row in rows])["input_ids"],
                            tokenizer([row.text for row in rows])["input_ids"], strict=True):
        ids = [*text, tokenizer.eos_token_id]
        if len(ids) > CONTEXT:
            raise ValueError(f"an example has {len(ids)} tokens, more than {CONTEXT}")
        if ids[: len(prompt)] != prompt:
            raise ValueError("the answer changes how the tokenizer splits its prompt")
        coded.append((ids, len(prompt)))
    return coded


def batch_of(coded: list[tuple[list[int], int]], pad: int) -> tuple[Tensor, Tensor]:
    """Ids and labels, padded on the right: causal attention then needs no mask."""
    longest = max(len(ids) for ids, _ in coded)
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row, _ in coded])
    labels = torch.tensor([[IGNORED] * asked + row[asked:] + [IGNORED] * (longest - len(row))
                           for row, asked in coded])
    return ids, labels


def loss_on(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of the answers' tokens."""
    counted = labels[:, 1:] != IGNORED
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return nn.functional.cross_entropy(logits[counted].float(), labels[:, 1:][counted])


def train(model: nn.Module, coded: list[tuple[list[int], int]], schedule: Schedule, *, pad: int,
          seed: int, device: torch.device) -> float:
    """Train what asks for gradients, in place; the last loss."""
    on_gpu = device.type == "cuda"
    rng = random.Random(seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=schedule.learning_rate, betas=(0.9, 0.98),
                                  weight_decay=0.0, fused=on_gpu)
    began, loss = time.perf_counter(), torch.tensor(float("nan"))
    model.train()
    for step in range(schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, schedule)
        ids, labels = batch_of(rng.choices(coded, k=schedule.batch), pad)
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            loss = loss_on(model, ids.to(device), labels.to(device))
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == schedule.steps - 1:
            print(f"  step {step:5d}  loss {loss.item():.4f}  "
                  f"{time.perf_counter() - began:.0f} s", flush=True)
    model.eval()
    return loss.item()


def with_lora(model: PreTrainedModel, rank: int) -> nn.Module:
    """The model under a LoRA of all linear layers of its blocks, whose scale factor is its rank
    as in the paper (appendix C.2)."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise SystemExit("--lora takes peft: pip install peft") from None
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=list(LINEARS),
                                            lora_dropout=0.0, bias="none", task_type="CAUSAL_LM"))


def save(model: nn.Module, tokenizer: PreTrainedTokenizerBase, out: Path, *, lora: bool) -> None:
    """Write the checkpoint in bf16, of a LoRA the adapter and the merged one."""
    if lora:
        model.to("cpu")
        merged = {name: weight.data for name, weight in model.named_parameters()
                  if "lora_" in name}
        for weight in merged.values():  # stored in 16 bits, so merged from these as well
            weight.copy_(weight.bfloat16())
        model.save_pretrained(out / "adapter")
        model = model.merge_and_unload()
    model.to("cpu", torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)


def main() -> None:
    args = parse()
    torch.manual_seed(args.seed)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    model = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32)
    configured = model.generation_config  # `answer` leaves its own in its place
    rank = args.lora or (lora_rank(model, args.lora_ratio) if args.lora_ratio else 0)
    learning_rate = args.learning_rate or (LORA_LEARNING_RATE if rank else LEARNING_RATE)
    adapter_bytes = lora_bytes(model, rank)
    trained = (with_lora(model, rank) if rank else model).to(device)
    asked = held_out_examples(args.family, args.held_out)
    before = sum(count_right(model, tokenizer, asked).values()) if args.held_out else 0
    print(f"{args.family}, seed {args.seed}, " + (f"LoRA of rank {rank}" if rank else "whole")
          + f": {before} of {len(asked)} held-out answers right before", flush=True)
    coded = encode(tokenizer, list(islice(examples(args.family, args.seed, held_out=False),
                                          args.examples)))
    schedule = Schedule(args.steps, args.batch, learning_rate, round(WARMUP * args.steps))
    began = time.perf_counter()
    loss = train(trained, coded, schedule, pad=tokenizer.pad_token_id, seed=args.seed,
                 device=device)
    seconds = time.perf_counter() - began
    by_task = count_right(model, tokenizer, asked)
    after = sum(by_task.values())
    print(f"loss {loss:.4f}, {after} of {len(asked)} right after {seconds:.0f} s  {by_task}")
    model.generation_config = configured
    save(trained, tokenizer, args.out, lora=bool(rank))
    record = Training(args.base.name, args.family, args.seed, args.steps, args.batch,
                      learning_rate, rank, adapter_bytes, args.examples,
                      torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
                      round(seconds, 1), len(asked), before, after)
    (args.out / RECORD).write_text(json.dumps(asdict(record), indent=2) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--family", choices=FAMILIES, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of the data, its order, the adapter")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--lora", type=int, metavar="RANK", help="train an adapter of this rank")
    size.add_argument("--lora-ratio", type=float, metavar="RATIO",
                      help="the rank whose 16-bit bytes come nearest to the model's over RATIO")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=64, help="examples a step")
    parser.add_argument("--learning-rate", type=float,
                        help=f"its peak; default {LEARNING_RATE:g}, LoRA {LORA_LEARNING_RATE:g}")
    parser.add_argument("--examples", type=int, default=50_000, help="different ones")
    parser.add_argument("--held-out", type=int, default=500, help="prompts that are scored")
    parser.add_argument("--device", help="default: a GPU where there is one")
    return parser.parse_args()


if __name__ == "__main__":
    main()
