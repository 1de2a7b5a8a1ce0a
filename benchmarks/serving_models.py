"""Whole models with random weights, random fine-tunes of them, and steps that can be timed.

Random weights take the time that trained ones do: nothing here depends on what a model says.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from banks import COMPONENT_SIZE, draw_counts, lane_widths
from made_models import MODELS
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    StaticCache,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from adamix import ops
from adamix.artifacts import Manifest, ModelDelta, PackedDelta

NEW_TOKENS = 96  # of a sequence behind its prompt: as many steps as are timed, and warmed up
WARM_STEPS = 3
ATTENTION = "sdpa_by_group"
BIAS_CHANGE = 0.01  # of norms and biases, standard deviation


def attend_by_group(module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
                    attention_mask: Tensor | None, **options: object) -> tuple[Tensor, None]:
    """transformers' "sdpa", where a step's query heads of one key are rows of one product.

    Later versions do that themselves; earlier ones copy the whole cache to every query head.
    """
    batch, heads, tokens, size = query.shape
    groups = key.shape[1]
    if tokens > 1 or groups == heads:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    rows = nn.functional.scaled_dot_product_attention(
        query.reshape(batch, groups, heads // groups, size), key, value, attention_mask,
        scale=options.get("scaling"))
    return rows.reshape(batch, 1, heads, size), None


AttentionInterface.register(ATTENTION, attend_by_group)
AttentionMaskInterface.register(ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def random_model(name: str, layers: int | None, dtype: torch.dtype, device: str, seed: int = 0
                 ) -> PreTrainedModel:
    """With initial weights as the architecture draws them; biases drawn too."""
    sizes = dict(MODELS[name])
    if layers is not None:
        sizes["num_hidden_layers"] = layers
    config = AutoConfig.for_model(sizes.pop("model_type"), max_position_embeddings=4096, **sizes)
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype,
                                                 attn_implementation=ATTENTION).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.dim() == 1 and not parameter.any():
            parameter.normal_(std=BIAS_CHANGE)
    return model


def random_finetune(model: PreTrainedModel, seed: int, bits: float = 1.0) -> ModelDelta:
    """`bits` a weight for every linear layer, the embedding and the head; norms and biases whole.

    Widths are those of a real allocation (banks.py). On the host.
    """
    rng = np.random.default_rng(seed)
    matrices, whole = {}, {}
    shapes = {f"{name}.weight": tuple(module.weight.shape)
              for name, module in model.named_modules()
              if isinstance(module, (nn.Linear, nn.Embedding))}
    for name, (out, n) in shapes.items():
        counts = draw_counts(rng, n, out, bits)
        size = ops.v_words(n, counts) + ops.u_words(out, counts)
        words = rng.integers(-(2**31), 2**31, size, dtype=np.int32)
        mean_square_level = (4.0 ** lane_widths(counts) - 1) / 3
        scales = COMPONENT_SIZE * rng.uniform(0.5, 1.5, sum(counts)) / mean_square_level
        # banks.py's sizes are for inputs of N(0, 1) and outputs that nothing is added to; here
        # the delta shall be a tenth or so of a layer whose weights are N(0, 0.02).
        scales *= 0.002 / (COMPONENT_SIZE * max(sum(counts), 1) ** 0.5)
        matrices[name] = PackedDelta(torch.from_numpy(words),
                                     torch.from_numpy(scales.astype(np.float32)), tuple(counts),
                                     tuple(counts), (out, n))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            change = BIAS_CHANGE * torch.randn(parameter.shape, generator=generator)
            whole[name] = (parameter.float().cpu() + change).to(parameter.dtype)
    nothing = Manifest(base="", finetuned="", dtype="bfloat16", fingerprint={}, config={},
                       calibration={}, compressed={}, whole={}, extra_rows=[], tied=[], equal={},
                       absent=[])
    return ModelDelta(matrices, whole, {}, nothing)


def model_bytes(model: nn.Module) -> int:
    """Of its parameters."""
    return sum(parameter.nbytes for parameter in model.parameters())


@dataclass(frozen=True)
class Times:
    """Milliseconds."""

    ms: float
    ms_min: float
    ms_max: float
    count: int


class Sequences:
    """A batch of equal prompts' lengths on one model: prefilled, then decoded a token a step.

    On a GPU the step is captured in a CUDA graph, which reads tokens and positions where they are
    and writes the next ones there.
    """

    def __init__(self, model: PreTrainedModel, prompts: Tensor, *, compiled: bool = False) -> None:
        self.model, self.prompts = model, prompts
        self.cache = StaticCache(config=model.config, max_cache_len=prompts.shape[1] + NEW_TOKENS)
        self.tokens = torch.zeros_like(prompts[:, :1])
        self.positions = torch.zeros_like(prompts[:, :1])
        self.graph: torch.cuda.CUDAGraph | None = None
        self._forward = model
        if compiled:
            self._forward = torch.compile(model.forward, fullgraph=True, dynamic=False)

    @property
    def cache_bytes(self) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)

    @torch.inference_mode()
    def prefill(self) -> Tensor:
        """Logits `[rows, vocabulary]` of the token after each prompt; the sequences begin anew."""
        self.cache.reset()
        positions = torch.arange(self.prompts.shape[1], device=self.prompts.device)
        output = self.model(input_ids=self.prompts, position_ids=positions[None],
                            past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.tokens.copy_(output.logits[:, -1].argmax(-1, keepdim=True))
        self.positions.fill_(self.prompts.shape[1])
        return output.logits[:, -1]

    @torch.inference_mode()
    def step(self) -> None:
        """The next token of every row."""
        output = self._forward(input_ids=self.tokens, position_ids=self.positions,
                               past_key_values=self.cache, use_cache=True)
        self.tokens.copy_(output.logits[:, -1].argmax(-1, keepdim=True))
        self.positions.add_(1)

    def capture(self) -> None:
        """Capture a step; as many as are used up by warming up are lost to the sequences."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_STEPS):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.step()

    def advance(self) -> None:
        """A step, by its graph where it has one."""
        if self.graph is not None:
            self.graph.replay()
        else:
            self.step()


def measure(call: Callable[[], object], count: int, device: str) -> Times:
    """The call again and again, one after the other as they are queued; the time of each."""
    if device == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        events[0].record()
        for event in events[1:]:
            call()
            event.record()
        torch.cuda.synchronize()
        times = [a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False)]
    else:
        times = []
        for _ in range(count):
            start = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - start))
    return Times(statistics.median(times), min(times), max(times), count)


def measure_decode(batches: Sequence[Sequences], device: str) -> tuple[Times, str]:
    """A token of every row of every batch, the batches in turn; and how the steps ran."""
    path, count = "CUDA graph", NEW_TOKENS - 2 * WARM_STEPS - 2
    for batch in batches:
        batch.prefill()
    try:
        for batch in batches if device == "cuda" else ():
            batch.capture()
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        torch.cuda.synchronize()
        path = f"eager ({str(error).splitlines()[0][:80]})"
        for batch in batches:
            batch.graph = None
            batch.prefill()
    if device != "cuda":
        path, count = "eager", 8

    def step() -> None:
        for batch in batches:
            batch.advance()

    for _ in range(WARM_STEPS):
        step()
    return measure(step, min(count, 64), device), path
