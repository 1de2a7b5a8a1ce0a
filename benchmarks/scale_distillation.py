"""BitDelta's second step (Liu et al., arXiv 2402.10193, section 3): scales trained by the model.

The scale of every sign matrix is trained until the model's logits are near the fine-tune's:
least Σ ‖logits(x) − logits_ft(x)‖², signs and all else fixed. As there, Adam with four samples of
128 tokens a step, 200 steps; but the samples are the calibration's tokens, over again where there
are fewer, and what is trained is a factor on mean |ΔW|, from 1 on, so that one rate suits any ΔW.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from adamix.tuning import samples_of

BATCH, STEPS = 4, 200  # samples a step; steps
LEARNING_RATE = 0.01  # of a factor


def distilled(model: nn.Module, weights: Mapping[str, Tensor], deltas: Mapping[str, Tensor],
              reference: nn.Module, tokens: Tensor, *, steps: int = STEPS) -> dict[str, Tensor]:
    """α sign(ΔW) of every matrix, α trained and in 16 bits.

    Args:
        model: the fine-tune restored but for these matrices.
        weights: the base's, by layer name.
        deltas: ΔW of the same layers.
        reference: the fine-tune.
        tokens: `[sequences, length]` that calibrate.
    """
    device = tokens.device
    signs = {name: torch.where(delta >= 0, 1.0, -1.0).to(device)
             for name, delta in deltas.items()}
    scales = torch.stack([delta.abs().mean() for delta in deltas.values()]).to(device)
    factors = torch.ones_like(scales, requires_grad=True)
    optimizer = torch.optim.Adam([factors], lr=LEARNING_RATE)
    samples = samples_of(tokens)
    for step in range(steps):
        ids = samples[(torch.arange(BATCH, device=device) + BATCH * step) % len(samples)]
        with torch.no_grad():
            wanted = reference(input_ids=ids, use_cache=False).logits
        alpha = (scales * factors).unbind()
        parameters = {f"{name}.weight": weights[name] + one * signs[name]
                      for name, one in zip(signs, alpha, strict=True)}
        logits = functional_call(model, parameters, kwargs={"input_ids": ids, "use_cache": False})
        loss = nn.functional.mse_loss(logits.logits, wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    alpha = (scales * factors.detach()).half().float()
    return {name: (one * signs[name]).cpu() for name, one in zip(signs, alpha, strict=True)}
