"""What engines are given, without one: slots, parts for workers, layers, options."""

from types import SimpleNamespace

import pytest
import torch
from routed_models import no_manifest, random_packed
from tolerance import assert_within_rounding
from torch import nn

from adamix import ops
from adamix.artifacts import ModelDelta
from adamix.engines.options import EngineOptions, wants_adamix
from adamix.engines.sharding import part_of
from adamix.engines.slots import SlotBank
from adamix.engines.vllm_layers import DeltaLinear, DeltaLogits, LayerSite
from adamix.errors import AdamixError, BankError
from adamix.panels import unpack_factor
from adamix.serving.image import MatrixPlace, Places

CPU = torch.device("cpu")


def packed(out, n, seed=0):
    return random_packed((out, n), torch.Generator().manual_seed(seed))


# --- parts for workers


@pytest.mark.parametrize(("rows", "columns"), [
    (range(320), range(256, 512)), (range(64, 128), range(600)), (range(17, 90), range(33, 47)),
    ([*range(32), *range(160, 192)], range(600)), (range(320), [5, 4, 599]),
    ([], range(600))])
def test_a_part_is_these_rows_and_columns_of_the_delta(rows, columns):
    whole = packed(320, 600)
    part = part_of(whole, torch.tensor(list(rows), dtype=torch.int64),
                   torch.tensor(list(columns)))
    assert part.shape == (len(rows), len(columns)) and part.v_counts == whole.v_counts
    assert part.u_counts == whole.u_counts != whole.v_counts
    assert torch.equal(part.scales, whole.scales)
    for found, codes, kept in zip(codes_of(part), codes_of(whole), (columns, rows), strict=True):
        assert torch.equal(found, codes[:, torch.tensor(list(kept), dtype=torch.int64)])


def codes_of(delta):
    """V's codes and U's, a component a row."""
    end = ops.v_words(delta.shape[1], delta.v_counts)
    return (unpack_factor(delta.words[:end], delta.v_counts, delta.shape[1]),
            unpack_factor(delta.words[end:], delta.u_counts, delta.shape[0]))


OUTS = (96, 48, 48)


class Wrapped(nn.Module):
    """Stands for vLLM's classes of q, k and v: rows shared out, inputs whole."""

    def __init__(self, workers=1, rank=0, outs=OUTS, n=64):
        super().__init__()
        self.tp_size, self.rank = workers, rank
        self.output_slices = tuple(out // workers for out in outs)
        self.input_size = n
        self.base_layer = SimpleNamespace(input_size=n, output_size=sum(outs), output_sizes=outs)

    def create_lora_weights(self, max_loras, lora_config, model_config=None):
        pass

    def slice_lora_a(self, lora_a):
        return lora_a

    def slice_lora_b(self, lora_b):
        return [None if b is None else b[self.rank * size : (self.rank + 1) * size]
                for b, size in zip(lora_b, self.output_slices, strict=True)]


class Down(Wrapped):
    """Of a layer whose inputs are shared out: partial sums."""

    def __init__(self, workers=1, rank=0):
        super().__init__(workers, rank, outs=(64,), n=192)
        self.output_slices, self.input_size = (64,), 192 // workers

    def slice_lora_a(self, lora_a):
        return lora_a[:, self.rank * self.input_size :][:, : self.input_size]

    def slice_lora_b(self, lora_b):
        return lora_b


DeltaWrapped = type("DeltaWrapped", (DeltaLinear, Wrapped), {})
DeltaDown = type("DeltaDown", (DeltaLinear, Down), {})


def made(cls, *args):
    layer = cls(*args)
    layer.create_lora_weights(2, None)
    return layer


def several():
    """Deltas of all the matrices of `Wrapped`, for two slots."""
    return [[packed(out, 64, 10 * slot + i) for i, out in enumerate(OUTS)] for slot in (0, 1)]


def bank_of(layer, deltas, slots=2):
    """A bank with these deltas of the layer's matrices, one list a slot."""
    sizes = layer.sizes()
    places = Places({str(i): MatrixPlace(i, size.part, 40) for i, size in enumerate(sizes)}, {}, {})
    bank = SlotBank(places, slots, slots << 18, CPU)
    for slot, matrices in enumerate(deltas):
        parts = {str(i): layer.part_of(matrix, i) for i, matrix in enumerate(matrices)}
        bank.fill(slot, bank.image("d", ModelDelta(parts, {}, {}, no_manifest())))
    return bank


def site_of(layer, bank, slots, segments=None):
    tables = [bank.table(str(i)) for i in range(len(layer.sizes()))]
    return LayerSite(bank.arena, tables, 40, segments, torch.tensor(slots))


SLOTS = [0, 1, -1, 1, 0]


def assert_deltas(found, x, deltas, workers=1):
    """Rows of fp32 `found` are the tokens' own deltas, matrix beside matrix, for SLOTS."""
    exact, magnitude = torch.zeros(2, *found.shape, dtype=torch.float64)
    for token, slot in enumerate(SLOTS):
        if slot >= 0:
            values, sizes = zip(*(product(matrix, x[token]) for matrix in deltas[slot]),
                                strict=True)
            exact[token], magnitude[token] = torch.cat(values), torch.cat(sizes)
    assert_within_rounding(found, exact, magnitude, terms=x.shape[1] + 40 + 2 + workers)
    assert exact[SLOTS.index(1)].any()


def product(matrix, x):
    """Δ̂ x in float64, and the same with every product by its absolute value."""
    V, U = (2 * codes.double() - (2.0 ** lane_bits(widths) - 1)[:, None] for codes, widths in
            zip(codes_of(matrix), (matrix.v_widths, matrix.u_widths), strict=True))
    U = U * matrix.scales.double()[:, None]
    return U.T @ (V @ x.double()), U.abs().T @ (V.abs() @ x.double().abs())


def lane_bits(widths):
    return torch.tensor([bits for bits, count in widths.items() for _ in range(count)]).double()


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_have_the_rows_of_every_matrix(workers):
    deltas = several()
    x, outputs = torch.randn(5, 64), []
    for rank in range(workers):
        layer = made(DeltaWrapped, workers, rank)
        layer.install(site_of(layer, bank_of(layer, deltas), SLOTS))
        outputs.append(layer._apply_lora_to_output(x, torch.zeros(5, sum(OUTS) // workers)))
    split = [output.split([out // workers for out in OUTS], 1) for output in outputs]
    together = torch.cat([torch.cat(parts, 1) for parts in zip(*split, strict=True)], 1)
    assert_deltas(together, x, deltas)


def test_workers_with_parts_of_the_inputs_add_up():
    deltas = [[packed(64, 192, slot)] for slot in (0, 1)]
    x, total = torch.randn(5, 192), torch.zeros(5, 64)
    for rank in (0, 1):
        layer = made(DeltaDown, 2, rank)
        layer.install(site_of(layer, bank_of(layer, deltas), SLOTS))
        total += layer._apply_lora_to_output(x[:, 96 * rank :][:, :96], torch.zeros(5, 64))
    assert_deltas(total, x, deltas, workers=2)


def segments_of(slots, most):
    """As vLLM keeps them for a GPU: sorted by slot, -1 first, what is unused 0 or -1."""
    slots = torch.tensor(slots)
    ids, counts = torch.unique(slots, return_counts=True)
    active, tokens = torch.full((most + 1,), -1), torch.zeros(most + 1)
    starts = torch.zeros(most + 2)
    active[: len(ids)], tokens[: len(ids)] = ids, counts.float()
    starts[1 : len(ids) + 1] = counts.cumsum(0)
    order = torch.cat([slots.argsort(stable=True), torch.full((9,), 10**6)])  # stale beyond
    return SimpleNamespace(token_indices_sorted_by_lora_ids=order.int(),
                           num_tokens_per_lora=tokens.int(), lora_token_start_loc=starts.int(),
                           active_lora_ids=active.int(),
                           no_lora_flag_cpu=(slots < 0).all()[None])


def test_sorted_tokens_of_a_gpu_give_what_slots_of_the_cpu_give():
    deltas = several()
    layer = made(DeltaWrapped)
    bank, x = bank_of(layer, deltas), torch.randn(5, 64)
    found = []
    for segments in (None, segments_of(SLOTS, 2)):
        layer.install(site_of(layer, bank, SLOTS, segments))
        with torch.inference_mode():
            found.append(layer._apply_lora_to_output(x, torch.zeros(5, 192)))
    assert torch.equal(*found) and found[0].any()
    layer.install(site_of(layer, bank, SLOTS, segments_of([-1] * 5, 2)))
    assert not layer._apply_lora_to_output(x, torch.zeros(5, 192)).any()


def test_a_layer_compiles_whole_and_follows_what_changes_in_place():
    """As vLLM compiles it: functionalized the first way."""
    deltas = several()
    layer, meta = made(DeltaWrapped), segments_of(SLOTS, 2)
    bank = bank_of(layer, deltas)
    layer.install(site_of(layer, bank, SLOTS, meta))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(layer._apply_lora_to_output, fullgraph=True, backend=backend,
                             dynamic=True)
    x = torch.randn(5, 64)

    def changed_rows():
        found = compiled(x, torch.ones(5, 192))
        assert torch.equal(found, layer._apply_lora_to_output(x, torch.ones(5, 192)))
        return found.ne(1).any(1).tolist()

    with torch._inductor.config.patch(enable_auto_functionalized_v2=False):
        assert changed_rows() == [slot >= 0 for slot in SLOTS]
        bank.fill(1, None)
        assert changed_rows() == [slot == 0 for slot in SLOTS]
        meta.no_lora_flag_cpu.fill_(True)  # though the tables on the device say otherwise
        assert not any(changed_rows())
    assert len(graphs) == 1


def test_activations_may_have_a_batch_dimension_and_layers_no_site():
    deltas = several()
    layer = made(DeltaWrapped)
    x = torch.randn(5, 64)
    assert not layer._apply_lora_to_output(x, torch.zeros(5, 192)).any()
    layer.install(site_of(layer, bank_of(layer, deltas), SLOTS))
    flat = layer._apply_lora_to_output(x, torch.zeros(5, 192))
    assert torch.equal(layer._apply_lora_to_output(x[None], torch.zeros(1, 5, 192))[0], flat)
    assert layer._apply_lora_to_output(x[:0], torch.zeros(0, 192)).shape == (0, 192)


def test_a_head_adds_to_its_logits_in_their_type():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.base_layer, self.hidden_size = SimpleNamespace(org_vocab_size=96), 64

        def create_lora_weights(self, max_loras, lora_config, model_config=None):
            pass

        def _get_logits(self, hidden_states, lm_head):
            return torch.zeros(len(hidden_states), 100)  # fp32, and padded

    layer = made(type("DeltaHead", (DeltaLogits, Head), {}))
    deltas = [[packed(96, 64, slot)] for slot in (0, 1)]
    layer.install(site_of(layer, bank_of(layer, deltas), SLOTS))
    x = torch.randn(5, 64).bfloat16()
    logits = layer._get_logits(x, None)
    assert_deltas(logits[:, :96], x, deltas)
    assert not logits[:, 96:].any()


# --- slots


def test_a_slot_is_filled_over_and_emptied():
    layer = made(DeltaDown)
    deltas = [[packed(64, 192, seed)] for seed in range(3)]
    bank, x = bank_of(layer, deltas[:2]), torch.randn(5, 192)
    arena, table = bank.arena.data_ptr(), bank.table("0").data_ptr()
    bank.fill(1, bank.image("d", ModelDelta({"0": deltas[2][0]}, {}, {}, no_manifest())))
    layer.install(site_of(layer, bank, SLOTS))
    found = layer._apply_lora_to_output(x, torch.zeros(5, 64))
    assert_deltas(found, x, [deltas[0], deltas[2]])
    bank.fill(0, None)
    found = layer._apply_lora_to_output(x, torch.zeros(5, 64))
    assert not found[[0, 2, 4]].any() and found[[1, 3]].any()
    assert (bank.arena.data_ptr(), bank.table("0").data_ptr()) == (arena, table)


def test_what_fits_no_slot_is_refused_with_the_bytes_it_needs():
    one = packed(64, 192)
    places = Places({"0": MatrixPlace(0, (64, 192), 40)}, {}, {})
    delta = ModelDelta({"0": one}, {}, {}, no_manifest())
    with pytest.raises(BankError, match="capacity_bytes of at least") as error:
        SlotBank(places, 3, 3 * 1024, CPU).image("big", delta)
    needed = int(str(error.value).rsplit(" ", 1)[1])
    SlotBank(places, 3, needed, CPU).image("big", delta)
    few = Places({"0": MatrixPlace(0, (64, 192), one.rank - 1)}, {}, {})
    with pytest.raises(BankError, match="give a larger max_rank"):
        SlotBank(few, 3, needed, CPU).image("big", delta)
    assert ops.TABLE_COLUMNS == SlotBank(places, 3, needed, CPU).table("0").shape[1]


# --- options


def test_options_come_from_the_engines_configuration():
    assert EngineOptions.of({"adamix": {}}) == EngineOptions()
    given = {"capacity_bytes": 7, "max_rank": 3, "strict": True, "verify": None}
    assert EngineOptions.of({"adamix": given, "other": 1}) == EngineOptions(7, 3, True, None)
    assert wants_adamix({"adamix": {}}) and not wants_adamix({}) and not wants_adamix(None)


@pytest.mark.parametrize(("given", "sentence"), [
    ({"capacity": 7}, "adamix has no option 'capacity'; it has capacity_bytes, max_rank"),
    ({"capacity_bytes": 0}, "capacity_bytes must be a whole number from 1 on, got 0"),
    ({"max_rank": "64"}, "max_rank must be a whole number from 1 on, got '64'"),
    ({"strict": 1}, "strict must be true or false"), ({"verify": "no"}, 'verify must be "sampled"'),
    (True, "adamix must be an object with options, got True")])
def test_options_that_are_none_are_refused(given, sentence):
    with pytest.raises(AdamixError, match=sentence):
        EngineOptions.of({"adamix": given})
