"""vLLM as the engine: what can be said without it, then an engine on the CPU where it is there."""

import gc
import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from routed_models import no_manifest, random_packed
from transformers import AutoModelForCausalLM
from vllm_models import write_base, write_finetune

from adamix.api import base_check
from adamix.artifacts import ModelDelta
from adamix.engines.options import EngineOptions
from adamix.engines.slots import SlotBank
from adamix.engines.vllm import probe
from adamix.engines.vllm_layers import LayerSite
from adamix.errors import BankError
from adamix.merging import restored_model
from adamix.serving.image import MatrixPlace, Places

PROMPTS = [[1, 5, 9, 33, 77], [1, 8, 20, 41], [1, 30, 12, 13, 14, 15]]
LONG = [1, *(7 * i % 90 + 3 for i in range(70))]  # several blocks of the cache
NEW_TOKENS = 8
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="no vLLM here")


@dataclass(frozen=True)
class Case:
    """An engine's number of workers and the model that it serves."""

    workers: int
    tied: bool  # the head is the embedding
    kv_heads: int  # where there are fewer than workers, they have the same ones


CASES = [Case(workers=1, tied=False, kv_heads=2), Case(workers=2, tied=True, kv_heads=1)]


@pytest.fixture(scope="session", params=CASES, ids=["one worker", "two workers"])
def case(request):
    return request.param


@pytest.fixture(scope="session")
def folders(case, tmp_path_factory):
    """base, d0..d2 and normed (norms differ too) of one model; other: of another base."""
    root = tmp_path_factory.mktemp("vllm")
    base = write_base(root / "base", tied=case.tied, kv_heads=case.kv_heads)
    for i in range(3):
        write_finetune(base, root / "base", root / f"d{i}", seed=10 + i)
    write_finetune(base, root / "base", root / "normed", seed=20, norms=True)
    write_finetune(write_base(root / "elsewhere", seed=1), root / "elsewhere", root / "other", 21)
    (root / "peft").mkdir()
    (root / "peft" / "adapter_config.json").write_text("{}")
    return root


@pytest.fixture(scope="session")
def plugin(tmp_path_factory):
    """The entry point as an installed adamix has it, for one that is only on the path."""
    site = tmp_path_factory.mktemp("site")
    info = site / "adamix_entry-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: adamix-entry\nVersion: 0\n")
    (info / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nadamix = adamix.engines.vllm:register\n")
    paths = [str(site), str(Path(__file__).parents[1])]
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])
    sys.path.insert(0, str(site))
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="session")
def engine(case, folders, plugin):
    """Two slots for three fine-tunes, and no more on the host: all of them make room at times."""
    pytest.importorskip("vllm")
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "0|1" if case.workers == 2 else "nobind"
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    engine = LLM(str(folders / "base"), dtype="float32", skip_tokenizer_init=True,
                 max_model_len=128, max_num_seqs=8, enforce_eager=True, enable_lora=True,
                 max_loras=2, max_lora_rank=1, tensor_parallel_size=case.workers,
                 enable_prefix_caching=True,
                 additional_config={"adamix": {"max_rank": 40, "capacity_bytes": 2 << 20}})
    yield engine
    engine.llm_engine.engine_core.shutdown()
    del engine
    gc.collect()
    cleanup_dist_env_and_memory()


IDS = {name: i for i, name in enumerate(["d0", "d1", "d2", "normed", "other", "peft", "gone"], 1)}


def request_for(folders, name):
    from vllm.lora.request import LoRARequest

    return LoRARequest(name, IDS[name], str(folders / name)) if name else None


def answers(engine, folders, names, prompts):
    """The engine's tokens for each name and prompt, all asked for at once."""
    from vllm import SamplingParams

    asked = [(name, prompt) for prompt in prompts for name in names]
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, detokenize=False,
                              ignore_eos=True)
    outputs = engine.generate([{"prompt_token_ids": prompt} for _, prompt in asked], sampling,
                              lora_request=[request_for(folders, name) for name, _ in asked],
                              use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


_MODELS = {}


def expected(folders, names, prompts):
    """The same of the models restored whole, one by one."""
    for name in names:
        if (folders, name) not in _MODELS:
            _MODELS[folders, name] = (
                restored_model(folders / "base", folders / name) if name else
                AutoModelForCausalLM.from_pretrained(folders / "base", dtype=torch.float32))
    return [generated(_MODELS[folders, name], prompt) for prompt in prompts for name in names]


@torch.inference_mode()
def generated(model, prompt):
    tokens = model.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False,
                            min_new_tokens=NEW_TOKENS, eos_token_id=None, pad_token_id=0)
    return tokens[0, len(prompt):].tolist()


def test_fine_tunes_of_the_tests_answer_differently(folders):
    names = [None, "d0", "d1", "d2"]
    assert len({tuple(tokens) for tokens in expected(folders, names, PROMPTS)[:4]}) == 4


@needs_vllm
def test_this_vllm_is_one_that_is_known():
    probe()


@needs_vllm
def test_tokens_as_vllm_sorts_them_for_a_gpu_give_what_their_slots_give():
    from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta

    generator = torch.Generator().manual_seed(0)
    bank = SlotBank(Places({"w": MatrixPlace(0, (96, 64), 40)}, {}, {}), 3, 3 << 17,
                    torch.device("cpu"))
    for slot in range(3):
        matrix = random_packed((96, 64), generator)
        bank.fill(slot, bank.image("d", ModelDelta({"w": matrix}, {}, {}, no_manifest())))
    meta = LoRAKernelMeta.make(max_loras=3, max_num_tokens=32, device="cpu")
    for slots in ([2, 0, -1, 1, 1, 0, 2], [1] * 9, [-1, 2], [-1] * 4, [0, 1, 2] * 5):
        mapping, x = torch.tensor(slots), torch.randn(len(slots), 64, generator=generator)
        meta.prepare_tensors(mapping)
        found = []
        for segments in (meta, None):
            y = torch.zeros(len(slots), 96)
            LayerSite(bank.arena, [bank.table("w")], 40, segments, mapping).add((y,), x)
            found.append(y)
        assert torch.equal(*found)
        assert torch.equal(found[0].any(1), mapping >= 0)


def worker_manager(folders, **options):
    """vLLM's side of a worker, as far as loading goes: every matrix of the base has a place."""
    from adamix.engines.vllm_layers import DeltaLayer
    from adamix.engines.vllm_manager import DeltaWorkerManager

    base = AutoModelForCausalLM.from_pretrained(folders / "base", dtype=torch.float32)
    shapes = {name: tuple(parameter.shape) for name, parameter in base.named_parameters()
              if parameter.dim() == 2}
    places = {name: MatrixPlace(i, shape, 40) for i, (name, shape) in enumerate(shapes.items())}
    manager = DeltaWorkerManager.__new__(DeltaWorkerManager)
    manager._options = EngineOptions(**options)
    manager._check = base_check(folders / "base", manager._options.verify)
    manager._adapter_manager = SimpleNamespace(model=base)
    manager._sites = dict.fromkeys(shapes, (DeltaLayer(), 0))
    manager._embeddings = {"model.embed_tokens", "lm_head"}
    manager._bank = SlotBank(Places(places, {}, {}), 2, 2 << 20, torch.device("cpu"))
    return manager


@pytest.fixture
def said(monkeypatch):
    """The warnings; whether caplog sees them depends on vLLM's version."""
    from adamix.engines import vllm_manager

    found = []
    monkeypatch.setattr(vllm_manager.logger, "warning",
                        lambda text, *values: found.append(text % values))
    return found


@needs_vllm
def test_what_is_left_out_is_said_once_or_refused(folders, said):
    request = request_for(folders, "normed")
    model = worker_manager(folders)._load_adapter(request)
    assert model.id == IDS["normed"] and model.image.words.any()
    assert said == ["adamix: normed: left out, as vLLM cannot route them by request: 2 model.layers"
                    ".*.input_layernorm.weight, 2 model.layers.*.post_attention_layernorm.weight, "
                    "1 model.norm.weight"]
    with pytest.raises(BankError, match="normed: left out, as vLLM cannot"):
        worker_manager(folders, strict=True)._load_adapter(request)
    assert worker_manager(folders, strict=True)._load_adapter(request_for(folders, "d0")).image


@needs_vllm
def test_a_matrix_without_a_place_is_refused_but_the_vocabularys(folders, said):
    manager = worker_manager(folders)
    del manager._sites["model.embed_tokens.weight"]
    manager._load_adapter(request_for(folders, "d0"))
    assert len(said) == 1 and "by request: 1 model.embed_tokens.weight" in said[0]
    del manager._sites["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(BankError, match=r"d0 changes model.layers.1.mlp.up_proj.weight, which"):
        manager._load_adapter(request_for(folders, "d0"))


@needs_vllm
@pytest.mark.parametrize(("config", "sentence"), [
    ({"fully_sharded_loras": True}, "without fully_sharded_loras"),
    ({"stages": 2}, "needs pipeline_parallel_size 1, got 2")])
def test_a_configuration_that_cannot_work_is_refused(config, sentence):
    from adamix.engines.vllm_manager import _refuse_unsupported

    given = SimpleNamespace(
        lora_config=SimpleNamespace(fully_sharded_loras=config.get("fully_sharded_loras", False)),
        parallel_config=SimpleNamespace(pipeline_parallel_size=config.get("stages", 1)))
    with pytest.raises(BankError, match=sentence):
        _refuse_unsupported(given)


@needs_vllm
def test_base_and_fine_tunes_answer_side_by_side_as_the_restored_models(engine, folders):
    names = [None, "d0", "d1", "d2"]  # one more than there are slots
    assert answers(engine, folders, names, PROMPTS) == expected(folders, names, PROMPTS)


@needs_vllm
def test_fine_tunes_that_made_room_come_back(engine, folders):
    for names in (["d0"], ["d1", "d2"], [None], ["d0", "d2"], ["d1"]):
        assert answers(engine, folders, names, PROMPTS) == expected(folders, names, PROMPTS)


@needs_vllm
def test_a_prompt_that_all_share_is_cached_for_each_alone(engine, folders):
    names = ["d0", None, "d1", "d2", "d0", None]
    wanted = expected(folders, names, [LONG])
    assert len({tuple(tokens) for tokens in wanted}) == 4
    for _ in range(2):
        assert answers(engine, folders, names, [LONG]) == wanted


@needs_vllm
def test_norms_are_left_out(engine, folders):
    model = restored_model(folders / "base", folders / "normed")
    base = AutoModelForCausalLM.from_pretrained(folders / "base", dtype=torch.float32)
    merged = [generated(model, prompt) for prompt in PROMPTS]
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data = base.get_parameter(name).data
    found = answers(engine, folders, ["normed"], PROMPTS)
    assert found == [generated(model, prompt) for prompt in PROMPTS] != merged


@needs_vllm
@pytest.mark.parametrize("name", ["other", "peft", "gone"])
def test_what_cannot_be_served_is_refused_and_the_engine_goes_on(name, engine, folders):
    sentence = {"other": "was made from another base", "peft": "is a PEFT adapter",
                "gone": "No adapter found"}[name]
    with pytest.raises(Exception, match=sentence):  # vLLM's own, of another process
        engine.llm_engine.add_lora(request_for(folders, name))
    assert answers(engine, folders, ["d1"], PROMPTS[:1]) == expected(folders, ["d1"], PROMPTS[:1])
