"""How much memory and time does a compression take? A pair of random models, a process of its own.

    python benchmarks/bench_memory.py --sequences 16 --length 256

The default is the shape of Qwen2-0.5B but for a smaller vocabulary: 24 layers of hidden size 896
and 4864 in the MLP, bf16 in shards of 200 MB. The fine-tune is the base plus noise whose singular
values fall as 1/i. The calibration text is random tokens; `--self` lets the model write it. Options
that are not its own go to `adamix compress`.
"""

from __future__ import annotations

import argparse
import json
import random
import string
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

DELTA_SHARE = 0.02  # ‖ΔW‖ / ‖W‖
DELTA_RANK = 64


def make_pair(folder: Path, layers: int, vocabulary: int, every: int) -> tuple[Path, Path]:
    """Write base and fine-tune, or take those that are there."""
    label = f"{layers}-{vocabulary}"
    paths = folder / f"base-{label}", folder / f"finetuned-{label}-{every}"
    if all((path / "config.json").exists() for path in paths):
        return paths
    generator = torch.Generator().manual_seed(0)
    config = Qwen2Config(vocab_size=vocabulary, hidden_size=896, intermediate_size=4864,
                         num_hidden_layers=layers, num_attention_heads=14, num_key_value_heads=2,
                         tie_word_embeddings=True, bos_token_id=1, eos_token_id=2)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for path in paths:
        model.to(torch.bfloat16).save_pretrained(path, max_shard_size="200MB")
        _tokenizer(vocabulary).save_pretrained(path)
        for name, parameter in model.named_parameters():
            if "layers." not in name or int(name.split(".")[2]) % every == 0:
                parameter.data = parameter.data + _delta(parameter.data, generator)
    return paths


def _delta(weight: Tensor, generator: torch.Generator) -> Tensor:
    if weight.dim() < 2:
        return 0.01 * torch.randn(weight.shape, generator=generator)
    U, V = (torch.randn(n, DELTA_RANK, generator=generator) for n in weight.shape)
    delta = (U / torch.arange(1, DELTA_RANK + 1)) @ V.T
    return DELTA_SHARE * weight.float().norm() / delta.norm() * delta


def _tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<bos>", "<eos>", "<unk>", *string.ascii_letters]
    words += [f"w{i}" for i in range(len(words), vocabulary)]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>",
                                   eos_token="<eos>", unk_token="<unk>")


def write_text(folder: Path, tokens: int, vocabulary: int) -> Path:
    """So many random words, one token each."""
    draw = random.Random(0)
    path = folder / "text.txt"
    path.write_text(" ".join(f"w{draw.randrange(56, vocabulary)}" for _ in range(tokens)))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--every", type=int, default=1, metavar="N",
                        help="fine-tune only every N-th layer: the same memory in less time")
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--self", action="store_true", help="self-calibration")
    parser.add_argument("--models", type=Path, help="where to keep the pair for the next time")
    args, options = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.models or Path(temporary)
        base, finetuned = make_pair(folder, args.layers, args.vocabulary, args.every)
        text = [] if args.self else ["--calibration", write_text(
            Path(temporary), 4 * args.sequences * args.length, args.vocabulary)]
        done = subprocess.run(
            [sys.executable, "-m", "adamix", "compress", base, finetuned, "-o",
             Path(temporary) / "delta", "--sequences", str(args.sequences), "--length",
             str(args.length), "--threads", str(args.threads), *text, *options, "--json"],
            stdout=subprocess.PIPE)
        if done.returncode:
            sys.exit(done.returncode)
        found = json.loads(done.stdout)
        size = sum(file.stat().st_size for file in finetuned.glob("*.safetensors"))
    seconds = "  ".join(f"{stage} {spent:.1f} s" for stage, spent in found["seconds"].items())
    print(f"16-bit model {size / 2**20:.0f} MiB  "
          f"peak memory {found['peak_bytes'] / 2**20:.0f} MiB  "
          f"mean error {found['mean_error']:.4g}  {seconds}")


if __name__ == "__main__":
    main()
