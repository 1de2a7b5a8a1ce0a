"""The plugin that vLLM loads in each of its processes: delta folders as adapters.

An engine whose additional configuration has the key `adamix` gets the manager of
`vllm_manager.py` in place of vLLM's own; all others are left alone. vLLM has no registry for
either the manager or the classes of its LoRA layers, so both are assigned, and what is used of
its inner parts is looked at first: an engine of a vLLM that differs does not start.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from importlib import import_module

from adamix.engines.options import wants_adamix
from adamix.engines.vllm_layers import EMBEDDING, LINEAR, LOGITS
from adamix.errors import AdamixError

MIXIN = "vllm.v1.worker.lora_model_runner_mixin"
MANAGER = "LRUCacheWorkerLoRAManager"  # the name in MIXIN that model runners call
logger = logging.getLogger("vllm.adamix")


class EngineError(AdamixError):
    """A vLLM whose inner parts are not those that were tested."""


# A function's first parameters, by module and name.
PARAMETERS: dict[str, dict[str, tuple[str, ...]]] = {
    "vllm.lora.worker_manager": {
        f"{MANAGER}.__init__": ("self", "vllm_config", "device", "embedding_modules"),
        f"{MANAGER}.create_lora_manager": ("self", "model", "vllm_config"),
        f"{MANAGER}._load_adapter": ("self", "lora_request"),
        "LRUCacheLoRAModelManager.activate_adapter": ("self", "lora_id"),
        "LRUCacheLoRAModelManager.get_adapter": ("self", "adapter_id"),
        "LRUCacheLoRAModelManager._create_merged_loras_inplace": ("self", "lora_model"),
    },
    "vllm.lora.layers": {
        **{f"{name}.create_lora_weights": ("self", "max_loras", "lora_config", "model_config")
           for name in (*LINEAR, EMBEDDING, LOGITS)},
        **{f"{name}.{method}": ("self", *parameters) for name in LINEAR for method, parameters in (
            ("_apply_lora_to_output", ("x", "output")), ("slice_lora_a", ("lora_a",)),
            ("slice_lora_b", ("lora_b",)))},
        f"{EMBEDDING}.forward": ("self", "x"),
        f"{LOGITS}._get_logits": ("self", "hidden_states", "lm_head", "embedding_bias"),
    },
    "vllm.lora.lora_model": {"LoRAModel.__init__": ("self", "lora_model_id", "rank", "loras")},
    "vllm.lora.utils": {"get_adapter_absolute_path": ("lora_path",)},
    "vllm.model_executor.models.utils": {"WeightsMapper._map_name": ("self", "key")},
    "vllm.exceptions": {"LoRAAdapterNotFoundError.__init__": ("self", "lora_name", "lora_path")},
    "vllm.lora.ops.triton_ops.lora_kernel_metadata": {
        "LoRAKernelMeta": ("token_lora_mapping", "token_indices_sorted_by_lora_ids",
                           "active_lora_ids", "num_tokens_per_lora", "lora_token_start_loc",
                           "no_lora_flag_cpu")},
}
# Names that only have to be there.
NAMES = {
    MIXIN: (MANAGER,),
    "vllm.lora.utils": ("_all_lora_classes", LOGITS),
    "vllm.envs": ("VLLM_LORA_ENABLE_DUAL_STREAM",),
    "vllm.model_executor.layers.vocab_parallel_embedding": ("VocabParallelEmbedding",),
}
# What makes, of a model's names for loading, names that keep q, k and v apart: one of them is there
# where the first do not anyway.
RENAMERS = ("get_rename_mapper", "get_unstacked_mapper")
STACKED = "orig_to_new_stacked"
# What a constructor sets or reads on the object.
ATTRIBUTES = {
    ("vllm.lora.model_manager", "LoRAModelManager"): ("modules", "packed_modules",
                                                      "lora_index_to_id"),
    ("vllm.lora.worker_manager", "WorkerLoRAManager"): ("lora_config", "device"),
    ("vllm.lora.punica_wrapper.punica_base", "PunicaWrapperBase"): (
        "_token_lora_indices", "_sampler_indices"),
    ("vllm.lora.layers", "MergedColumnParallelLinearWithLoRA"): ("output_slices",),
    ("vllm.lora.layers", "RowParallelLinearWithLoRA"): ("input_size",),
    ("vllm.lora.layers", LOGITS): ("hidden_size",),
}


def register() -> None:
    """What the entry point `vllm.general_plugins` calls, as often as vLLM likes."""
    try:
        mixin = import_module(MIXIN)
        stock = getattr(mixin, MANAGER)
    except (ImportError, AttributeError) as error:
        logger.warning("adamix: this vLLM is left alone: %s", error)
        return
    if not getattr(stock, "adamix", False):
        setattr(mixin, MANAGER, _chooser(stock))


def _chooser(stock: Callable[..., object]) -> Callable[..., object]:
    """What model runners call in place of vLLM's manager."""

    def manager(vllm_config: object, device: object, embedding_modules: object) -> object:
        if not wants_adamix(vllm_config.additional_config):
            return stock(vllm_config, device, embedding_modules)
        probe()
        from adamix.engines.vllm_manager import DeltaWorkerManager

        return DeltaWorkerManager(vllm_config, device, embedding_modules)

    manager.adamix = True
    return manager


def probe(load: Callable[[str], object] = import_module) -> None:
    """Look at all that is used of vLLM's inner parts.

    Args:
        load: gives a module by name.

    Raises:
        EngineError: something is missing, or takes other parameters; all of it in one sentence.
    """
    missing = list(_missing(load))
    if missing:
        version = getattr(load("vllm"), "__version__", "of unknown version")
        raise EngineError(f"vLLM {version} is not one that adamix knows: {'; '.join(missing)}")


def _missing(load: Callable[[str], object]) -> Iterator[str]:
    for module_name in dict.fromkeys([*PARAMETERS, *NAMES, *(name for name, _ in ATTRIBUTES)]):
        try:
            module = load(module_name)
        except ImportError:
            yield f"there is no {module_name}"
            continue
        for name, expected in PARAMETERS.get(module_name, {}).items():
            function = _find(module, name)
            found = None if function is None else _parameters(function)
            if found is None:
                yield f"{module_name} has no {name}"
            elif found[: len(expected)] != expected:
                yield f"{module_name}.{name} takes ({', '.join(found)})"
        for name in NAMES.get(module_name, ()):
            if _find(module, name) is None:
                yield f"{module_name} has no {name}"
        mapper = _find(module, "WeightsMapper")
        stacks = STACKED in getattr(mapper, "__dataclass_fields__", ())
        if stacks and not any(hasattr(mapper, name) for name in RENAMERS):
            yield f"{module_name}.WeightsMapper has no {' or '.join(RENAMERS)}"
        for (owner, name), attributes in ATTRIBUTES.items():
            if owner == module_name:
                known = _set_by(_find(module, name))
                for attribute in attributes:
                    if attribute not in known:
                        yield f"{module_name}.{name} has no {attribute}"


def _find(module: object, name: str) -> object | None:
    for part in name.split("."):
        module = getattr(module, part, None)
    return module


def _parameters(function: object) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


def _set_by(cls: object) -> tuple[str, ...]:
    """Names that a class's constructor mentions."""
    code = getattr(getattr(cls, "__init__", None), "__code__", None)
    return code.co_names if code is not None else ()
