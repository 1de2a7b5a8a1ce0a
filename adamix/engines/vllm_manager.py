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
from adamix.engines.vllm import RENAMERS
from adamix.engines.vllm_layers import (
    DeltaEmbedding,
    DeltaLayer,
    DeltaLogits,
    LayerSite,
    delta_classes,
    delta_logits,
)
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
        self._find_sites(manager, vllm_config.model_config.hf_config)
        if not self._layers:
            raise BankError(f"{type(model).__name__} has no layer that vLLM lets adapters change: "
                            f"deltas have no place in it")
        manager.bank = self._bank = self._make_bank()
        for layer, matrices in self._layers.items():
            layer.install(self._site_of(layer, matrices))
        self._embeddings = {name for name, module in model.named_modules(remove_duplicate=False)
                            if isinstance(getattr(module, "base_layer", module),
                                          VocabParallelEmbedding)}
        logger.info("adamix: %d matrices, %d slots, %s bytes", len(self._sites), self._bank.slots,
                    f"{self._bank.nbytes:,}")
        return wrapped

    def _find_sites(self, manager: DeltaModelManager, model_config: object) -> None:
        """Each layer's matrices, and each matrix's layer; a tied head has the embedding's."""
        self._layers: dict[DeltaLayer, list[str]] = {}
        for name, layer in manager.modules.items():
            if isinstance(layer, DeltaLayer):
                names = manager.packed_modules.get(name, [name])
                if len(names) == len(layer.sizes()):  # else vLLM splits it as no checkpoint does
                    self._layers[layer] = [f"{one}.weight" for one in names]
        embedding = [names for layer, names in self._layers.items()
                     if isinstance(layer, DeltaEmbedding)]
        if getattr(model_config.get_text_config(), "tie_word_embeddings", False) and embedding:
            for layer in self._layers:
                if isinstance(layer, DeltaLogits):
                    self._layers[layer] = embedding[0]
        self._sites: dict[str, tuple[DeltaLayer, int]] = {}
        for layer, names in self._layers.items():
            for index, name in enumerate(names):
                self._sites.setdefault(name, (layer, index))

    def _make_bank(self) -> SlotBank:
        places, slot_bytes = {}, 0
        for matrix, (layer, index) in self._sites.items():
            sizes = layer.sizes()[index]
            places[matrix] = MatrixPlace(len(places), sizes.part,
                                         most_components(sizes.whole, self._options.max_rank))
            # V or U is whole on every worker: what a part has of the delta's bytes is its share
            # of both sides, not of the area.
            area, sides = sizes.whole[0] * sizes.whole[1], sum(sizes.whole)
            slot_bytes += 2 * area * sum(sizes.part) // (LEAST_RATIO * sides)
            slot_bytes += 4 * PARTS * ALIGNMENT
        slots = self.lora_config.max_loras
        capacity = self._options.capacity_bytes or slots * slot_bytes
        return SlotBank(Places(places, {}, {}), slots, capacity, self.device)

    def _site_of(self, layer: DeltaLayer, matrices: list[str]) -> LayerSite:
        most = max(self._bank.places.matrices[matrix].max_rank for matrix in matrices)
        wrapper, is_head = layer.punica_wrapper, isinstance(layer, DeltaLogits)
        segments = "prompt_mapping_meta" if is_head else "token_mapping_meta"
        slots = wrapper._sampler_indices if is_head else wrapper._token_lora_indices
        return LayerSite(self._bank.arena, [self._bank.table(matrix) for matrix in matrices], most,
                         getattr(wrapper, segments, None), slots)

    def _load_adapter(self, lora_request: object) -> LoRAModel:
        name = lora_request.lora_name
        delta = read_delta(_folder_of(name, lora_request.lora_path))
        self._check(delta, name)
        routed, left_out = self._sorted(name, delta)
        if left_out:
            kinds = Counter(kind_of(tensor) for tensor in left_out)
            what = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
            text = f"{name}: left out, as vLLM cannot route them by request: {what}"
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
        renamer = next((name for name in RENAMERS if hasattr(mapper, name)), None)
        renames = getattr(mapper, renamer)() if renamer else mapper
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


@contextmanager
def _delta_layers() -> Iterator[None]:
    """Within it vLLM wraps layers in ours: of its classes it takes the first that fits."""
    home = vllm.lora.utils
    before, logits = home._all_lora_classes, home.LogitsProcessorWithLoRA
    home._all_lora_classes = (*delta_classes(vllm.lora.layers), *before)
    home.LogitsProcessorWithLoRA = delta_logits(vllm.lora.layers)
    try:
        yield
    finally:
        home._all_lora_classes, home.LogitsProcessorWithLoRA = before, logits
