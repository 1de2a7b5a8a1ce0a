"""DeltaBank: who is on the device, who makes room, and that no row ever gets another's weights."""

import random

import pytest
import torch
from conftest import skip_without_cuda
from routed_models import random_finetune, random_model
from tiny_models import compressed_pair, make_pair
from tiny_models import one_thread as one_thread
from transformers import AutoModelForCausalLM

import adamix
from adamix.errors import BankError, DeltaFileError, FingerprintError
from adamix.merging import restored_model
from adamix.serving.image import words_of

OPERATORS = ("delta_gemm_", "delta_gemm_.layers", "delta_embedding_", "add_rows_")
IDS = torch.arange(3, 12)[None]
ROOM = {"max_rank": 64, "capacity_bytes": 1 << 20}


class Models:
    """A base with a bank, and fine-tunes f0, f1, .. in memory beside their merged models."""

    def __init__(self, count=4, device="cpu", **sizes):
        base = random_model("llama")
        made = [random_finetune(base, seed) for seed in range(count)]
        self.deltas = {f"f{i}": delta for i, (delta, _) in enumerate(made)}
        merged = {f"f{i}": model for i, (_, model) in enumerate(made)} | {None: base}
        with torch.inference_mode():
            self.exact = {name: model(IDS).logits[0] for name, model in merged.items()}
        self.bytes = {name: 4 * words_of(delta) for name, delta in self.deltas.items()}
        self.model, self.device = random_model("llama").to(device), device
        self.bank = adamix.attach(self.model, verify=None, **(ROOM | sizes))

    def load(self, *names):
        for name in names:
            self.bank.load(name, self.deltas[name])

    def check(self, names):
        with torch.inference_mode():
            got = self.model(IDS.expand(len(names), -1).to(self.device)).logits.cpu()
        for row, name in zip(got, names, strict=True):
            exact = self.exact[name]
            assert (row - exact).abs().max() <= 1e-4 * exact.abs().max(), name

    def route(self, *names):
        self.bank.route(names)
        self.check(names)


def test_the_least_recently_routed_makes_room(device):
    models = Models(device=device, slots=2)
    models.load("f0", "f1")
    assert models.bank.resident == ["f0", "f1"]
    models.route("f0", None)
    models.bank.route([None])
    models.load("f2")
    assert models.bank.resident == ["f0", "f2"] and models.bank.names == ["f0", "f1", "f2"]
    models.route("f1", "f2", "f1")
    assert set(models.bank.resident) == {"f1", "f2"}
    metrics = models.bank.metrics
    assert (metrics.hits, metrics.misses, metrics.evictions, metrics.copies) == (2, 1, 2, 4)
    copied = sum(models.bytes[f"f{i}"] for i in (0, 1, 2, 1))
    assert metrics.copied_bytes == copied and metrics.reads == 0


def test_what_is_routed_or_pinned_stays(device):
    models = Models(device=device, slots=2)
    models.load("f0", "f1")
    models.bank.pin("f0")
    models.route("f1", None)
    with pytest.raises(BankError, match=r"f2 \(.* bytes\) does not fit beside .*\(f0, f1\): the "
                                        r"bank has 2 slots"):
        models.load("f2")
    models.check(["f1", None])  # nothing has happened to the route
    models.bank.unpin("f0")
    models.load("f2")
    assert set(models.bank.resident) == {"f1", "f2"}
    with pytest.raises(BankError, match="does not fit"):
        models.bank.route(["f0", "f1", "f2"])


def test_bytes_run_out_before_slots(device):
    largest = max(Models().bytes.values())
    models = Models(device=device, slots=4, capacity_bytes=2 * largest + largest // 2)
    models.load("f0", "f1", "f2")
    assert len(models.bank.resident) == 2 and models.bank.free_bytes < min(models.bytes.values())
    models.route("f0", "f2")


def test_many_swaps_never_mix_rows_up_and_lose_no_memory(device):
    models, choose = Models(6, device, slots=3), random.Random(0)
    address = [site.data_ptr() for site in (models.bank._memory.arena.words,
                                            models.bank._memory.tables)]
    free = models.bank.free_bytes
    models.load(*models.deltas)
    for step in range(40):
        few = choose.sample([*models.deltas, None], 3)
        models.route(*(choose.choice(few) for _ in range(5)))
        if step % 7 == 0:
            models.bank.route([None])
            gone = choose.choice(models.bank.names)
            models.bank.unload(gone)
            models.load(gone)
    models.bank.route([None])
    for name in models.deltas:
        models.bank.unload(name)
    assert models.bank.free_bytes == free and models.bank.names == models.bank.resident == []
    assert address == [site.data_ptr() for site in (models.bank._memory.arena.words,
                                                    models.bank._memory.tables)]


def test_a_fine_tune_of_the_same_name_is_replaced_under_a_route(device):
    models = Models(device=device, slots=2)
    models.load("f0", "f1")
    models.route("f0", "f1")
    models.bank.load("f0", models.deltas["f2"])
    models.exact["f0"] = models.exact["f2"]
    models.check(["f0", "f1"])
    assert models.bank.names == ["f0", "f1"]


def test_the_route_before_comes_back():
    models = Models(slots=2)
    models.load("f0", "f1")
    models.bank.route(["f0", None])
    with models.bank.route(["f1"]) as inner:
        models.check(["f1"])
        with inner, models.bank.route([None, "f0", "f1"]):
            models.check([None, "f0", "f1"])
    models.check(["f0", None])
    with pytest.raises(KeyError), models.bank.route(["f1"]):
        raise KeyError
    models.check(["f0", None])


def test_a_route_that_cannot_be_leaves_the_one_before():
    models = Models(slots=2)
    models.load("f0", "f1")
    models.route("f0", "f1")
    with pytest.raises(BankError, match="no fine-tune 'f9' is loaded; loaded are: f0, f1"):
        models.bank.route(["f1", "f9"])
    models.check(["f0", "f1"])
    with pytest.raises(BankError, match="rows, got 0"):
        models.bank.route([])
    models.check(["f0", "f1"])
    with pytest.raises(BankError, match="2 names, 1 counts"):
        models.bank.route_tokens(["f0", None], [3])


def test_a_route_that_fails_half_way_leaves_no_row_with_anothers_weights():
    models = Models(slots=2)
    models.load("f0", "f1", "f2", "f3")
    models.route("f0", "f1")
    with pytest.raises(BankError, match="f3 .* does not fit"):  # f2 came in f1's place
        models.bank.route(["f2", "f3", "f0"])
    models.check(["f0", "f1"])


def test_rows_that_are_routed_to_a_fine_tune_keep_it_loaded():
    models = Models(slots=2)
    models.load("f0")
    models.bank.route(["f0"])
    with pytest.raises(BankError, match="rows are routed to f0"):
        models.bank.unload("f0")
    models.bank.route([None])
    models.bank.unload("f0")
    for call in (models.bank.unload, models.bank.pin, models.bank.unpin, models.bank.prefetch):
        with pytest.raises(BankError, match="no fine-tune 'f0' is loaded; loaded are: none"):
            call("f0")


def test_the_host_keeps_what_fits_and_reads_the_rest_again():
    pair = compressed_pair()
    model = AutoModelForCausalLM.from_pretrained(pair.base, dtype=torch.float32)
    bank = adamix.attach(model, slots=1, host_bytes=1, **ROOM)
    bank.load("a", pair.delta)
    bank.load("b", pair.delta)
    assert bank.resident == ["b"] and bank.metrics.reads == 2
    restored = restored_model(pair.base, pair.delta)
    for name in ("a", "b", "a"):
        with torch.inference_mode(), bank.route([name]):
            got, exact = model(IDS).logits, restored(IDS).logits
            assert (got - exact).abs().max() <= 1e-4 * exact.abs().max()
    assert bank.metrics.reads == 5 and bank.metrics.read_seconds > 0


def test_one_delta_under_several_names_is_on_the_host_once():
    models = Models(slots=3)
    for name in ("f0", "x", "y"):
        models.bank.load(name, models.deltas["f0"])
        models.exact[name] = models.exact["f0"]
    images = {id(known.image) for known in models.bank._known.values()}
    assert len(images) == 1 and len(models.bank.resident) == 3
    models.route("y", "x", None, "f0")


def test_a_prefetched_fine_tune_waits_on_the_device():
    models = Models(slots=2)
    models.load("f0", "f1", "f2")
    assert "f0" not in models.bank.resident
    models.bank.prefetch("f0")
    before = models.bank.metrics.misses
    models.route("f0")
    assert models.bank.metrics.misses == before


# --- under CUDA graphs ---------------------------------------------------------------------------


@torch.inference_mode()
def test_a_captured_forward_pass_follows_routes_swaps_and_replacements():
    skip_without_cuda(*OPERATORS)
    models = Models(5, "cuda", slots=2)
    models.load(*models.deltas)
    models.bank.route([None] * 3)
    ids = IDS.expand(3, -1).cuda()

    def run():
        return models.model(ids, use_cache=False).logits

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = run()
    allocated, choose = torch.cuda.memory_allocated(), random.Random(0)
    for step in range(30):
        few = choose.sample([*models.deltas, None], 2)
        names = [choose.choice(few) for _ in range(3)]
        models.bank.route(names)
        if step % 5 == 4 and names[0] is not None:
            models.bank.load(names[0], models.deltas[names[0]])
        graph.replay()
        for row, name in zip(logits.cpu(), names, strict=True):
            exact = models.exact[name]
            assert (row - exact).abs().max() <= 1e-4 * exact.abs().max(), (step, name)
    assert torch.cuda.memory_allocated() == allocated


@pytest.mark.parametrize("compiled", [False, True])
def test_generate_with_a_static_cache_on_a_device(compiled):
    """As transformers does it: compiled, with CUDA graphs of its own."""
    skip_without_cuda(*OPERATORS)
    models, names = Models(2, "cuda", slots=2), ["f1", None, "f0"]
    models.load("f0", "f1")
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with models.bank.route(names):
        plain = models.model.generate(IDS.expand(3, -1).cuda(), **options)
        static = models.model.generate(IDS.expand(3, -1).cuda(), cache_implementation="static",
                                       disable_compile=not compiled, **options)
    assert torch.equal(plain, static)
    with models.bank.route(names[::-1]):  # the same graphs
        turned = models.model.generate(IDS.expand(3, -1).cuda(), cache_implementation="static",
                                       disable_compile=not compiled, **options)
    assert torch.equal(turned, static.flip(0))


# --- the base is the one the delta was made from ----------------------------------------------


@pytest.mark.parametrize("verify", ["sampled", "full"])
def test_another_base_is_refused(verify, tmp_path):
    pair = compressed_pair()
    other, _ = make_pair(tmp_path, seed=1)
    model = AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32)
    bank = adamix.attach(model, **ROOM, verify=verify)
    with pytest.raises(FingerprintError, match="x was made from another base"):
        bank.load("x", pair.delta)
    assert bank.names == []
    adamix.attach(_again(bank, model), {"x": pair.delta}, base=pair.base, verify=verify)


def _again(bank, model):
    bank.detach()
    return model


def test_a_damaged_folder_is_refused_and_nothing_is_known_of_it(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(compressed_pair().base)
    bank = adamix.attach(model)
    with pytest.raises(DeltaFileError, match="is no delta"):
        bank.load("x", tmp_path)
    assert bank.names == bank.resident == []


def test_default_sizes_follow_what_is_given():
    deltas = {"a": random_finetune(random_model("llama"), 0)[0]}
    words = words_of(deltas["a"])

    def sizes(*args, **keys):
        bank = adamix.attach(random_model("llama"), *args, verify=None, **keys)
        return bank.slots, bank._memory.arena.size

    model_words = sum(p.numel() for p in random_model("llama").parameters() if p.dim() == 2) / 2
    assert sizes()[0] == 8 and sizes()[1] == pytest.approx(8 * model_words / 15, rel=0.01)
    assert sizes(slots=3)[1] == pytest.approx(3 * model_words / 15, rel=0.01)
    assert sizes(capacity_bytes=1 << 20)[0] == int((1 << 20) * 32 / (4 * model_words))
    assert sizes(deltas) == (1, words)
    assert sizes(deltas, slots=2)[0] == 2 and sizes(deltas, slots=2)[1] >= 2 * words
