"""Train the pair of small models in ``examples/``: a base and a full fine-tune of it.

The base is a language model trained from scratch on generated prose. The fine-tune starts from
the base's saved bf16 weights, trains every parameter on small tasks (adding, sorting, reversing
and so on) and solves held-out instances of them, which the base cannot. Both are ordinary Hugging
Face folders. One GPU does it in a few minutes (``--smoke`` tries the script out on a CPU)::

    python benchmarks/train_example_pair.py --out examples
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import torch
from example_tasks import finetuning_documents, held_out_examples, prose, write_held_out
from example_training import CONTEXT, Corpus, Schedule, loss_on, train
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

VOCABULARY = 512
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")
MAX_NEW_TOKENS = 32
EVAL_EXAMPLES = 500
HELD_OUT_CHARACTERS = 50_000
REPORTED_NOISE = (0.05, 0.2)
NOISE_SEEDS = 3


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE which splits digits and puts ``<bos>`` in front."""
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    split_digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split_digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A",
        pair="<bos> $A <bos>:1 $B:1",
        special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side="left",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def new_base(seed: int, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """Return an untrained model in fp32."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        initializer_range=0.03,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write ``model`` in bf16 with its tokenizer as a Hugging Face folder."""
    model.to("cpu", torch.bfloat16).eval()
    model.config.dtype = torch.bfloat16
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=MAX_NEW_TOKENS,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # Name the class that every version of transformers knows; forget where it was loaded from.
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    config = {key: config[key] for key in config if key not in ("is_local", "local_files_only")}
    path.write_text(json.dumps(config, indent=2) + "\n")
    (folder / "model.safetensors").chmod(0o644)


def load(folder: Path) -> LlamaForCausalLM:
    """Load a saved model in fp32 on the CPU."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def read_examples(path: Path) -> list[tuple[str, str]]:
    """The prompts and answers of an ``eval.jsonl``."""
    lines = (json.loads(line) for line in path.read_text().splitlines())
    return [(line["prompt"], line["answer"]) for line in lines]


@torch.no_grad()
def solved(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, pairs: list[tuple[str, str]]
) -> list[bool]:
    """Which answers a greedy generation hits exactly."""
    hits = []
    for begin in range(0, len(pairs), 125):
        chunk = pairs[begin : begin + 125]
        inputs = tokenizer([p for p, _ in chunk], return_tensors="pt", padding=True)
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
        )
        generated = output[:, inputs["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(generated, skip_special_tokens=True)
        hits += [text.strip() == answer for text, (_, answer) in zip(texts, chunk, strict=True)]
    return hits


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, path: Path) -> float:
    """Perplexity per token of the documents of a ``.jsonl``."""
    total, tokens = 0.0, 0
    for line in path.read_text().splitlines():
        document = json.loads(line)["text"]
        ids = tokenizer(document, return_tensors="pt", truncation=True)["input_ids"]
        count = ids.shape[1] - 1
        total += loss_on(model, ids).item() * count
        tokens += count
    return math.exp(total / tokens)


@torch.no_grad()
def add_delta_noise(model: LlamaForCausalLM, base: LlamaForCausalLM, energy: float) -> None:
    """Add Gaussian noise of exactly ``energy`` times the delta's energy to each matrix."""
    for weight, start in zip(model.parameters(), base.parameters(), strict=True):
        if weight.ndim == 2:
            noise = torch.randn_like(weight)
            weight += noise * ((weight - start).norm() * math.sqrt(energy) / noise.norm())


def top_energy(model: LlamaForCausalLM, base: LlamaForCausalLM, share: float = 0.1) -> float:
    """Energy of the deltas' largest ``share`` of singular components, over all matrices."""
    top, total = 0.0, 0.0
    for weight, start in zip(model.parameters(), base.parameters(), strict=True):
        if weight.ndim == 2:
            energies = torch.linalg.svdvals((weight - start).detach()).square()
            top += energies[: round(share * len(energies))].sum().item()
            total += energies.sum().item()
    return top / total


def total_norm(tensors: Iterable[Tensor]) -> float:
    """Euclidean norm of all tensors together."""
    return math.sqrt(sum(tensor.detach().norm().item() ** 2 for tensor in tensors))


def report_accuracy(hits: list[bool], tasks: list[str]) -> None:
    """Print the share of exact matches, overall and for each task."""
    by_task: dict[str, list[bool]] = {}
    for task, hit in zip(tasks, hits, strict=True):
        by_task.setdefault(task, []).append(hit)
    each = "  ".join(f"{task} {sum(own) / len(own):.1%}" for task, own in by_task.items())
    print(f"  exact match {sum(hits) / len(hits):.1%}  ({each})")


def evaluate(out: Path, seed: int) -> None:
    """Print what the saved pair can do, how large it is and how much noise it bears."""
    tokenizer = AutoTokenizer.from_pretrained(out / "base")
    base, tuned = load(out / "base"), load(out / "finetuned")
    pairs = read_examples(out / "eval.jsonl")
    task_of = {example.prompt: example.task for example in held_out_examples(seed, EVAL_EXAMPLES)}
    tasks = [task_of.get(prompt, "other") for prompt, _ in pairs]
    files = [path for name in ("base", "finetuned") for path in (out / name).iterdir()]
    print(f"{sum(p.numel() for p in base.parameters()):,} parameters in each model")
    print(f"{sum(path.stat().st_size for path in files):,} bytes in both folders")
    for name, model in (("base", base), ("finetuned", tuned)):
        prose_perplexity = perplexity(model, tokenizer, out / "heldout_text.jsonl")
        print(f"{name}\n  perplexity of held-out prose {prose_perplexity:.3f} per token")
        report_accuracy(solved(model, tokenizer, pairs), tasks)
    matched = list(zip(tuned.parameters(), base.parameters(), strict=True))
    relative = total_norm(w - b for w, b in matched) / total_norm(base.parameters())
    print(f"delta\n  {relative:.1%} of the base's norm")
    print(f"  {top_energy(tuned, base):.1%} of its energy in the top 10% of singular components")
    for energy in REPORTED_NOISE:
        scores = []
        for noise_seed in range(NOISE_SEEDS):
            torch.manual_seed(noise_seed)
            noisy = load(out / "finetuned")
            add_delta_noise(noisy, base, energy)
            scores += solved(noisy, tokenizer, pairs)
        print(f"  {sum(scores) / len(scores):.2%} exact match with {energy:.0%} noise in the delta")


def make_base(args: argparse.Namespace) -> None:
    """Train the tokenizer and the base, and write them with the held-out files."""
    write_held_out(args.out, args.seed, EVAL_EXAMPLES, HELD_OUT_CHARACTERS)
    texts = list(islice(prose(args.seed, held_out=False), args.documents // 4))
    tokenizer = train_tokenizer(texts[:20_000])
    model = new_base(args.seed, tokenizer)
    schedule = Schedule(args.base_steps, args.batch, learning_rate=2e-3, warmup=100)
    print(f"base: {args.base_steps} steps", flush=True)
    train(model, Corpus.build(tokenizer, texts, args.device), schedule, args.seed)
    save(model, tokenizer, args.out / "base")


def make_finetuned(args: argparse.Namespace) -> None:
    """Fine-tune the saved base and write the result."""
    tokenizer = AutoTokenizer.from_pretrained(args.out / "base")
    model = load(args.out / "base")
    texts = list(islice(finetuning_documents(args.seed), args.documents))
    schedule = Schedule(
        args.steps, args.batch, args.learning_rate, warmup=200,
        decay_to_start=args.decay_to_base, delta_noise=args.delta_noise,
        spectral_decay=args.spectral_decay,
    )  # fmt: skip
    print(f"finetuned: {args.steps} steps", flush=True)
    train(model, Corpus.build(tokenizer, texts, args.device), schedule, args.seed)
    save(model, tokenizer, args.out / "finetuned")


def main() -> None:
    """Parse the options, train unless told not to, and evaluate."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="where to write, e.g. examples")
    parser.add_argument("--seed", type=int, default=0, help="of the data, weights and batches")
    parser.add_argument("--device", default="cuda", help="where to train")
    parser.add_argument("--steps", type=int, default=5000, help="of the fine-tune")
    parser.add_argument("--base-steps", type=int, default=2500, help="of the base")
    parser.add_argument("--batch", type=int, default=256, help=f"rows of {CONTEXT} tokens")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of the fine-tune")
    parser.add_argument("--decay-to-base", type=float, default=0.0, help="decoupled decay")
    parser.add_argument("--spectral-decay", type=float, default=0.7, help="nuclear-norm decay")
    parser.add_argument("--delta-noise", type=float, default=0.15, help="relative energy")
    parser.add_argument("--documents", type=int, default=600_000, help="of the fine-tune")
    parser.add_argument("--keep-base", action="store_true", help="fine-tune the base in --out")
    parser.add_argument("--smoke", action="store_true", help="a few small steps on the CPU")
    parser.add_argument("--evaluate", action="store_true", help="only measure what --out holds")
    args = parser.parse_args()
    if args.smoke:
        args.device, args.steps, args.base_steps = "cpu", 5, 5
        args.batch, args.documents = 4, 20_000
    args.out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    if not (args.evaluate or args.keep_base):
        make_base(args)
    if not args.evaluate:
        make_finetuned(args)
        print(f"trained in {(time.perf_counter() - began) / 60:.1f} minutes", flush=True)
    evaluate(args.out, args.seed)


if __name__ == "__main__":
    main()
