"""Tiny random checkpoints for tests: a base and its fine-tune, as `save_pretrained` writes them."""

from __future__ import annotations

import string
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from adamix.config import Config

HIDDEN, MLP, LAYERS, HEADS, KV_HEADS, CONTEXT = 64, 96, 2, 4, 2, 128
SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]
CHARACTERS = list(string.printable[:97])  # all that prints, space, tab and newline
VOCABULARY = 128  # rows; those beyond the tokens are spare, as in many real models
INITIAL_STD = 0.08  # logits of std 0.6: models that differ visibly without being sure of anything
DELTA_SHARE = 0.3  # ‖ΔW‖ / ‖W‖


def make_pair(folder: Path, *, tied: bool = False, grown_rows: int = 0, sharded: bool = False,
              dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> tuple[Path, Path]:
    """Write `folder/base` and `folder/finetuned`: Llama models with a character tokenizer.

    Every linear layer, both norms of a layer, the embedding and the head differ; the deltas of
    matrices have singular values that fall as 1/i, as those of real fine-tunes do.

    Args:
        tied: the head is the embedding.
        grown_rows: tokens that only the fine-tune's vocabulary has.
        sharded: both checkpoints in several files with an index.
        dtype: of the weights.
        seed: of all random numbers.

    Returns:
        Paths of the base and of the fine-tune.
    """
    generator = torch.Generator().manual_seed(seed)
    base = _model(VOCABULARY, tied)
    for name, weight in base.named_parameters():
        values = torch.randn(weight.shape, generator=generator)
        weight.data = 1 + 0.1 * values if "norm" in name else INITIAL_STD * values
    finetuned = _model(VOCABULARY + grown_rows, tied)
    for name, weight in finetuned.named_parameters():
        old = base.get_parameter(name).data
        new = old + decaying_delta(old, generator)
        if new.shape != weight.shape:
            extra = torch.randn(grown_rows, HIDDEN, generator=generator)
            new = torch.cat([new, INITIAL_STD * extra])
        weight.data = new
    paths = Path(folder) / "base", Path(folder) / "finetuned"
    for path, model, extra_tokens in ((paths[0], base, 0), (paths[1], finetuned, grown_rows)):
        shards = {"max_shard_size": "60KB"} if sharded else {}
        model.to(dtype).save_pretrained(path, **shards)
        tokenizer(extra_tokens).save_pretrained(path)
    return paths


def tokenizer(extra_tokens: int = 0) -> PreTrainedTokenizerFast:
    """One token a character, `<bos>` in front; `extra_tokens` words follow the spare rows."""
    words = [*SPECIAL, *CHARACTERS]
    words += [f"<spare{i}>" for i in range(len(words), VOCABULARY)]
    words += [f"<extra{i}>" for i in range(extra_tokens)]
    vocabulary = {word: i for i, word in enumerate(words)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    inner.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", SPECIAL.index("<bos>"))])
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>",
                                   eos_token="<eos>", unk_token="<unk>",
                                   model_max_length=CONTEXT)


def _model(vocabulary: int, tied: bool) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=HIDDEN, intermediate_size=MLP, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=CONTEXT,
        tie_word_embeddings=tied, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model = LlamaForCausalLM(config).eval()
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return model


def decaying_delta(weight: Tensor, generator: torch.Generator) -> Tensor:
    """A change of a parameter, of a matrix with singular values that fall as 1/i."""
    if weight.dim() == 1:
        return 0.05 * torch.randn(weight.shape, generator=generator)
    rank = min(weight.shape)
    U = torch.linalg.qr(torch.randn(weight.shape[0], rank, generator=generator)).Q
    V = torch.linalg.qr(torch.randn(weight.shape[1], rank, generator=generator)).Q
    s = 1 / torch.arange(1, rank + 1)
    return DELTA_SHARE * weight.norm() / s.norm() * (U * s) @ V.T


@dataclass(frozen=True)
class Pair:
    """Folders of a base, its fine-tune, and the delta between them."""

    base: Path
    finetuned: Path
    delta: Path


@dataclass(frozen=True)
class Family:
    """Folders of a base, and of the deltas of several fine-tunes of it."""

    base: Path
    deltas: list[Path]


_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []  # removed when the process ends
VARIANTS = ("plain", "tied", "grown", "sharded")


@cache
def compressed_pair(variant: str = "plain") -> Pair:
    """A pair and its delta, made once a process; tests must leave its folders as they are.

    "tied": both files also hold the head that the config ties to the embedding, as some
    checkpoints on the Hub do; "grown": 5 rows more; "sharded": several files.
    """
    from adamix.pipeline import compress

    _FOLDERS.append(tempfile.TemporaryDirectory(prefix="adamix-tests-"))
    folder = Path(_FOLDERS[-1].name)
    base, finetuned = make_pair(folder, tied=variant == "tied", sharded=variant == "sharded",
                                grown_rows=5 if variant == "grown" else 0)
    if variant == "tied":
        for path in (base, finetuned):
            tensors = load_file(path / "model.safetensors")
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
            save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    compress(base, finetuned, folder / "delta", _config(), threads=1, device="cpu")
    return Pair(base, finetuned, folder / "delta")


@cache
def compressed_family(count: int = 3) -> Family:
    """An fp32 base and the deltas of `count` fine-tunes, made once a process; leave as they are."""
    from adamix.pipeline import compress

    _FOLDERS.append(tempfile.TemporaryDirectory(prefix="adamix-tests-"))
    folder = Path(_FOLDERS[-1].name)
    base, finetuned = make_pair(folder, dtype=torch.float32)
    deltas = [folder / f"delta{i}" for i in range(count)]
    for i, delta in enumerate(deltas):
        if i > 0:
            finetuned = folder / f"finetuned{i}"
            _write_finetune(base, finetuned, torch.Generator().manual_seed(i))
        compress(base, finetuned, delta, _config(), threads=1, device="cpu")
    return Family(base, deltas)


def _write_finetune(base: Path, path: Path, generator: torch.Generator) -> None:
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    for weight in model.parameters():
        weight.data += decaying_delta(weight.data, generator)
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)


def _config() -> Config:
    return Config(bits_per_weight=3.0, bit_widths=(8, 4, 3, 2), calibration_sequences=8,
                  calibration_length=32)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads cost more than they bring on models this small; import it to have it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def checkpoint_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, whatever its shards."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors"))
            for name, tensor in load_file(file).items()}
