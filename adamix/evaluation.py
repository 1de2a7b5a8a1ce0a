"""evaluate: what the base, the fine-tune and the compressed fine-tune score on the same texts."""

from __future__ import annotations

import gc
import json
import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor

from adamix.calibration.texts import documents, join_answer
from adamix.errors import AdamixError, CalibrationError
from adamix.generation import answer, tokenizer_of
from adamix.merging import restored_model
from adamix.parallel import workers
from adamix.progress import Progress, Silent
from adamix.source.checkpoints import Checkpoint
from adamix.source.models import load_model
from adamix.storage.file import read_manifest

CONTEXT = 1024  # tokens a window at most
LOGITS_AT_ONCE = 2**25  # numbers of one forward pass: 128 MiB in fp32, for any vocabulary
SOFTMAX_AT_ONCE = 2**23  # numbers whose log-softmax is held in fp64: 64 MiB


@dataclass(frozen=True)
class Prompt:
    """A question with its one right answer."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Scores:
    """What one model scores; None where there was nothing to measure it on."""

    perplexity: float | None = None  # on the text
    kl_text: float | None = None  # mean KL(fine-tune ‖ model) a token in nats, on the text
    kl_prompts: float | None = None  # the same on prompt + answer
    correct: int | None = None  # answers that agree exactly
    accuracy: float | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Evaluation:
    """The scores side by side; None for a model that was not given."""

    base: Scores | None
    finetuned: Scores | None
    compressed: Scores | None
    prompts: int
    text_tokens: int  # scored

    def to_dict(self) -> dict[str, object]:
        """JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Window:
    """Token ids of one forward pass; the predictions of the ids from `first` on count."""

    ids: Tensor  # [length] int64
    first: int  # >= 1


def evaluate(base: str | Path | None, finetuned: str | Path | None = None,
             delta: str | Path | None = None, *, text: str | Path | None = None,
             prompts: str | Path | Sequence[Prompt] | None = None, limit: int | None = None,
             max_new_tokens: int = 32, batch_size: int = 16, context: int = CONTEXT,
             progress: Progress | None = None) -> Evaluation:
    """Score up to three models, all in fp32.

    At most two models are in memory at a time: KL needs the fine-tune's distribution beside the
    other's, and for a vocabulary of 150 000 storing it would take 0.6 MB a token.

    Args:
        base, finetuned: checkpoints; None leaves the model out (a delta needs its base, and
            without the fine-tune there is no KL).
        delta: a delta folder; its model is restored as base + Δ̂.
        prompts: a `.jsonl` file of {"prompt", "answer"}, or `Prompt`s: greedy generation, the
            answer must agree exactly but for white space at its ends.
        text: a text file, or a `.jsonl` of documents, each of which is then scored on its own.
        limit: how many prompts at most.
        max_new_tokens: of an answer.
        batch_size: prompts generated together.
        context: tokens a window of the text at most; windows overlap by half, and each begins
            with the tokenizer's begin token where it sets one.
        progress: told about the stages.

    Raises:
        AdamixError: a model or a file cannot be read.
    """
    given = [("base", base), ("fine-tune", finetuned), ("compressed", delta)]
    if all(path is None for _, path in given) or (delta is not None and base is None):
        raise AdamixError("nothing to evaluate: give a base, a fine-tune, or a base and a delta")
    for path in (base, finetuned):  # faults now, not after the first model's hour
        if path is not None:
            Checkpoint(path)
    if delta is not None:
        read_manifest(Path(delta))
    tokenizer = tokenizer_of([path for path in (finetuned, delta, base) if path is not None])
    asked = read_prompts(prompts, limit)
    answered = [answered_window(tokenizer, prompt) for prompt in asked]
    texts = _texts(tokenizer, text)
    scored = sum(len(ids) - 1 for ids in texts)
    scores: dict[str, Scores | None] = dict.fromkeys(("base", "fine-tune", "compressed"))
    with workers() as executor:
        run = _Run(tokenizer, asked, answered, texts, max_new_tokens, batch_size, context,
                   progress or Silent(), executor)
        reference = None if finetuned is None else load_model(Checkpoint(finetuned).folder)
        if reference is not None:
            scores["fine-tune"] = run.scores("fine-tune", reference, None)
        if base is not None:
            model = load_model(Checkpoint(base).folder)
            scores["base"] = run.scores("base", model, reference)
            del model
            gc.collect()
        if delta is not None:
            model = restored_model(str(base), delta)
            scores["compressed"] = run.scores("compressed", model, reference)
    return Evaluation(scores["base"], scores["fine-tune"], scores["compressed"], len(asked), scored)


@dataclass(frozen=True)
class _Run:
    """The texts and settings that every model is scored on."""

    tokenizer: transformers.PreTrainedTokenizerBase
    prompts: list[Prompt]
    answered: list[Window]
    texts: list[Tensor]
    max_new_tokens: int
    batch_size: int
    context: int
    progress: Progress
    executor: Executor

    def scores(self, name: str, model: transformers.PreTrainedModel,
               reference: transformers.PreTrainedModel | None) -> Scores:
        """Everything that can be measured on one model."""
        start = time.perf_counter()
        perplexity = kl_text = kl_prompts = correct = None
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if self.texts and _knows(model, self.texts):
            length = min(self.context, limit or self.context)
            windows = [window for text in self.texts
                       for window in sliding_windows(text, length, self.tokenizer.bos_token_id)]
            self.progress.stage(f"{name}: text", len(windows))
            loss, kl_text = score_windows(model, windows, reference, executor=self.executor,
                                          progress=self.progress)
            perplexity = math.exp(min(loss, 700.0))
        known = _knows(model, [document.ids for document in self.answered])
        if self.answered and reference is not None and known:
            self.progress.stage(f"{name}: prompts with answers", len(self.answered))
            windows = [Window(document.ids[:limit], 1) for document in self.answered]
            _, kl_prompts = score_windows(model, windows, reference, executor=self.executor,
                                          progress=self.progress)
        if self.prompts and known:
            self.progress.stage(f"{name}: answering", len(self.prompts))
            correct = self._correct(model)
        accuracy = None if correct is None else correct / len(self.prompts)
        return Scores(perplexity, kl_text, kl_prompts, correct, accuracy,
                      time.perf_counter() - start)

    def _correct(self, model: transformers.PreTrainedModel) -> int:
        def count(batch: list[Prompt]) -> int:
            answers = answer(model, self.tokenizer, [prompt.prompt for prompt in batch],
                             max_new_tokens=self.max_new_tokens)
            return sum(got.strip() == prompt.answer.strip()
                       for got, prompt in zip(answers, batch, strict=True))

        batches = [self.prompts[first : first + self.batch_size]
                   for first in range(0, len(self.prompts), self.batch_size)]
        correct = 0
        for batch, hits in zip(batches, self.executor.map(count, batches), strict=True):
            correct += hits
            self.progress.advance(len(batch))
        return correct


def sliding_windows(ids: Tensor, length: int, begin: int | None = None) -> Iterator[Window]:
    """Windows of `length` tokens that overlap by half; every token but the first counts once, with
    at least half a window before it (from the second window on). Where the ids begin with the
    token `begin`, every window does: without it such models predict far worse than they can."""
    lead = ids[:1] if begin is not None and ids[0] == begin else ids[:0]
    body, room = ids[len(lead) :], length - len(lead)
    scored = 1 - len(lead)
    for start in range(0, len(body), max(room // 2, 1)):
        end = min(start + room, len(body))
        if end > scored:
            yield Window(torch.cat([lead, body[start:end]]), len(lead) + scored - start)
            scored = end


def score_windows(model: transformers.PreTrainedModel, windows: Sequence[Window],
                  reference: transformers.PreTrainedModel | None = None, *,
                  executor: Executor | None = None, progress: Progress | None = None
                  ) -> tuple[float, float | None]:
    """Mean cross-entropy, and mean KL(reference ‖ model) over the vocabulary that both have.

    Args:
        model: in eval mode.
        windows: any lengths >= 2.
        reference: None for no KL; on the model's device.
        executor: runs the batches; None for one after the other.

    Returns:
        Both in nats a scored token; the second None without a reference.
    """
    @torch.inference_mode()
    def score(batch: list[Window]) -> tuple[float, float, int]:
        ids = torch.stack([window.ids for window in batch]).to(model.device)
        logits = model(input_ids=ids, use_cache=False).logits
        theirs = None if reference is None else reference(input_ids=ids, use_cache=False).logits
        loss = divergence = 0.0
        for row, window in enumerate(batch):
            predicting = slice(window.first - 1, len(window.ids) - 1)
            other = None if theirs is None else theirs[row, predicting]
            part = _sums(logits[row, predicting], ids[row, window.first :], other)
            loss, divergence = loss + part[0], divergence + part[1]
        return loss, divergence, sum(len(window.ids) - window.first for window in batch)

    batches = list(_batches(windows, model.config.get_text_config().vocab_size))
    loss = divergence = 0.0
    tokens = 0
    parts = map(score, batches) if executor is None else executor.map(score, batches)
    for batch, part in zip(batches, parts, strict=True):
        loss, divergence, tokens = loss + part[0], divergence + part[1], tokens + part[2]
        if progress is not None:
            progress.advance(len(batch))
    tokens = max(tokens, 1)
    return loss / tokens, None if reference is None else divergence / tokens


def _sums(logits: Tensor, targets: Tensor, theirs: Tensor | None) -> tuple[float, float]:
    """Summed cross-entropy and KL of logits `[tokens, vocabulary]`; fp64, a few rows at a time."""
    loss = divergence = 0.0
    rows = max(SOFTMAX_AT_ONCE // logits.shape[1], 1)
    for first in range(0, len(targets), rows):
        part = slice(first, first + rows)
        log_q = logits[part].double().log_softmax(dim=-1)
        loss -= log_q.gather(1, targets[part, None]).sum().item()
        if theirs is not None:
            shared = min(logits.shape[1], theirs.shape[1])
            log_p = theirs[part, :shared].double().log_softmax(dim=-1)
            if shared < logits.shape[1]:
                log_q = logits[part, :shared].double().log_softmax(dim=-1)
            divergence += (log_p.exp() * (log_p - log_q)).sum().item()
    return loss, divergence


def _batches(windows: Sequence[Window], vocabulary: int) -> Iterator[list[Window]]:
    """Windows of equal length whose logits fit `LOGITS_AT_ONCE`: no padding, so no masks."""
    batch: list[Window] = []
    for window in sorted(windows, key=lambda window: len(window.ids)):
        most = max(LOGITS_AT_ONCE // (len(window.ids) * vocabulary), 1)
        if batch and (len(batch[0].ids) != len(window.ids) or len(batch) >= most):
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def _knows(model: transformers.PreTrainedModel, texts: list[Tensor]) -> bool:
    """Whether every id is in the model's vocabulary: a base may lack the fine-tune's tokens."""
    rows = model.get_input_embeddings().weight.shape[0]
    return all(int(ids.max()) < rows for ids in texts)


def answered_window(tokenizer: transformers.PreTrainedTokenizerBase, prompt: Prompt) -> Window:
    """A prompt with its answer and the end; every token but the first counts."""
    ids = tokenizer(join_answer(prompt.prompt, prompt.answer))["input_ids"]
    if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
        ids = [*ids, tokenizer.eos_token_id]
    return Window(torch.tensor(ids), 1)


def _texts(tokenizer: transformers.PreTrainedTokenizerBase, source: str | Path | None
           ) -> list[Tensor]:
    """Token ids of each document."""
    if source is None:
        return []
    rows = [tokenizer(document)["input_ids"] for document in documents(source, tokenizer)]
    texts = [torch.tensor(row, dtype=torch.long) for row in rows if len(row) >= 2]
    if not texts:
        raise CalibrationError(f"{source} holds no text")
    return texts


def read_prompts(source: str | Path | Sequence[Prompt] | None, limit: int | None) -> list[Prompt]:
    """The first `limit` of a `.jsonl` file of {"prompt", "answer"}, or of what is there already."""
    if source is None:
        return []
    if not isinstance(source, (str, Path)):
        return list(source)[:limit]
    prompts = []
    for number, line in enumerate(_read(source).splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            prompts.append(Prompt(str(record["prompt"]), str(record["answer"])))
        except (ValueError, KeyError, TypeError) as error:
            raise CalibrationError(f'{source}, line {number}: expected JSON with "prompt" and '
                                   f'"answer": {error}') from error
    if not prompts:
        raise CalibrationError(f"{source} holds no prompts")
    return prompts[:limit]


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path} cannot be read as text: {error}") from error
