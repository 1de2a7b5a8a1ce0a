"""Training the example pair: packed documents, one loop, what keeps a delta near its base."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

CONTEXT = 256
SHRINK_EVERY = 50


@dataclass(frozen=True)
class Schedule:
    """How one of the two models is trained."""

    steps: int
    batch: int
    learning_rate: float
    warmup: int
    decay_to_start: float = 0.0
    """Decoupled weight decay towards the starting weights (0 for none)."""
    delta_noise: float = 0.0
    """Energy of the noise on each matrix during a step, relative to its delta's energy."""
    spectral_decay: float = 0.0
    """How much every singular value of a matrix's delta shrinks a step, times the learning rate."""


@dataclass(frozen=True)
class Corpus:
    """Documents ``<bos>text<eos>`` packed into one stream, with the place where each begins."""

    stream: Tensor
    starts: Tensor

    @staticmethod
    def build(tokenizer: PreTrainedTokenizerFast, texts: list[str], device: str) -> Corpus:
        """Tokenize and pack ``texts`` in their order."""
        rows = [coded.ids for coded in tokenizer.backend_tokenizer.encode_batch_fast(texts)]
        lengths = torch.tensor([len(row) + 1 for row in rows])
        stream = torch.tensor([token for row in rows for token in (*row, tokenizer.eos_token_id)])
        starts = lengths.cumsum(0) - lengths
        starts = starts[starts + CONTEXT < len(stream)]
        return Corpus(stream.to(device), starts.to(device))

    def sample(self, batch: int, generator: torch.Generator) -> Tensor:
        """Rows of ``CONTEXT + 1`` tokens, each from the beginning of a random document."""
        device = self.stream.device
        chosen = torch.randint(len(self.starts), (batch,), generator=generator, device=device)
        window = torch.arange(CONTEXT + 1, device=device)
        return self.stream[self.starts[chosen][:, None] + window]


def loss_on(model: nn.Module, rows: Tensor) -> Tensor:
    """Mean cross-entropy of every token of ``rows`` after the first."""
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


class StartPoint:
    """The weights a training began with, to pull towards and to scale the noise by."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = list(model.parameters())
        self.start = [parameter.detach().clone() for parameter in self.parameters]
        self.matrices = [i for i, p in enumerate(self.parameters) if p.ndim == 2]

    @torch.no_grad()
    def pull(self, share: float) -> None:
        """Move every parameter by ``share`` of its way back to where it began."""
        torch._foreach_lerp_(self.parameters, self.start, share)

    @torch.no_grad()
    def shrink_spectra(self, threshold: float) -> None:
        """Lower every singular value of every matrix's delta by ``threshold``, to zero at most.

        The proximal step of the nuclear norm: what a step pushes only a little, in directions that
        the tasks do not ask for, goes back to the base, and the delta's spectrum stays decaying.
        """
        by_shape: dict[torch.Size, list[int]] = {}
        for i in self.matrices:
            by_shape.setdefault(self.parameters[i].shape, []).append(i)
        for members in by_shape.values():
            deltas = torch.stack([self.parameters[i] - self.start[i] for i in members]).double()
            tall = deltas if deltas.shape[1] >= deltas.shape[2] else deltas.mT
            energies, right = torch.linalg.eigh(tall.mT @ tall)
            values = energies.clamp_min(1e-30).sqrt()
            kept = (1 - threshold / values).clamp_min(0.0)
            tall = tall @ ((right * kept[:, None, :]) @ right.mT)
            shrunk = tall if deltas.shape[1] >= deltas.shape[2] else tall.mT
            for i, delta in zip(members, shrunk, strict=True):
                self.parameters[i].copy_(self.start[i] + delta)

    @contextmanager
    def noise(self, energy: float) -> Iterator[None]:
        """Within the block, add Gaussian noise of ``energy`` times the delta's to each matrix."""
        if not energy:
            yield
            return
        matrices = [self.parameters[i].data for i in self.matrices]
        clean = [matrix.clone() for matrix in matrices]
        deltas = torch._foreach_sub(matrices, [self.start[i] for i in self.matrices])
        for matrix, norm in zip(matrices, torch._foreach_norm(deltas), strict=True):
            scale = norm * math.sqrt(energy / matrix.numel())
            matrix.add_(torch.randn_like(matrix) * scale)
        try:
            yield
        finally:
            torch._foreach_copy_(matrices, clean)


def learning_rate_at(step: int, schedule: Schedule) -> float:
    """Linear warm-up, then a cosine to zero."""
    if step < schedule.warmup:
        return schedule.learning_rate * (step + 1) / schedule.warmup
    progress = (step - schedule.warmup) / max(1, schedule.steps - schedule.warmup)
    return schedule.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def train(model: LlamaForCausalLM, corpus: Corpus, schedule: Schedule, seed: int) -> None:
    """Train every parameter of ``model`` in place on ``corpus``."""
    device = corpus.stream.device
    on_gpu = device.type == "cuda"
    model.to(device).train()
    start = StartPoint(model)
    generator = torch.Generator(device).manual_seed(seed)
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=schedule.learning_rate, betas=(0.9, 0.98), weight_decay=0.0,
        fused=on_gpu,
    )  # fmt: skip
    step_loss = torch.compile(loss_on) if on_gpu else loss_on
    began = time.perf_counter()
    for step in range(schedule.steps):
        rate = learning_rate_at(step, schedule)
        for group in optimizer.param_groups:
            group["lr"] = rate
        rows = corpus.sample(schedule.batch, generator)
        with start.noise(schedule.delta_noise):
            with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
                loss = step_loss(model, rows)
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if schedule.decay_to_start:
            start.pull(rate * schedule.decay_to_start)
        if schedule.spectral_decay and step % SHRINK_EVERY == SHRINK_EVERY - 1:
            start.shrink_spectra(SHRINK_EVERY * rate * schedule.spectral_decay)
        if step % 500 == 0 or step == schedule.steps - 1:
            seconds = time.perf_counter() - began
            print(f"  step {step:5d}  loss {loss.item():.4f}  {seconds:.0f} s", flush=True)
