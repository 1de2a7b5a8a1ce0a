"""Requests of many fine-tunes in one paged batch: transformers' continuous batching, routed.

transformers schedules, pages the cache and runs the model; what it lacks is told here: which
fine-tune each request is on, from its first token to its last. Its classes are subclassed and its
instances wrapped, in this file alone; `internals.py` lists what that relies on.
"""

from __future__ import annotations

import copy
import queue
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from adamix.errors import BankError, reason
from adamix.serving.bank import DeltaBank
from adamix.serving.in_flight import InFlight, Line, finetune_of_each, forks
from adamix.serving.internals import (
    check_internals,
    check_model,
    check_processor,
    routable_config,
    unknown_version,
)
from adamix.serving.selection import selection_followed

try:
    from transformers.generation.configuration_utils import ContinuousBatchingConfig
    from transformers.generation.continuous_batching.continuous_api import (
        ContinuousBatchingManager,
        ContinuousBatchProcessor,
        OutputRouter,
    )
    from transformers.generation.continuous_batching.requests import GenerationOutput, RequestState
    from transformers.generation.continuous_batching.utils import WorkloadHints
except ImportError as error:
    raise unknown_version(reason(error)) from error


@contextmanager
def continuous_batching(model: PreTrainedModel, bank: DeltaBank, *,
                        generation_config: GenerationConfig | None = None,
                        continuous_batching_config: ContinuousBatchingConfig | None = None,
                        workload_hints: WorkloadHints | None = None,
                        warmup: bool = True) -> Iterator[ContinuousBatching]:
    """Answer requests, each with a fine-tune of its own, in batches that change at every step.

    As `model.continuous_batching_context_manager`, with these differences: requests name their
    fine-tune, blocks of the cache are never shared between requests (equal prompts have other keys
    and values under another fine-tune), and batching is synchronous. While it is open, the bank's
    route is that of the running batch; the route before comes back at its end. At the end, what
    was added is still answered; after an exception, it is given up.

    Args:
        model: the one that `bank` is attached to.
        bank: with the fine-tunes; more may be loaded, and idle ones unloaded, meanwhile.
        generation_config: default: the model's.
        continuous_batching_config: default: transformers' own.
        workload_hints: what transformers sizes its cache by.
        warmup: capture CUDA graphs, or compile, before the first request.

    Raises:
        BankError: another model's bank, an unknown version of transformers, asynchronous batching,
            larger batches than can be routed.
        RuntimeError: the thread that runs the model has died.
    """
    check_internals()
    check_model(model, bank)
    config = routable_config(continuous_batching_config or ContinuousBatchingConfig(), model)
    generation = copy.deepcopy(generation_config or model.generation_config)
    if generation.eos_token_id is None:
        generation.eos_token_id = -1  # transformers': no token ends a request
    with bank.route([None]), _attention_restored(model), selection_followed(model, bank.routing):
        batching = ContinuousBatching(model, generation, config, workload_hints, bank=bank)
        try:
            if warmup:
                batching.warmup()
            batching.start()
            yield batching
            batching.close()
        finally:
            batching.close(answer=False)
    if not batching.told:
        batching.check()


class ContinuousBatching(ContinuousBatchingManager):
    """transformers' manager, whose requests name a fine-tune. Made by :func:`continuous_batching`.

    At most as many fine-tunes as fit on the device are in flight: a request for one more waits in
    line until the others leave room, and requests that need no room may pass it. What a fine-tune
    in flight is cannot change: the bank refuses to unload or replace it.
    """

    def __init__(self, model: PreTrainedModel, generation_config: GenerationConfig,
                 continuous_batching_config: ContinuousBatchingConfig,
                 workload_hints: WorkloadHints | None = None, *, bank: DeltaBank) -> None:
        super().__init__(model=model, generation_config=generation_config,
                         continuous_batching_config=continuous_batching_config,
                         workload_hints=workload_hints)
        self._bank = bank
        self._in_flight = InFlight(bank, self.num_return_sequences)
        self._routed: ContinuousBatchProcessor | None = None
        self._started = self._warming = False
        self.told = False  # whether `check` has raised
        self.output_router = _Router(self._in_flight)
        self.input_queue = Line(self.input_queue.maxsize, self._in_flight,
                                self.output_router.fail_and_deliver)

    # --- requests

    def add_request(self, input_ids: list[int], request_id: str | None = None,
                    max_new_tokens: int | None = None, streaming: bool = False,
                    record_timestamps: bool = False, eos_token_id: int | list[int] | None = None,
                    *, finetune: str | None = None, **logit_processor_kwargs: object) -> str:
        """Add a request, as transformers' manager does.

        Args:
            finetune: the bank's name of it; None is the base. All `num_return_sequences` are its.

        Returns:
            The request's id.

        Raises:
            BankError: an unknown fine-tune, no token, an id that is in use, or a full queue.
            RuntimeError: the thread that runs the model has died or is stopping.
        """
        if len(input_ids) == 0:
            raise BankError("a request needs at least one token, got none")
        if request_id is None:
            request_id = self._in_flight.new_id()
        self._in_flight.add(request_id, finetune)
        added = None
        try:
            added = super().add_request(
                input_ids, request_id=request_id, max_new_tokens=max_new_tokens,
                streaming=streaming, record_timestamps=record_timestamps,
                eos_token_id=eos_token_id, **logit_processor_kwargs)
        except queue.Full:
            raise BankError(f"{self.input_queue.maxsize} requests wait already, as many as "
                            f"max_queue_size allows") from None
        finally:
            if added is None:
                self._in_flight.forget(*self._in_flight.sequences(request_id))
        if added is None:
            self.check()
            raise RuntimeError("continuous batching is stopping: it takes no more requests")
        return request_id

    def add_requests(self, inputs: list[list[int]], max_new_tokens: int | None = None,
                     streaming: bool = False, record_timestamps: bool = False, *,
                     finetunes: Sequence[str | None] | None = None,
                     **logit_processor_kwargs: object) -> list[str]:
        """Add several requests, `finetunes[i]` for `inputs[i]`; their ids, in order.

        Raises:
            As `add_request`.
        """
        return [self.add_request(ids, max_new_tokens=max_new_tokens, streaming=streaming,
                                 record_timestamps=record_timestamps, finetune=name,
                                 **logit_processor_kwargs)
                for ids, name in finetune_of_each(inputs, finetunes)]

    def cancel_request(self, request_id: str) -> None:
        """Give a request up; no result follows."""
        if self.input_queue.remove(request_id):
            self._in_flight.forget(*self._in_flight.sequences(request_id))
        else:
            super().cancel_request(request_id)

    # --- results

    def generate_batch(self, inputs: list[list[int]],
                       finetunes: Sequence[str | None] | None = None,
                       max_new_tokens: int | None = None, record_timestamps: bool = False
                       ) -> dict[str, GenerationOutput]:
        """Answer several requests, `finetunes[i]` for `inputs[i]`, beside all others.

        Returns:
            Outputs by request id, in the order of the inputs; further sequences of a request,
            where there are several, after its first.

        Raises:
            RuntimeError: one of them failed.
            As `add_request`.
        """
        requests = finetune_of_each(inputs, finetunes)
        ids = [self._in_flight.new_id() for _ in inputs]
        expected = [name for request_id in ids for name in self._in_flight.sequences(request_id)]
        results = self.output_router.collect(expected)
        outputs: dict[str, GenerationOutput] = {}
        try:
            for request_id, (tokens, name) in zip(ids, requests, strict=True):
                self.add_request(tokens, request_id, max_new_tokens, finetune=name,
                                 record_timestamps=record_timestamps)
            while len(outputs) < len(expected):
                output = self._next(results, [name for name in expected if name not in outputs])
                outputs[output.request_id] = output
        except BaseException:
            for name in expected:
                self.cancel_request(name)
            raise
        return {name: outputs[name] for name in expected}

    def _next(self, results: queue.Queue[GenerationOutput], expected: list[str]
              ) -> GenerationOutput:
        """The next of these; RuntimeError where it failed, or none will come."""
        output = None
        while output is None:
            # Looked at before the queue, so that nothing comes after.
            lost = not self.is_running() or not all(name in self._in_flight for name in expected)
            try:
                output = results.get(timeout=0.1)
            except queue.Empty:
                if lost:
                    self.check()
                    raise RuntimeError(f"no result comes of {', '.join(expected)}: cancelled, or "
                                       f"batching was stopped") from None
        if output.error is not None:
            raise RuntimeError(f"{output.request_id} failed: {output.error}")
        return output

    def get_result(self, request_id: str | None = None,
                   timeout: float | None = None) -> GenerationOutput | None:
        """As transformers' manager; a request that failed says why in its `error`.

        Raises:
            RuntimeError: the thread that runs the model has died, and no result is left.
        """
        result = super().get_result(request_id, timeout)
        if result is None and self.output_router.output_queue.empty():
            self.check()
        return result

    def __iter__(self) -> Iterator[GenerationOutput]:
        """Results as they come, until every request that was added is answered."""
        while self._in_flight or not self.output_router.output_queue.empty():
            result = self.get_result(timeout=0.1)
            if result is not None:
                yield result
            elif not self.is_running():
                return

    def check(self) -> None:
        """Raise RuntimeError where the thread that runs the model has died, from its cause."""
        error = self.background_thread_status.fatal_error
        if error is not None:
            self.told = True
            raise RuntimeError(f"continuous batching has stopped: {reason(error)}") from error

    # --- life

    def warmup(self) -> None:
        """Capture CUDA graphs, or compile, with batches of the base's."""
        self._warming = True
        try:
            super().warmup()
        finally:
            self._warming = False

    def start(self) -> None:
        """Begin to answer."""
        self._started = True
        super().start()

    def close(self, *, answer: bool = True) -> None:
        """Stop; with `answer` after all requests, else at once. A second call does nothing."""
        if self._started:
            self.stop(block=True, hard_stop=not answer)
            self._started = False
        self.destroy()
        self._in_flight.forget_all()
        if getattr(self.model, "_cached_continuous_batching_manager", None) is self:
            del self.model._cached_continuous_batching_manager

    # --- which fine-tune a token is on, and which are in flight; on the thread that runs the model

    def _create_batch_processor(self) -> ContinuousBatchProcessor:
        processor = super()._create_batch_processor()
        if processor is not self._routed:
            check_processor(processor)
            self._routed = processor
            self._wrap(processor)
        return processor

    def _wrap(self, processor: ContinuousBatchProcessor) -> None:
        """Route each batch before it runs; take note of requests that are cancelled."""
        compute, io = processor.model_runner.compute_batch, processor.inputs_and_outputs
        clear = processor.scheduler.clear_cancelled_requests

        def compute_routed(model: nn.Module, batch_data: dict[str, object]) -> None:
            requests = io.requests_in_batch
            names = [None if self._warming else self._in_flight.finetune(request.state.request_id)
                     for request in requests]
            with _on_stream(io.compute_stream):
                self._bank.route_tokens(names, [request.query_length for request in requests])
            compute(model, batch_data)

        def clear_noted() -> list[RequestState]:
            states = clear()
            for state in states:
                unforked = forks(state.request_id, state.num_children)
                self._in_flight.forget(state.request_id, *unforked)
            return states

        processor.model_runner.compute_batch = compute_routed
        processor.scheduler.clear_cancelled_requests = clear_noted

    def _generation_step(self) -> None:
        with self._bank.lock:
            super()._generation_step()  # waits for the device
            self._bank.end_batch()

    def _fail_all_remaining_requests(self, error: Exception,
                                     batch_processor: ContinuousBatchProcessor | None) -> None:
        self.input_queue.is_open = True
        super()._fail_all_remaining_requests(error, batch_processor)


class _Router(OutputRouter):
    """Delivers results, and says of each last one that it leaves and that it is delivered."""

    def __init__(self, in_flight: InFlight) -> None:
        super().__init__()
        self._in_flight = in_flight
        self._own: dict[str, queue.Queue[GenerationOutput]] = {}

    def collect(self, sequences: Sequence[str]) -> queue.Queue[GenerationOutput]:
        """Where results of these go from now on, instead of to everyone."""
        results: queue.Queue[GenerationOutput] = queue.Queue()
        self._own.update(dict.fromkeys(sequences, results))
        return results

    def deliver(self, output: GenerationOutput) -> None:
        self.deliver_batch([output])

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        last = [output.request_id for output in outputs if output.is_finished()]
        self._in_flight.release(*last)
        for output in outputs:
            if output.request_id in self._own:
                self._own[output.request_id].put(output)
        super().deliver_batch([output for output in outputs if output.request_id not in self._own])
        for name in last:
            self._own.pop(name, None)
        self._in_flight.forget(*last)

    def fail_and_deliver(self, state: RequestState, error: Exception) -> None:
        """Sequences that have not forked off yet fail with it."""
        for name in forks(state.request_id, state.num_children):
            fork = copy.copy(state)
            fork.request_id, fork.num_children = name, 0
            super().fail_and_deliver(fork, error)
        super().fail_and_deliver(state, error)


@contextmanager
def _on_stream(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """A stream after what the current one has been given; where there is none, nothing."""
    if stream is None:
        yield
        return
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    with torch.cuda.stream(stream):
        yield


@contextmanager
def _attention_restored(model: PreTrainedModel) -> Iterator[None]:
    """transformers changes it, and not back where its thread has died or never started."""
    before = model.config._attn_implementation
    try:
        yield
    finally:
        if model.config._attn_implementation != before:
            model.set_attn_implementation(before)
