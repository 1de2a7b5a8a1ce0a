"""tune: the scales of a delta's components, trained through the whole model.

`compress` makes each matrix's error small and cannot see how the errors of all layers add up. Here
the scales, one number a component, are trained until base and delta predict what the fine-tune
does: least KL(fine-tune ‖ model) a token, on the tokens that calibrated (BitDelta trains its one
scale a matrix on logits, arXiv 2402.10193, section 3). A model has about as many scales as there
are tokens, so each is held near to what it was: with f the logarithm of what multiplies it,

    Σ over N tokens of KL + Σ over scales of f² / (2 · 0.1²)

is what is made small, over N. Without the second term all scales drift by some 0.1, and on a model
of 135M parameters that cost more than the first one brought (benchmarks/QUALITY.md). Codes stay,
so the delta has the same bytes.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from adamix.artifacts import ModelDelta, PackedDelta
from adamix.calibration.token_ids import Source
from adamix.config import Config
from adamix.devices import find_device
from adamix.errors import AdamixError, CalibrationError
from adamix.evaluation import Window, score_windows
from adamix.merging import restored_model
from adamix.progress import Progress, Silent
from adamix.source.checkpoints import Checkpoint
from adamix.source.models import empty_model, load_model
from adamix.source.parts import find_parts
from adamix.storage.file import (
    delta_bytes,
    is_delta_file,
    new_folder,
    read_delta,
    refuse_existing,
    write_delta,
)
from adamix.storage.log import TOKENS_FILE
from adamix.tokens import read_tokens

STEPS, BATCH, SAMPLE = 200, 4, 128  # of training; samples a step; tokens of a sample at most
LEARNING_RATE = 0.02  # Adam's, of a scale's logarithm; the highest
WARMUP = 10  # steps; from then on it falls to 0 in a line
PRIOR = 0.1  # standard deviation of a scale's logarithm, as far as nothing is known of it
HELD_OUT = 8  # of so many sequences one is not trained on and says what it brought
FORMATS = ("float32", "bfloat16")


@dataclass(frozen=True)
class TuneSummary:
    """What `tune` did."""

    out: Path
    bytes: int  # of the delta, as before
    matrices: int  # whose scales were trained
    scales: int
    tokens: int  # trained on; each as often as the steps ask for
    kl_before: float  # nats a token on the sequences held out
    kl_after: float
    kept: bool  # False: it was no less, and the scales are those of before
    seconds: float


def tune(base: str | Path, finetuned: str | Path, delta: str | Path, out: str | Path, *,
         calibration: Source | None = None, steps: int = STEPS,
         learning_rate: float = LEARNING_RATE, seed: int = 0, device: str | None = None,
         dtype: str = "float32", progress: Progress | None = None) -> TuneSummary:
    """Train the scales of a delta's linear layers and embeddings and write it anew.

    Both models are in memory, and the factors of the delta. Experts' matrices, embeddings that do
    more than look up, and what is stored whole stay as they are. One sequence of eight is held
    out; where KL on these does not fall the scales stay too.

    Args:
        base, finetuned: the checkpoints that the delta was made from.
        delta: a delta folder.
        calibration: what to train on, as `compress` takes it, best of the kind that the fine-tune
            will be asked; as many sequences as there. Default: the tokens that calibrated.
        out: the folder to write; must not exist. Of the same bytes; the log in it is the old one,
            with errors of matrices as they were before.
        steps: of Adam, each of four samples of up to 128 tokens.
        learning_rate: of a scale's logarithm, the highest.
        seed: of the order of the samples.
        device: default: a GPU where there is one. The same device, threads and versions give the
            same scales.
        dtype: that the models compute in, "float32" or "bfloat16"; scales are fp32.
        progress: told about the steps.

    Raises:
        AdamixError: a subclass names the fault in one sentence; nothing is left behind.
        ValueError: a number out of its range.
    """
    start, delta, out = time.perf_counter(), Path(delta), Path(out)
    if steps < 1 or not 0 < learning_rate < 1 or dtype not in FORMATS:
        raise ValueError(f"expected steps >= 1, a learning rate in (0, 1) and a dtype of "
                         f"{' or '.join(FORMATS)}, got {steps}, {learning_rate} and {dtype}")
    refuse_existing(out)
    place = find_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    progress = progress or Silent()
    found, target = read_delta(delta), Checkpoint(finetuned)
    tokens = _tokens_of(delta) if calibration is None else _enough(read_tokens(
        target, empty_model(target.folder).config.get_text_config().vocab_size,
        Config(**found.manifest.config), calibration, progress,  # type: ignore[arg-type]
        [delta, Checkpoint(base).folder]), "the calibration")
    kind = getattr(torch, dtype)
    model = restored_model(base, delta, kind).to(place).requires_grad_(False)
    reference = load_model(target.folder, kind).to(place)
    with _Trained(model, found) as trained:
        training = _Training(model, reference, tokens.to(place), progress)
        before = training.score()
        training.run(trained.parameters, steps, learning_rate, seed)
        after = training.score()
        kept = after < before
        tuned = replace(found, matrices=found.matrices | trained.result()) if kept else found
    with new_folder(out) as folder:
        for file in delta.iterdir():
            if file.is_file() and not is_delta_file(file):
                shutil.copyfile(file, folder / file.name)
        write_delta(tuned, folder)
    scales = sum(parameter.numel() for parameter in trained.parameters)
    return TuneSummary(out, delta_bytes(out), len(trained.parameters), scales,
                       training.samples.numel(), before, after, kept, time.perf_counter() - start)


class _Trained:
    """Hooks on a restored model that add what other scales would: with f = 0 at first,
    y += Û diag(scales · (eᶠ − 1)) V̂ x. Gone after the `with` block."""

    def __init__(self, model: transformers.PreTrainedModel, delta: ModelDelta) -> None:
        parts = find_parts(model, delta.matrices)
        users: dict[nn.Parameter, list[nn.Module]] = {}  # a tied head has the embedding's weight
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                users.setdefault(parameter, []).append(module)
        self._matrices: dict[str, PackedDelta] = {}
        self.parameters: list[nn.Parameter] = []
        self._hooks: list[RemovableHandle] = []
        for name, packed in delta.matrices.items():
            part = parts.get(name)
            if part is None or part.expert is not None or not packed.rank:
                continue
            weight = model.get_parameter(part.parameter)
            if all(map(_can_be_hooked, users[weight])):
                self._matrices[name] = packed
                self._add(users[weight], packed, weight)
        if not self.parameters:
            raise AdamixError("the delta has no linear layer or embedding whose scales could be "
                              "trained")

    def _add(self, modules: list[nn.Module], packed: PackedDelta, weight: Tensor) -> None:
        V, U = (factor.to(weight) for factor in packed.factors())
        outputs = weight.shape[isinstance(modules[0], Conv1D)]
        U = nn.functional.pad(U, (0, outputs - U.shape[1])).T.contiguous()  # rows kept whole
        scales = packed.scales.to(weight.device)
        logarithm = nn.Parameter(torch.zeros_like(scales))
        self.parameters.append(logarithm)

        def more() -> Tensor:
            return (scales * logarithm.expm1()).to(weight.dtype)

        def linear(_: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
            return y + nn.functional.linear(nn.functional.linear(inputs[0], V) * more(), U)

        def lookup(_: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
            return y + (nn.functional.embedding(inputs[0], U) * more()) @ V

        for module in modules:
            is_embedding = isinstance(module, nn.Embedding)
            self._hooks.append(module.register_forward_hook(lookup if is_embedding else linear))

    def __enter__(self) -> _Trained:
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def result(self) -> dict[str, PackedDelta]:
        """The matrices with the scales as they are now."""
        return {name: replace(packed, scales=packed.scales * logarithm.detach().exp().cpu())
                for (name, packed), logarithm in zip(self._matrices.items(), self.parameters,
                                                     strict=True)}


def _can_be_hooked(module: nn.Module) -> bool:
    """Whether a module is known to compute W x, or to look up rows of W and no more."""
    return isinstance(module, (nn.Linear, Conv1D)) or type(module) is nn.Embedding


class _Training:
    """KL(reference ‖ model) on what is trained on, and on the sequences held out."""

    def __init__(self, model: transformers.PreTrainedModel,
                 reference: transformers.PreTrainedModel, tokens: Tensor, progress: Progress
                 ) -> None:
        self._model, self._reference, self._progress = model, reference, progress
        is_held_out = torch.arange(len(tokens), device=tokens.device) % HELD_OUT == 0
        self._held_out = [Window(ids.cpu(), 1) for ids in tokens[is_held_out]]
        self.samples = samples_of(tokens[~is_held_out])

    def score(self) -> float:
        """Nats a token on the sequences held out."""
        return score_windows(self._model, self._held_out, self._reference)[1]

    def run(self, parameters: list[nn.Parameter], steps: int, learning_rate: float, seed: int
            ) -> None:
        strength = 1 / (2 * PRIOR**2 * self.samples.numel())
        # A gradient that the second term has at f = PRIOR is a step's worth; lesser ones are less.
        optimizer = torch.optim.Adam(parameters, lr=learning_rate,
                                     eps=1 / (PRIOR * self.samples.numel()))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / WARMUP) * (1 - step / steps))
        self._progress.stage("tuning scales", steps)
        for _, rows in zip(range(steps), _batches(len(self.samples), seed), strict=False):
            optimizer.zero_grad()
            loss = self._loss(self.samples[rows])
            for logarithm in parameters:
                loss = loss + strength * logarithm.square().sum()
            loss.backward()
            optimizer.step()
            schedule.step()
            self._progress.advance()

    def _loss(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = _logarithms(self._reference, ids)
        return nn.functional.kl_div(_logarithms(self._model, ids), wanted, log_target=True,
                                    reduction="batchmean")


def samples_of(tokens: Tensor) -> Tensor:
    """Sequences cut into samples of SAMPLE tokens; shorter ones are samples themselves."""
    length = min(SAMPLE, tokens.shape[1])
    return tokens[:, : tokens.shape[1] // length * length].reshape(-1, length)


def _logarithms(model: transformers.PreTrainedModel, ids: Tensor) -> Tensor:
    """Of the probabilities `[tokens, vocabulary]`, fp32."""
    return model(input_ids=ids, use_cache=False).logits.float().log_softmax(dim=-1).flatten(0, 1)


def _batches(count: int, seed: int) -> Iterator[list[int]]:
    """BATCH samples each, all of them in an order of each round's own; without end."""
    generator = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    while True:
        while len(waiting) < BATCH:
            waiting += torch.randperm(count, generator=generator).tolist()
        yield waiting[:BATCH]
        waiting = waiting[BATCH:]


def _tokens_of(delta: Path) -> Tensor:
    """That calibrated, `[sequences, length]`."""
    try:
        tokens = load_file(delta / TOKENS_FILE)["input_ids"].long()
    except (OSError, KeyError, SafetensorError) as error:
        raise CalibrationError(f"{delta} has no {TOKENS_FILE}, the tokens that calibrated: "
                               f"{error}") from error
    return _enough(tokens, str(delta / TOKENS_FILE))


def _enough(tokens: Tensor, source: str) -> Tensor:
    if tokens.dim() != 2 or len(tokens) < 2 or tokens.shape[1] < 2:
        raise CalibrationError(f"{source} must hold two or more sequences of two or more tokens, "
                               f"got {list(tokens.shape)}")
    return tokens
