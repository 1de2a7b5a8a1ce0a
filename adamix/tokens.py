"""The token ids that calibrate: given, read from text, or written by the models themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import transformers
from torch import Tensor, cat

from adamix.calibration.filling import fill, move_buffers, own_tensors
from adamix.calibration.sampling import sample
from adamix.calibration.texts import token_hash, tokenize
from adamix.calibration.token_ids import Source, given_ids
from adamix.config import SHORT_TEXT, Config
from adamix.devices import Compute
from adamix.errors import CalibrationError
from adamix.memory import sampling_threads
from adamix.parallel import workers
from adamix.progress import Progress
from adamix.ranks import Ranks
from adamix.source.architecture import describe
from adamix.source.checkpoints import Checkpoint, context_of
from adamix.source.models import empty_model, find_tokenizer, load_model, skeleton
from adamix.source.parts import ModelTensors
from adamix.storage.work import NoFolder, WorkFolder

LABELS = {"auto": "self", "finetuned": "self", "both": "both", "base": "base"}  # equally long


def read_tokens(finetuned: Checkpoint, vocabulary: int, config: Config, calibration: Source,
                progress: Progress, beside: Sequence[Path] = ()) -> Tensor:
    """Token ids of a text to calibrate with, or as they are given; where the fine-tune has no
    tokenizer, the first folder `beside` that has one."""
    limit = context_of(finetuned)
    given = given_ids(calibration, vocabulary=vocabulary, longest=limit)
    if given is not None:
        return given
    tokenizer = find_tokenizer([finetuned.folder, *beside])
    if tokenizer is None:
        raise CalibrationError(f"{finetuned.source} has no tokenizer to read text with")
    progress.stage("tokenizing calibration text", 1)
    tokens = tokenize(calibration, tokenizer, sequences=config.calibration_sequences,
                      length=min(config.calibration_length, limit or config.calibration_length),
                      seed=config.seed)
    progress.advance()
    return tokens


def writers(config: Config) -> tuple[int, int]:
    """How many sequences the base writes, and the fine-tune, where no text is given; with "auto"
    where the fine-tune's texts are not short."""
    count = config.calibration_sequences
    base = {"both": count // 2, "base": count}.get(config.sample_from, 0)
    return base, count - base


def settled(config: Config, tokens: Tensor) -> Config:
    """The configuration with the writers of these tokens in place of "auto", which goes by the
    sequences that are the fine-tune's in either case."""
    if config.sample_from != "auto":
        return config
    both = replace(config, sample_from="both")
    length = document_length(tokens, both) or 0.0
    is_short = length < min(SHORT_TEXT, tokens.shape[1] / 2)
    return both if is_short else replace(config, sample_from="finetuned")


def own_tokens(work: WorkFolder | NoFolder, sources: tuple[Checkpoint, Checkpoint],
               config: Config, compute: Compute, threads: int, max_memory: int | None,
               progress: Progress, ranks: Ranks) -> Tensor:
    """Token ids that the models write themselves, by an earlier run where it got so far: the
    fine-tune's sequences, then the base's.

    A model is in memory for as long as this takes, and no longer.
    """
    tokens, sha256 = ranks.main(work.tokens) or (None, "")
    if tokens is None or token_hash(tokens) != sha256:
        base, finetuned = sources
        vocabulary = empty_model(finetuned.folder).get_input_embeddings().weight.shape[0]
        write = _Sampler(config, vocabulary, compute, threads, max_memory, progress, ranks).tokens
        by_base, by_finetune = writers(config)
        length = _length(config, [finetuned, base] if by_base else [finetuned])
        parts: list[Tensor] = []
        if by_finetune:
            parts = [write(finetuned, by_finetune, 0, length)]
            by_base, by_finetune = writers(settled(config, parts[0]))
        if by_base:
            length = _length(config, [finetuned, base])
            parts = [*(part[:by_finetune, :length] for part in parts),
                     write(base, by_base, by_finetune, length)]
        tokens = cat(parts)
        work.keep_tokens(tokens, token_hash(tokens))
    return tokens


def _length(config: Config, sources: list[Checkpoint]) -> int:
    """Tokens of a sequence: no more than any of the models reads."""
    settings = [empty_model(source.folder).config.get_text_config() for source in sources]
    longest = [getattr(one, "max_position_embeddings", None) for one in settings]
    return min([config.calibration_length, *filter(None, longest)])


def document_length(tokens: Tensor, config: Config) -> float | None:
    """Mean tokens of a text that the fine-tune has written, the first of which begins every one;
    None where it has written none. Of a configuration that is settled."""
    own = tokens[: writers(config)[1]]
    return own.numel() / (own == own[0, 0]).sum().item() if len(own) else None


@dataclass(frozen=True)
class _Sampler:
    """Has a model write sequences that the fine-tune can read."""

    config: Config
    vocabulary: int  # ids are below
    compute: Compute
    threads: int
    max_memory: int | None
    progress: Progress
    ranks: Ranks

    def tokens(self, source: Checkpoint, sequences: int, first: int, length: int) -> Tensor:
        """`[sequences, length]` of a model, of numbers from `first` on; each rank writes some."""
        tokenizer = find_tokenizer([source.folder])
        settings = empty_model(source.folder).config.get_text_config()
        end = tokenizer.eos_token_id if tokenizer else settings.eos_token_id
        begins = (tokenizer.bos_token_id if tokenizer else None, settings.bos_token_id, end)
        start = next((token for token in begins if token is not None), None)
        if not isinstance(start, int):
            alone = ", or --sample-from finetuned" if first else ""  # which has written already
            raise CalibrationError(f"{source.source} names no token that begins a text: "
                                   f"give --calibration FILE{alone}")
        self.progress.stage("sampling calibration text", sequences)
        with workers(self._at_once(source)) as executor:
            return sample(
                _load(source, self.compute), start, end if isinstance(end, int) else None,
                sequences=sequences, length=length, seed=self.config.seed, first=first,
                most=self.vocabulary, executor=executor, on_chunk=self.progress.advance,
                mine=self.ranks.mine, gather=self.ranks.gather)

    def _at_once(self, source: Checkpoint) -> int:
        """Chunks of text at a time."""
        if self.compute.is_cuda:
            return 1
        if self.max_memory is None:
            return self.threads
        return sampling_threads(
            self.max_memory, [shape for shape, _ in source.headers.values()],
            empty_model(source.folder).config, self.config.calibration_length, self.threads)


def _load(source: Checkpoint, compute: Compute) -> transformers.PreTrainedModel:
    """The whole model where it computes; on a GPU tensor by tensor, if they are all there by the
    model's own names, so that the host never holds them."""
    if not compute.is_cuda:
        return load_model(source.folder)
    model = skeleton(source.folder)
    tensors = ModelTensors(source, describe(source.folder, source.names).parts)
    names = {name: tuple(tensor.shape) for name, tensor in own_tensors(model)}
    if any(tensors.shapes.get(name) != shape for name, shape in names.items()):
        return load_model(source.folder, compute.dtype).to(compute.device)
    fill(model, tensors.read, compute.device, compute.dtype)
    move_buffers(model, compute.device)
    return model


def origin_of(calibration: Source | None, config: Config, tokens: Tensor | None = None
              ) -> dict[str, object]:
    """Where the calibration comes from, "self" being the fine-tune; without tokens in the most
    characters that it can take."""
    label = (LABELS[config.sample_from] if calibration is None else
             str(calibration) if isinstance(calibration, (str, Path)) else
             "token ids" if isinstance(calibration, Tensor) else "strings")
    shape = (config.calibration_sequences, config.calibration_length)
    rows, length = shape if tokens is None else tokens.shape
    return {"source": label, "sequences": rows, "length": length,
            "sha256": "0" * 64 if tokens is None else token_hash(tokens)}
