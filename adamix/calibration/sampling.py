"""Self-calibration: token ids sampled from the models themselves, so that nothing else has to be
supplied. Data-free calibration by the model's own generations is that of LLM-QAT (Liu et al.,
2023b, section 3.1)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from adamix.errors import CalibrationError, NonFiniteError

CHUNK = 64  # sequences sampled together at most: one random stream each chunk
# Of the keys and values of one chunk, counted in fp32: a GPU, where every step takes the same time
# for few sequences and for many, has fewer chunks.
CACHE_BYTES, GPU_CACHE_BYTES = 2**30, 10 * 2**30


def sample(model: PreTrainedModel, start: int, end: int | None, *, sequences: int, length: int,
           seed: int, executor: Executor, first: int = 0, most: int | None = None,
           on_chunk: Callable[[int], None] = lambda n: None,
           mine: Callable[[list[int]], list[int]] = lambda sizes: list(range(len(sizes))),
           gather: Callable[[dict[int, Tensor]], list[dict[int, Tensor]]] = lambda found: [found]
           ) -> Tensor:
    """Documents drawn from the model at temperature 1, one after the other in each sequence.

    A sequence begins with `start`; where the model ends a document by `end`, `start` follows. Each
    chunk of sequences has a random stream of its own, so the number of threads changes nothing.

    Args:
        model: in eval mode.
        start: id that begins a document.
        end: id that ends one, None if there is none.
        sequences, length: shape of the result.
        seed: of the random streams.
        executor: runs the chunks.
        first: number of the first sequence, of which a chunk's stream depends.
        most: no id from this one on is drawn, for models with a smaller vocabulary.
        on_chunk: told the number of sequences after each chunk.
        mine: which of chunks of so many sequences this process samples, by number.
        gather: what all processes have sampled, by the first sequence's number.

    Returns:
        int64 `[sequences, length]`.

    Raises:
        CalibrationError: `start` is outside the vocabulary.
        NonFiniteError: the model's logits are NaN or Inf.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    vocabulary = min(vocabulary, most or vocabulary)
    if not 0 <= start < vocabulary:
        raise CalibrationError(f"the token {start} that begins a document is outside the "
                               f"vocabulary of {vocabulary}: give --calibration FILE")
    rows = chunk_rows(model.config, length, gpu=model.device.type != "cpu")
    chunks = list(_chunks(sequences, rows))
    jobs = {begin: executor.submit(_sample_chunk, model, start, end, rows, length, vocabulary,
                                   _stream(seed, first + begin))
            for begin, rows in (chunks[i] for i in mine([rows for _, rows in chunks]))}
    parts = {}
    for begin, job in jobs.items():
        parts[begin] = job.result()
        on_chunk(len(parts[begin]))
    found = {begin: part for some in gather(parts) for begin, part in some.items()}
    for begin in found.keys() - parts.keys():
        on_chunk(len(found[begin]))
    return torch.cat([found[begin] for begin, _ in chunks])


def chunk_rows(config: PretrainedConfig, length: int, *, gpu: bool = False) -> int:
    """Sequences a chunk: what the cache's bound allows. A fact of the model, not of the machine."""
    bound = GPU_CACHE_BYTES if gpu else CACHE_BYTES
    return max(1, min(CHUNK, bound // cache_bytes(config, length)))


def chunk_bytes(config: PretrainedConfig, length: int, *, gpu: bool = False, itemsize: int = 4
                ) -> int:
    """What sampling one chunk takes beside the model: keys and values, which grow by copies of a
    layer's, of so many bytes a number, and the logits with what is drawn from them."""
    text = config.get_text_config()
    layers = text.num_hidden_layers
    cache = cache_bytes(config, length) * itemsize // 4
    rows = chunk_rows(config, length, gpu=gpu)
    return rows * (cache + 2 * cache // layers + 6 * 4 * text.vocab_size)


def cache_bytes(config: PretrainedConfig, length: int) -> int:
    """Keys and values of one sequence, fp32."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * 4 * text.num_hidden_layers * heads * width * length


def _chunks(sequences: int, rows: int) -> Iterator[tuple[int, int]]:
    for first in range(0, sequences, rows):
        yield first, min(rows, sequences - first)


def _stream(seed: int, first: int) -> int:
    """The seed of a chunk's random stream."""
    return (seed * 1_000_003 + first) % 2**63


@torch.inference_mode()
def _sample_chunk(model: PreTrainedModel, start: int, end: int | None, rows: int, length: int,
                  vocabulary: int, stream: int) -> Tensor:
    device = model.device
    generator = torch.Generator(device).manual_seed(stream)
    tokens = torch.full((rows, length), start, dtype=torch.long, device=device)
    cache = None
    for position in range(1, length):
        output = model(input_ids=tokens[:, position - 1 : position], past_key_values=cache,
                       use_cache=True)
        cache = output.past_key_values
        logits = output.logits[:, -1, :vocabulary].float()
        if not torch.isfinite(logits).all():
            raise NonFiniteError("the logits of a model that is to write are NaN or Inf")
        drawn = torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]
        ended = tokens[:, position - 1] == end if end is not None and end != start else drawn < 0
        tokens[:, position] = torch.where(ended, start, drawn)
    return tokens.cpu()
