"""What bench_paper.py measures beside accuracy: errors of outputs, seconds, components, plans."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import torch
from answers import LINEARS, block_linears
from few_widths import Solve
from methods.reconstruction import Reconstruction
from paper_rows import WIDTHS
from torch import Tensor, nn
from transformers import PreTrainedModel

import adamix
from adamix.budget import COUNTS_BYTES
from adamix.compression import matrix
from adamix.compression.allocate import allocate
from adamix.compression.decompose import decompose
from adamix.compression.hessian import hessian
from adamix.compression.simulate import simulate
from adamix.errors import BudgetError
from adamix.naming import index_of
from adamix.storage.pack import pack

GROUPS = ("low", "mid", "high")
OUTLIERS = 0.01  # of the outputs
STAGES = ("decomposition", "simulation", "optimization", "quantization")


def kind_of(name: str) -> str:
    """`model.layers.3.mlp.up_proj` -> `up_proj`."""
    return name.removesuffix(".weight").rpartition(".")[2]


def group_of(layer: int, layers: int) -> str:
    """The third that a layer is of; what is left over is of the last (28: 9, 9 and 10, as in the
    paper)."""
    return GROUPS[min(layer // max(layers // 3, 1), 2)] if layers >= 3 else GROUPS[2]


# --- errors of the outputs (Tables 8 and 10) ---------------------------------------------------


@dataclass(frozen=True)
class OutputErrors:
    """Of one linear layer; `out`: over its largest outputs."""

    error_all: float  # relative
    error_out: float
    square_all: float  # mean square lost an output
    square_out: float


def output_errors(X: Tensor, delta: Tensor, lost: Tensor, outputs: Tensor) -> OutputErrors:
    """The paper's eq. 1 over all outputs, and over the 1 % that are largest in the fine-tune.

    The paper (5.3) has "the average error for the top 1% of activations with the largest absolute
    values in the aligned model". Eq. 1 is a sum over the outputs W X of a layer, so activations are
    taken to be these: an entry of W_ft X for each output feature and token. "Out" are the 1 % of
    all entries of the layer with the largest |W_ft X|, of whatever feature and token.

    Args:
        X: inputs `[tokens, in]`.
        delta: ΔW `[out, in]`.
        lost: ΔW − Δ̂ `[out, in]`.
        outputs: W_ft X `[tokens, out]`.
    """
    wanted, missed = (X @ delta.T).square(), (X @ lost.T).square()
    count = max(1, round(OUTLIERS * outputs.numel()))
    largest = outputs.abs().flatten().topk(count, sorted=False).indices
    over = wanted.flatten()[largest], missed.flatten()[largest]
    sums = [part.double().sum().item() for part in (wanted, missed, *over)]
    return OutputErrors(sums[1] / sums[0], sums[3] / sums[2], sums[1] / outputs.numel(),
                        sums[3] / count)


@torch.inference_mode()
def model_errors(reference: PreTrainedModel, base: PreTrainedModel, restored: PreTrainedModel,
                 tokens: Tensor) -> dict[str, OutputErrors]:
    """Of every linear layer of the blocks, on what enters it in the fine-tune; layer by layer, as
    one forward pass of the fine-tune comes to it.

    Args:
        tokens: ids `[sequences, length]`, all in the one pass.
    """
    found: dict[str, OutputErrors] = {}
    before, after = block_linears(base), block_linears(restored)

    def hook_of(name: str) -> Callable[[nn.Linear, tuple[Tensor, ...], Tensor], None]:
        def hook(layer: nn.Linear, given: tuple[Tensor, ...], output: Tensor) -> None:
            found[name] = output_errors(
                given[0].flatten(0, -2), layer.weight - before[name].weight,
                layer.weight - after[name].weight, output.flatten(0, -2))
        return hook

    hooks = [layer.register_forward_hook(hook_of(name))
             for name, layer in block_linears(reference).items()]
    try:
        reference(input_ids=tokens.to(reference.device), use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def by_group(errors: Mapping[str, OutputErrors], layers: int
             ) -> Iterator[tuple[str, str, list[OutputErrors]]]:
    """(group, type of layer, the errors of its matrices)."""
    of: dict[tuple[str, str], list[OutputErrors]] = {}
    for name, error in errors.items():
        of.setdefault((group_of(index_of(name)[0], layers), kind_of(name)), []).append(error)
    for group in GROUPS:
        yield from ((group, kind, of[group, kind]) for kind in LINEARS if (group, kind) in of)


# --- this project's method with few widths (Table 6) -------------------------------------------


def ours(delta: Tensor, gram: Tensor, budget_bits: int, *, max_widths: int | None, solve: Solve
         ) -> Reconstruction | None:
    """A method as those of `methods/`, its integer programs solved by `solve`."""
    config = adamix.Config(separate_widths=False, max_widths=max_widths)  # as f_max counts
    try:
        found = matrix.quantize_matrix(delta, hessian(gram, config.damping), config,
                                       budget_bits=budget_bits - 8 * COUNTS_BYTES, solve=solve)
    except BudgetError:
        return None
    packed = pack(found.delta)
    return Reconstruction(packed.dequantize(), 8 * packed.nbytes, packed.rank)


# --- seconds by stage (Table 9) ----------------------------------------------------------------


class Stages:
    """Adds up what the product's own steps take, each waited for on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds = dict.fromkeys(STAGES, 0.0)

    def timed(self, stage: str, step: Callable[..., object]) -> Callable[..., object]:
        def run(*given: object, **named: object) -> object:
            begin = self.now()
            result = step(*given, **named)
            self.seconds[stage] += self.now() - begin
            return result
        return run

    def now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    @contextmanager
    def watching(self) -> Iterator[Callable[..., object]]:
        """The steps of `quantize_matrix` are timed in the block; yields what solves."""
        steps = {name: self.timed(stage, getattr(matrix, name)) for name, stage in (
            ("decompose", "decomposition"), ("simulate", "simulation"),
            ("_quantize", "quantization"))}
        with patch.multiple(matrix, **steps):
            yield self.timed("optimization", allocate)


def stage_seconds(delta: Tensor, gram: Tensor, config: adamix.Config) -> dict[str, float]:
    """Seconds of each of STAGES, of what is `other`, and the `whole`, for one matrix on its own.

    The Hessian and its factors count as decomposition here; in a compression layers with the same
    input share them.
    """
    stages = Stages(delta.device)
    begin = stages.now()
    H = stages.timed("decomposition", hessian)(gram, config.damping)
    with stages.watching() as solve:
        matrix.quantize_matrix(delta, H, config, solve=solve)
    whole = stages.now() - begin
    return stages.seconds | {"other": whole - sum(stages.seconds.values()), "whole": whole}


# --- components (Figure 2) ---------------------------------------------------------------------


def components(delta: Tensor, gram: Tensor) -> tuple[list[float], list[list[float]]]:
    """Singular values of ΔW; ΔV_i H ΔV_iᵀ of each component at each of WIDTHS (paper eq. 5)."""
    H = hessian(gram, adamix.Config.preset("paper").damping)
    factors = decompose(delta, H, min(delta.shape), plain=True)
    errors = simulate(factors, H, WIDTHS, include_u=False).v_errors
    return factors.s.tolist(), (errors / factors.s[:, None] ** 2).tolist()
