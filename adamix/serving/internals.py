"""What continuous batching uses of transformers' internals, compared with what is installed."""

from __future__ import annotations

import copy
import importlib
import inspect
from typing import TYPE_CHECKING

import transformers
from transformers import PreTrainedModel

from adamix.errors import BankError
from adamix.serving.bank import DeltaBank
from adamix.serving.experts import RoutedExperts
from adamix.serving.modules import routing_of
from adamix.serving.routing import MAX_ROWS

if TYPE_CHECKING:
    from transformers.generation.configuration_utils import ContinuousBatchingConfig
    from transformers.generation.continuous_batching.continuous_api import ContinuousBatchProcessor

TESTED = "5.17 to 5.23"

# module.class.function -> parameters that are given or read here by name
_INTERNALS: dict[str, tuple[str, ...]] = {
    "continuous_api.ContinuousBatchingManager.__init__": (
        "model", "generation_config", "continuous_batching_config", "workload_hints"),
    "continuous_api.ContinuousBatchingManager.add_request": (
        "input_ids", "request_id", "max_new_tokens", "streaming", "record_timestamps",
        "eos_token_id"),
    "continuous_api.ContinuousBatchingManager.get_result": ("request_id", "timeout"),
    "continuous_api.ContinuousBatchingManager.cancel_request": ("request_id",),
    "continuous_api.ContinuousBatchingManager.stop": ("block", "hard_stop"),
    "continuous_api.ContinuousBatchingManager.warmup": (),
    "continuous_api.ContinuousBatchingManager.destroy": (),
    "continuous_api.ContinuousBatchingManager._generation_step": (),
    "continuous_api.ContinuousBatchingManager._create_batch_processor": (),
    "continuous_api.ContinuousBatchingManager._fail_all_remaining_requests": (
        "error", "batch_processor"),
    "continuous_api.OutputRouter.deliver": ("output",),
    "continuous_api.OutputRouter.deliver_batch": ("outputs",),
    "continuous_api.OutputRouter.fail_and_deliver": ("state", "error"),
    "model_runner.ModelRunner.compute_batch": ("model", "batch_data"),
    "scheduler.Scheduler.clear_cancelled_requests": (),
    "requests.RequestState.__init__": ("request_id", "num_children"),
    "requests.FutureRequestState.__init__": ("state", "query_length"),
    "requests.GenerationOutput.is_finished": (),
}


def unknown_version(why: str) -> BankError:
    """Says which versions of transformers are known, and why this is none of them."""
    return BankError(f"continuous batching is known to work with transformers {TESTED}; "
                     f"{transformers.__version__} is another: {why}")


def check_internals() -> None:
    """Raise BankError where transformers lacks what is used here."""
    package = "transformers.generation.continuous_batching"
    missing: list[str] = []
    for path, parameters in _INTERNALS.items():
        module, kind, name = path.split(".")
        function = getattr(getattr(importlib.import_module(f"{package}.{module}"), kind, None),
                           name, None)
        if function is None:
            missing.append(path)
        else:
            there = inspect.signature(function).parameters
            missing += [f"{path}({wanted})" for wanted in parameters if wanted not in there]
    if missing:
        raise unknown_version(f"it lacks {', '.join(missing)}")


def check_model(model: PreTrainedModel, bank: DeltaBank) -> None:
    """Raise BankError where requests of this model cannot be routed by this bank."""
    if routing_of(model) is not bank.routing:
        raise BankError("the bank is not attached to this model")
    if model.base_model is model:
        raise BankError(f"{type(model).__name__} has no base model: which of its layers get all "
                        f"tokens is unknown")
    if getattr(model, "_device_mesh", None) is not None:
        raise BankError("continuous batching with fine-tunes runs on one device")


def routable_config(config: ContinuousBatchingConfig, model: PreTrainedModel
                    ) -> ContinuousBatchingConfig:
    """A copy that shares no blocks between requests, and runs one batch after the other; without
    CUDA graphs where the model has experts, which are counted on the host.

    Raises:
        BankError: batches are to be asynchronous, larger than can be routed, or experts captured.
    """
    experts = any(isinstance(module, RoutedExperts) for module in model.modules())
    graphs = config.use_cuda_graph
    if experts and graphs and (graphs is True or any(graphs)):
        raise BankError("experts cannot be captured in CUDA graphs: leave out use_cuda_graph")
    if config.use_async_batching:
        raise BankError("fine-tunes are batched synchronously: leave out use_async_batching")
    if config.max_batch_tokens is not None and config.max_batch_tokens > MAX_ROWS:
        raise BankError(f"a batch has at most {MAX_ROWS} tokens, max_batch_tokens is "
                        f"{config.max_batch_tokens}")
    config = copy.deepcopy(config)
    config.use_async_batching = config.allow_block_sharing = False
    if experts:
        config.use_cuda_graph = False
    return config


def check_processor(processor: ContinuousBatchProcessor) -> None:
    """Raise BankError where batches would be made otherwise than they are routed."""
    io = processor.inputs_and_outputs
    missing = [name for name in ("requests_in_batch", "compute_stream") if not hasattr(io, name)]
    if missing:
        raise unknown_version(f"its batches lack {', '.join(missing)}")
    if processor.use_async_batching or processor.cache.allow_block_sharing:
        raise unknown_version("it batches asynchronously or shares blocks though it was told not "
                              "to")
