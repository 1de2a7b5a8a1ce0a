"""The worker's side of vLLM's LoRA machinery, with delta folders in place of LoRA adapters.

vLLM decides which fine-tunes are on the host and in which slot of the device (least recently used
ones make room), names them, keeps their prefix caches apart and routes tokens. Here they are read,
checked, cut for tensor parallelism and copied into the slot that vLLM chose.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import vllm.lora.layers
import vllm.lora.utils
from torch import nn
from vllm import envs
from vllm.exceptions import LoRAAdapterNotFoundError
from vllm.lora.lora_model import LoRAModel
from vllm.lora.worker_manager import LRUCacheLoRAModelManager, LRUCacheWorkerLoRAManager
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from adamix.api import LEAST_RATIO, base_check, most_components
from adamix.artifacts import ModelDelta
from adamix.engines.options import EngineOptions
from adamix.engines.slots import SlotBank
from adamix.engines.vllm_layers import DeltaLinear, LayerSite, delta_classes
from adamix.errors import BankError, DeltaFileError
from adamix.naming import kind_of
from adamix.serving.arena import ALIGNMENT
from adamix.serving.image import DeltaImage, MatrixPlace, Places
from adamix.storage.file import CONFIG_FILE, read_delta

PEFT_FILE = "adapter_config.json"
PARTS = 3  # of a matrix in the arena, each aligned: V, U, scales
logger = logging.getLogger("vllm.adamix")  # vLLM shows what is below its own name


class DeltaModel(LoRAModel):
    """A fine-tune that vLLM holds by its id; no LoRA weights of vLLM's kind."""

    def __init__(self, lora_model_id: int, image: DeltaImage) -> None:
        super().__init__(lora_model_id, 1, {})
        self.image = image


class DeltaModelManager(LRUCacheLoRAModelManager):
    """Fills the slot that vLLM chose for a fine-tune."""

    bank: SlotBank | None = None  # until the layers are known

    def activate_adapter(self, lora_id: int) -> bool:
        activated = super().activate_adapter(lora_id)
        if activated and self.bank is not None:
            slot = self.lora_index_to_id.index(lora_id)
            model = self.get_adapter(lora_id)
            # vLLM warms up with adapters of its own making: they change nothing here.
            self.bank.fill(slot, model.image if isinstance(model, DeltaModel) else None)
        return activated

    def _create_merged_loras_inplace(self, lora_model: LoRAModel) -> None:
        if not isinstance(lora_model, DeltaModel):  # which is merged already, and has no A and B
            super()._create_merged_loras_inplace(lora_model)


class DeltaWorkerManager(LRUCacheWorkerLoRAManager):
    """Loads delta folders where vLLM asks for adapters."""

    _manager_cls = DeltaModelManager

    def __init__(self, vllm_config: object, device: torch.device,
                 embedding_modules: dict[str, str]) -> None:
        super().__init__(vllm_config, device, embedding_modules)
        _refuse_unsupported(vllm_config)
        self._options = EngineOptions.of(vllm_config.additional_config)
        self._check = base_check(vllm_config.model_config.model, self._options.verify)

    def create_lora_manager(self, model: nn.Module, vllm_config: object) -> nn.Module:
        with _delta_layers():
            wrapped = super().create_lora_manager(model, vllm_config)
        manager = self._adapter_manager
        self._sites = {matrix: (layer, index) for name, layer in manager.modules.items()
                       if isinstance(layer, DeltaLinear)
                       for index, matrix in enumerate(_matrices(manager, name, layer))}
        if not self._sites:
            raise BankError(f"{type(model).__name__} has no linear layer that vLLM lets adapters "
                            f"change: deltas have no place in it")
        manager.bank = self._bank = self._make_bank()
        self._embeddings = {name for name, module in model.named_modules(remove_duplicate=False)
                            if isinstance(getattr(module, "base_layer", module),
                                          VocabParallelEmbedding)}
        for layer in dict.fromkeys(layer for layer, _ in self._sites.values()):
            layer.install(self._site_of(layer))
        logger.info("adamix: %d matrices, %d slots, %s bytes", len(self._sites), self._bank.slots,
                    f"{self._bank.nbytes:,}")
        return wrapped

    def _make_bank(self) -> SlotBank:
        places, slot_bytes = {}, 0
        for matrix, (layer, index) in self._sites.items():
            out, n = shape = layer.output_slices[index], layer.input_size
            base = layer.base_layer
            whole_out = (base.output_sizes[index] if len(layer.output_slices) > 1
                         else base.output_size)
            whole = (whole_out, base.input_size)
            places[matrix] = MatrixPlace(len(places), shape,
                                         most_components(whole, self._options.max_rank))
            # V or U is whole on every worker: what a part has of the delta's bytes is its share
            # of both sides, not of the area.
            slot_bytes += (2 * whole[0] * whole[1] * (out + n) // (LEAST_RATIO * sum(whole))
                           + 4 * PARTS * ALIGNMENT)
        slots = self.lora_config.max_loras
        capacity = self._options.capacity_bytes or slots * slot_bytes
        return SlotBank(Places(places, {}, {}), slots, capacity, self.device)

    def _site_of(self, layer: DeltaLinear) -> LayerSite:
        matrices = [matrix for matrix, (owner, _) in self._sites.items() if owner is layer]
        most = max(self._bank.places.matrices[matrix].max_rank for matrix in matrices)
        wrapper = layer.punica_wrapper
        return LayerSite(self._bank.arena, [self._bank.table(matrix) for matrix in matrices], most,
                         getattr(wrapper, "token_mapping_meta", None), wrapper._token_lora_indices)

    def _load_adapter(self, lora_request: object) -> LoRAModel:
        name = lora_request.lora_name
        delta = read_delta(_folder_of(name, lora_request.lora_path))
        self._check(delta, name)
        routed, left_out = self._sorted(name, delta)
        if left_out:
            kinds = Counter(kind_of(tensor) for tensor in left_out)
            what = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
            text = (f"{name}: {len(left_out)} tensors are left out, since vLLM routes linear "
                    f"layers alone: {what}")
            if self._options.strict:
                raise BankError(text)
            logger.warning("adamix: %s", text)
        return DeltaModel(lora_request.lora_int_id, self._bank.image(name, routed))

    def _sorted(self, name: str, delta: ModelDelta) -> tuple[ModelDelta, list[str]]:
        """What this worker computes of a delta, and the tensors that nobody does.

        Raises:
            BankError: it changes a matrix that must not be left out.
        """
        matrices, left_out = {}, []
        for tensor in [*delta.matrices, *delta.whole, *delta.extra_rows]:
            matrix = self._renamed(tensor)
            if tensor in delta.matrices and matrix in self._sites:
                layer, index = self._sites[matrix]
                matrices[matrix] = layer.part_of(delta.matrices[tensor], index)
            elif matrix.rpartition(".")[0] in self._embeddings or (
                    tensor in delta.whole and delta.whole[tensor].dim() == 1):
                left_out.append(tensor)
            else:
                whole = " whole" if tensor in delta.whole else ""
                raise BankError(f"{name} changes {tensor}{whole}, which vLLM cannot route: merge "
                                f"it instead")
        return replace(delta, matrices=matrices, whole={}, extra_rows={}), left_out

    def _renamed(self, tensor: str) -> str:
        """As vLLM's model calls what the checkpoint calls so."""
        mapper = getattr(self._adapter_manager.model, "hf_to_vllm_mapper", None)
        if mapper is None:
            return tensor
        renames = mapper.get_rename_mapper() if hasattr(mapper, "get_rename_mapper") else mapper
        return renames._map_name(tensor) or tensor


def _refuse_unsupported(vllm_config: object) -> None:
    if vllm_config.lora_config.fully_sharded_loras:
        raise BankError("adamix cuts deltas by rows and columns, not by components: start vLLM "
                        "without fully_sharded_loras")
    if envs.VLLM_LORA_ENABLE_DUAL_STREAM:
        raise BankError("adamix computes on the layer's own stream: start vLLM without "
                        "VLLM_LORA_ENABLE_DUAL_STREAM")
    stages = vllm_config.parallel_config.pipeline_parallel_size
    if stages > 1:
        raise BankError(f"adamix in vLLM needs pipeline_parallel_size 1, got {stages}: "
                        f"tensor_parallel_size spreads a model too")


def _folder_of(name: str, path: str) -> Path:
    """The folder of a delta.

    Raises:
        LoRAAdapterNotFoundError: there is nothing at `path`.
        DeltaFileError: it is an adapter of another kind.
    """
    folder = Path(vllm.lora.utils.get_adapter_absolute_path(path))
    if not folder.exists():
        raise LoRAAdapterNotFoundError(name, path)
    if (folder / PEFT_FILE).exists() and not (folder / CONFIG_FILE).exists():
        raise DeltaFileError(f"{path} is a PEFT adapter, and an engine with adamix serves deltas "
                             f"alone: serve it from one without adamix in additional_config")
    return folder


def _matrices(manager: DeltaModelManager, name: str, layer: DeltaLinear) -> list[str]:
    """The matrices of a layer in the order of its slices; none where vLLM splits them otherwise."""
    names = manager.packed_modules.get(name, [name])
    return [f"{one}.weight" for one in names] if len(names) == len(layer.output_slices) else []


@contextmanager
def _delta_layers() -> Iterator[None]:
    """Within it vLLM wraps linear layers in ours; what it asks first is what it takes."""
    before = vllm.lora.utils._all_lora_classes
    vllm.lora.utils._all_lora_classes = (*delta_classes(vllm.lora.layers), *before)
    try:
        yield
    finally:
        vllm.lora.utils._all_lora_classes = before
