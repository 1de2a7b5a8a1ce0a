"""Random checkpoints in a model's shapes: a base and its fine-tune, on disk as real ones are.

The base's matrices are N(0, 0.02²), as models are initialised. A matrix's change is made like those
of a real fine-tune (all 14 matrices of two layers of SmolLM2-135M, trained on arithmetic in full):

- ‖ΔW‖ / ‖W‖ is 0.025; there 0.017 to 0.038;
- singular value i, from 0, is (1 + i/4)^-0.75 of the largest; there, in the mean of the matrices,
  0.81 at i = 1 and 0.65, 0.49, 0.34, 0.22, 0.14 and 0.08 at 3, 7, 15, 31, 63 and 127, all within
  0.04 of it;
- 2 % of its energy is iid noise; there the smaller half of the singular values has 0.4 % to 4 %.

The decaying part is a product of two thin Gaussian factors, of half the matrix's rank and at most
1024, so that it costs seconds for a whole 7B model. Norms and biases change by 1 % of their size.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

MODELS: dict[str, dict[str, object]] = {
    "qwen2.5-7b": {"model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584,
                   "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
                   "num_key_value_heads": 4, "rope_theta": 1e6, "tie_word_embeddings": False},
    "tiny": {"model_type": "qwen2", "vocab_size": 512, "hidden_size": 256,
             "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "tie_word_embeddings": False},
}
CONTEXT = 32768  # of the models above
WEIGHT_STD = 0.02
DELTA_SHARE = 0.025
NOISE_SHARE = 0.02  # of ΔW's energy
MAX_RANK = 1024
VECTOR_CHANGE = 0.01
SHARD_BYTES = 500e6  # so much of each model is in memory at a time, but a tensor at least


def config_of(model: str, layers: int | None = None) -> PretrainedConfig:
    """Of a name in MODELS, or of a config.json (or its folder), with so many layers."""
    if model in MODELS:
        sizes = dict(MODELS[model])
        config = AutoConfig.for_model(sizes.pop("model_type"), max_position_embeddings=CONTEXT,
                                      bos_token_id=1, eos_token_id=2, **sizes)
    else:
        config = AutoConfig.from_pretrained(model)
    if layers is not None:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    return config


def shapes_of(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Of every parameter in its checkpoint, in the model's order; what is tied comes once."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def make_pair(folder: Path, config: PretrainedConfig, *, dtype: torch.dtype = torch.bfloat16,
              device: str = "cpu") -> tuple[Path, Path]:
    """Write `folder/base` and `folder/finetuned`, or take those that are there.

    What is there is taken where its config.json is the same: that is written last.
    """
    paths = folder / "base", folder / "finetuned"
    config.dtype = dtype
    text = config.to_json_string()
    if all((path / "config.json").exists() and (path / "config.json").read_text() == text
           for path in paths):
        return paths
    for path in paths:
        path.mkdir(parents=True, exist_ok=True)
        for old in [*path.glob("*.safetensors"), *path.glob("*.json")]:
            old.unlink()
    shapes = shapes_of(config)
    groups = list(_shards(shapes, dtype.itemsize))
    numbers, files = {name: i for i, name in enumerate(shapes)}, {}
    for i, names in enumerate(groups, 1):
        file = f"model-{i:05}-of-{len(groups):05}.safetensors"
        files |= dict.fromkeys(names, file)
        pairs = {name: draw_pair(name, shapes[name], dtype, device, numbers[name])
                 for name in names}
        for side, path in enumerate(paths):
            save_file({name: pair[side] for name, pair in pairs.items()}, path / file,
                      metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": files}
    for path in paths:
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
        (path / "config.json").write_text(text)
    return paths


def draw_pair(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int
              ) -> tuple[Tensor, Tensor]:
    """One tensor of the base and of the fine-tune, on the host."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, device=device, generator=generator)

    if len(shape) == 1:
        about = 0.0 if name.endswith("bias") else 1.0  # a norm's weight
        base = about + WEIGHT_STD * normal(*shape)
        change = VECTOR_CHANGE * (about or WEIGHT_STD) * normal(*shape)
    else:
        base = WEIGHT_STD * normal(*shape)
        change = _change(shape, DELTA_SHARE * base.norm().item(), normal)
    return base.to(dtype).cpu(), change.add_(base).to(dtype).cpu()


def _change(shape: tuple[int, ...], norm: float, normal: Callable[..., Tensor]) -> Tensor:
    """ΔW of a Frobenius norm: its decaying part, and noise."""
    *stack, out, n = shape
    rank = max(1, min(MAX_RANK, min(out, n) // 2))
    sizes = (1 + torch.arange(rank) / 4) ** -0.75
    left = normal(*stack, out, rank)
    left *= sizes.to(left.device)
    change = left @ normal(*stack, rank, n)
    change *= (1 - NOISE_SHARE) ** 0.5 * norm / change.norm()
    return change.add_(normal(*shape), alpha=NOISE_SHARE**0.5 * norm / change.numel() ** 0.5)


def _shards(shapes: Mapping[str, tuple[int, ...]], itemsize: int) -> Iterator[list[str]]:
    names: list[str] = []
    held = 0
    for name, shape in shapes.items():
        size = itemsize * torch.Size(shape).numel()
        if names and held + size > SHARD_BYTES:
            yield names
            names, held = [], 0
        names.append(name)
        held += size
    if names:
        yield names


def model_size(config: PretrainedConfig, itemsize: int = 2) -> int:
    """Bytes of all parameters."""
    return itemsize * sum(torch.Size(shape).numel() for shape in shapes_of(config).values())


def layer_matrices(names: Iterable[str]) -> list[str]:
    """The linear layers' weights of the first layer, by the names that most models give them."""
    return [name for name in names if re.search(r"\blayers\.0\..*_proj\.weight$", name)]


def random_gram(n: int, device: str = "cpu", seed: int = 0) -> Tensor:
    """X Xᵀ `[n, n]` fp32 as of inputs whose sizes differ (log-normal, σ 0.5 in the logarithm) and
    which share up to 256 directions, so that a few of its eigenvalues are far above the rest."""
    generator = torch.Generator(device).manual_seed(seed)
    sizes = torch.randn(n, device=device, generator=generator).mul_(0.5).exp_()
    shared = torch.randn(n, min(256, n), device=device, generator=generator)
    shared /= torch.arange(1, shared.shape[1] + 1, device=device) ** 0.5
    gram = shared @ shared.T
    gram.diagonal().add_(1.0)
    return gram.mul_(sizes).mul_(sizes[:, None])
