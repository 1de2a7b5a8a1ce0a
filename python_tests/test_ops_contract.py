"""What every operator promises besides its numbers: tracing, refusals in words, views, empties."""

import runpy
import shutil
from collections.abc import Callable

import pytest
import torch
from bank import OVERLOADS, as_segments
from conftest import skip_without_cuda
from torch import Tensor

from adamix import ops

DEVICES = ("cpu", "cuda")
EMBEDDINGS = ("delta_embedding", "delta_embedding_")
OPERATORS = ("pack", "unpack", "gptq", "search_scales", *OVERLOADS, *EMBEDDINGS, "add_rows_")
KEYWORDS = {"delta_embedding": {"dtype": torch.bfloat16}}
IN, OUT, TOKENS = 40, 35, 6
OUTS = [OUT, OUT, 20]
SLOTS = [0, 2, -1, 1, 2, 7]
V_COUNTS = [1, 0, 0, 2, 0, 3, 0, 2]  # at 8, 7 .. 1 bits
U_COUNTS = [0, 2, 2, 0, 0, 1, 3, 0]
RANK = sum(V_COUNTS)


def random_bank() -> tuple[Tensor, Tensor]:
    """Any words are codes: two slots of one delta's size, an empty one between them."""
    v, u = ops.v_words(IN, V_COUNTS), ops.u_words(OUT, U_COUNTS)
    delta = v + u + RANK
    arena = torch.randint(-(2**31), 2**31, (2 * delta,), dtype=torch.int32)
    for first in (v + u, delta + v + u):
        arena[first : first + RANK] = (1e-4 * torch.randn(RANK)).view(torch.int32)
    rows = [[0, v, v + u, *V_COUNTS, *U_COUNTS], [0] * ops.TABLE_COLUMNS]
    rows.append([delta, delta + v, delta + v + u, *V_COUNTS, *U_COUNTS])
    return arena, torch.tensor(rows)


def routed() -> tuple[Tensor, Tensor, Tensor]:
    return (*random_bank(), torch.tensor(SLOTS, dtype=torch.int32))


def layers() -> tuple[list[Tensor], Tensor, Tensor, list[Tensor]]:
    """ys, x, arena, tables: a bank that serves for three matrices."""
    arena, table = random_bank()
    ys = [torch.randn(TOKENS, out) for out in OUTS]
    return ys, torch.randn(TOKENS, IN), arena, [table, table.clone(), table.clone()]


def arguments(operator: str, device: str = "cpu") -> list:
    """A correct call of the raw operator."""
    made = {
        "pack": lambda: [torch.randint(0, 8, (3, 70), dtype=torch.uint8), 3],
        "unpack": lambda: [torch.randint(-(2**31), 2**31, (3, 9), dtype=torch.int32), 3, 70],
        "gptq": lambda: [
            torch.randn(5, 7),
            torch.eye(7),
            torch.full((5,), 3, dtype=torch.int32),
            torch.full((5,), 0.3),
            True,
        ],
        "search_scales": lambda: [
            torch.randn(5, 7),
            torch.arange(3, 8, dtype=torch.int32),
            torch.rand(7),
        ],
        "delta_gemm": lambda: [torch.randn(TOKENS, IN), *routed(), OUT],
        "delta_gemm_": lambda: [torch.randn(TOKENS, OUT), torch.randn(TOKENS, IN), *routed()],
        "delta_gemm.layers": lambda: [*layers()[1:], routed()[2], OUTS],
        "delta_gemm_.layers": lambda: [*layers(), routed()[2]],
        "delta_gemm_.segments": lambda: [*layers(), *as_segments(SLOTS, 6, "cpu")],
        "delta_embedding": lambda: [torch.arange(TOKENS), *routed(), OUT, IN],
        "delta_embedding_": lambda: [torch.randn(TOKENS, IN), torch.arange(TOKENS), *routed(), OUT],
        "add_rows_": lambda: [layers()[0], torch.randn(3, sum(OUTS)), routed()[2]],
    }[operator]()
    return each_tensor(lambda t: t.to(device), made)


def each_tensor(change: Callable[[Tensor], Tensor], args: list) -> list:
    """The same arguments with every tensor changed, those in lists too."""
    return [
        change(a)
        if isinstance(a, Tensor)
        else each_tensor(change, a)
        if isinstance(a, list)
        else a
        for a in args
    ]


def raw(operator: str) -> Callable:
    name, _, overload = operator.partition(".")
    return getattr(getattr(torch.ops.adamix, name), overload or "default")


def results(operator: str, args: list) -> list[Tensor]:
    """What the operator returns, or writes into its first argument."""
    returned = raw(operator)(*args, **KEYWORDS.get(operator, {}))
    value = args[0] if returned is None else returned
    return list(value) if isinstance(value, (list, tuple)) else [value]


def same(got: list[Tensor], expected: list[Tensor]) -> bool:
    return all(a.equal(b) for a, b in zip(got, expected, strict=True))


def writes_into_an_argument(operator: str) -> bool:
    return operator.partition(".")[0].endswith("_")


@pytest.fixture(
    params=[(operator, device) for operator in OPERATORS for device in DEVICES],
    ids=lambda param: "-".join(param),
)
def operator(request: pytest.FixtureRequest) -> tuple[str, str]:
    if request.param[1] == "cuda":
        skip_without_cuda(request.param[0])
    return request.param


# --- tracing -----------------------------------------------------------------------------------


def test_opcheck(operator):
    name, device = operator
    torch.library.opcheck(raw(name), arguments(name, device), KEYWORDS.get(name, {}))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(operator, dynamic):
    name, device = operator
    args = arguments(name, device)

    def call(*tensors):
        return results(name, list(tensors))

    expected = call(*each_tensor(Tensor.clone, args))
    torch.compiler.reset()  # operators share `call`, and recompilations are limited
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    assert same(compiled(*args), expected)


def test_the_typed_functions_compile_too():
    bank, table, slots = routed()

    def layer(x: Tensor) -> Tensor:
        y = ops.delta_gemm(x, bank, table, slots, out_features=OUT) + 1
        ops.delta_gemm_(y, x, bank, table, slots)
        return y

    x = torch.randn(2, TOKENS // 2, IN)
    assert torch.compile(layer, fullgraph=True, backend="aot_eager")(x).equal(layer(x))


def test_fake_kernels_know_the_shapes_and_types():
    for name in OPERATORS:
        real, fake = results(name, arguments(name)), results(name, arguments(name, "meta"))
        assert [(t.shape, t.dtype) for t in fake] == [(t.shape, t.dtype) for t in real]
        assert all(t.is_meta for t in fake)


@pytest.mark.parametrize("overload", [name for name in OPERATORS if "pack" not in name])
def test_tensors_on_two_devices_are_refused(device, overload):
    """On the CPU by the fake kernel, which torch picks as soon as one tensor is on "meta"."""
    elsewhere = "meta" if device == "cpu" else "cpu"
    args = arguments(overload, device)
    first = 1 if writes_into_an_argument(overload) else 0  # the one that others follow
    for place, arg in enumerate(args):
        if isinstance(arg, Tensor):
            moved = arg.to(elsewhere)
        elif isinstance(arg, list) and isinstance(arg[-1], Tensor):
            moved = [*arg[:-1], arg[-1].to(elsewhere)]
        else:
            continue
        places = (elsewhere, device) if place == first else (device, elsewhere)
        words = r"^{}: \S+ must be on the device of (x|tokens|weight|lanes|values), {}(:0)?, got {}"
        with pytest.raises(RuntimeError, match=words.format(overload, *places)):
            results(overload, [*args[:place], moved, *args[place + 1 :]])


def test_a_device_without_a_kernel_is_torchs_own_error():
    with pytest.raises(NotImplementedError, match="adamix::pack"):
        ops.pack(torch.zeros(2, 2, dtype=torch.uint8).to_sparse(), bits=2)


# --- memory ------------------------------------------------------------------------------------


def scattered(tensor: Tensor) -> Tensor:
    """The same values with every stride and the offset changed."""
    wide = torch.zeros([2 * size + 3 for size in tensor.shape], dtype=tensor.dtype)
    inside = wide.to(tensor.device)[tuple(slice(3, 3 + 2 * size, 2) for size in tensor.shape)]
    return inside.copy_(tensor)


def test_strided_and_offset_inputs_are_read_right(operator):
    name, device = operator
    args = arguments(name, device)
    strided = each_tensor(scattered, args)
    if writes_into_an_argument(name):  # y is an output: see below
        strided[:1] = each_tensor(Tensor.clone, args[:1])
    assert same(results(name, strided), results(name, args))


def test_every_element_of_an_output_is_written(operator):
    """torch fills new tensors with NaN or the largest integer in its deterministic mode."""
    name, device = operator
    args = arguments(name, device)
    expected = results(name, each_tensor(Tensor.clone, args))
    torch.use_deterministic_algorithms(True)
    try:
        assert same(results(name, args), expected)
    finally:
        torch.use_deterministic_algorithms(False)


def test_delta_gemm_writes_into_its_view_and_nowhere_else():
    y, *rest = arguments("delta_gemm_")
    around = torch.full((TOKENS + 2, OUT + 9), 77.0)
    inside = around[1:-1, 4:-5]
    inside.copy_(y)
    ops.delta_gemm_(y, *rest)
    ops.delta_gemm_(inside, *rest)
    assert inside.equal(y)
    inside.fill_(77.0)
    assert (around == 77.0).all()


def test_no_tokens_no_lanes_no_columns(device):
    byte, integer = ({"dtype": kind, "device": device} for kind in (torch.uint8, torch.int32))
    assert ops.pack(torch.empty(0, 5, **byte), bits=3).shape == (0, 3)
    assert ops.pack(torch.empty(5, 0, **byte), bits=3).shape == (5, 0)
    assert ops.unpack(torch.empty(0, 3, **integer), bits=3, count=5).shape == (0, 5)
    assert ops.unpack(torch.empty(5, 0, **integer), bits=3, count=0).shape == (5, 0)
    for rows, n in ((0, 4), (4, 0), (0, 0)):
        lanes = torch.ones(rows, **integer), torch.ones(rows, device=device)
        problem = torch.empty(rows, n, device=device), torch.eye(n, device=device), *lanes
        assert ops.gptq(*problem, by_row=True).shape == (rows, n)
    arena, table, slots = (tensor.to(device) for tensor in routed())
    x = torch.empty(0, IN, device=device)
    assert ops.delta_gemm(x, arena, table, slots[:0], out_features=OUT).shape == (0, OUT)
    ones = torch.ones(TOKENS, IN, device=device)
    nothing = ops.delta_gemm(ones, arena[:0], table[:0], slots, out_features=OUT)
    assert nothing.shape == (TOKENS, OUT) and nothing.count_nonzero() == 0


@pytest.mark.parametrize("name", ["pack", "unpack"])
def test_cuda_graphs_and_other_streams(name):
    skip_without_cuda(name)
    args = arguments(name, "cuda")
    (expected,) = results(name, args)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        (other,) = results(name, args)
    stream.synchronize()
    assert other.equal(expected)
    graph, source = torch.cuda.CUDAGraph(), args[0].clone()
    with torch.cuda.graph(graph):
        (captured,) = results(name, [source, *args[1:]])
    source.zero_()
    graph.replay()
    assert captured.count_nonzero() == 0


# --- refusals ----------------------------------------------------------------------------------


def replaced(operator: str, **changes: object) -> list:
    """A correct call with some arguments replaced: `at2=value` or a function of the old value."""
    args = arguments(operator)
    for place, value in changes.items():
        index = int(place.removeprefix("at"))
        args[index] = value(args[index]) if callable(value) else value
    return args


def table_with(column: int, value: int) -> Callable[[Tensor], Tensor]:
    def change(table: Tensor) -> Tensor:
        table = table.clone()
        table[2, column] = value
        return table

    return change


def item(place: int, change: Callable[[Tensor], Tensor]) -> Callable[[list[Tensor]], list[Tensor]]:
    return lambda tensors: [change(t) if i == place else t for i, t in enumerate(tensors)]


LAYERS, LAYERS_, SEGMENTS_ = "delta_gemm.layers", "delta_gemm_.layers", "delta_gemm_.segments"
REFUSALS = [
    ("pack", {"at0": lambda t: t.int()}, "codes must be uint8, got int32"),
    ("pack", {"at0": lambda t: t[0]}, r"codes must have 2 dimensions, \[lanes, n\], got \[70\]"),
    ("pack", {"at1": 0}, r"bits must be 1\.\.8, got 0"),
    ("pack", {"at1": 9}, r"bits must be 1\.\.8, got 9"),
    ("pack", {"at0": lambda t: t.fill_(8)}, "codes of 3 bits must be at most 7, got 8 in lane 0"),
    ("unpack", {"at0": lambda t: t.long()}, "words must be int32, got int64"),
    ("unpack", {"at0": lambda t: t[None]}, r"words must have 2 dimensions, .*got \[1, 3, 9\]"),
    ("unpack", {"at1": 4}, "70 codes of 4 bits need 12 words a lane, got 9"),
    ("unpack", {"at2": 97}, "97 codes of 3 bits need 12 words a lane, got 9"),
    ("unpack", {"at2": -1}, "count must be 0..2.48 - 1, got -1"),
    ("unpack", {"at1": -3}, r"bits must be 1\.\.8, got -3"),
    ("gptq", {"at0": lambda t: t.double()}, "weight must be float32, got float64"),
    ("gptq", {"at0": lambda t: t[0]}, r"weight must have 2 dimensions, \[rows, n\], got \[7\]"),
    ("gptq", {"at1": torch.eye(6)}, r"hinv must be 7 \(columns of weight\) in dimension 0"),
    ("gptq", {"at1": torch.ones(7, 8)}, r"hinv must be 7 .* in dimension 1, got shape \[7, 8\]"),
    ("gptq", {"at1": torch.eye(7).bfloat16()}, "hinv must be float32, got bfloat16"),
    ("gptq", {"at2": lambda t: t.long()}, "bits must be int32, got int64"),
    ("gptq", {"at2": lambda t: t[:4]}, r"bits must be 5 \(one a row\) in dimension 0"),
    ("gptq", {"at4": False}, r"bits must be 7 \(one a column\) in dimension 0, got shape \[5\]"),
    ("gptq", {"at2": lambda t: t.fill_(0)}, r"bits must be 1\.\.8, got 0"),
    ("gptq", {"at2": lambda t: t.fill_(9)}, r"bits must be 1\.\.8, got 9"),
    ("gptq", {"at3": lambda t: t.half()}, "scales must be float32, got float16"),
    ("gptq", {"at3": lambda t: t[:, None]}, r"scales must have 1 dimensions, .*got \[5, 1\]"),
    ("delta_gemm", {"at0": lambda t: t.double()}, "float16, bfloat16 or float32, got float64"),
    ("delta_gemm", {"at0": lambda t: t[0]}, r"x must have 2 dimensions, \[tokens, in\]"),
    ("delta_gemm", {"at1": lambda t: t.float()}, "arena must be int32, got float32"),
    ("delta_gemm", {"at1": lambda t: t[None]}, "arena must have 1 dimensions"),
    ("delta_gemm", {"at2": lambda t: t.int()}, "table must be int64, got int32"),
    ("delta_gemm", {"at2": lambda t: t[:, :11]}, r"table must be 19 .*got shape \[3, 11\]"),
    ("delta_gemm", {"at3": lambda t: t.long()}, "slots must be int32, got int64"),
    ("delta_gemm", {"at3": lambda t: t[:5]}, r"slots must be 6 \(tokens of x\)"),
    ("delta_gemm", {"at4": -1}, "out_features must not be negative, got -1"),
    ("delta_gemm", {"at4": 10**6}, "table row 0 does not fit: .* 1000000 outputs, lead out of"),
    ("delta_gemm", {"at0": lambda t: torch.randn(TOKENS, 4000)}, "table row 0 does not fit"),
    ("delta_gemm", {"at1": lambda t: t[:-1]}, "table row 2 does not fit: .* the arena of"),
    ("delta_gemm", {"at2": table_with(0, -1)}, "table row 2 does not fit"),
    ("delta_gemm", {"at2": table_with(1, 2**62)}, "table row 2 does not fit"),
    ("delta_gemm", {"at2": table_with(2, 2**63 - 1)}, "table row 2 does not fit"),
    ("delta_gemm", {"at2": table_with(3, -1)}, "table row 2 does not fit"),
    ("delta_gemm", {"at2": table_with(10, 2**62)}, "table row 2 does not fit"),
    ("delta_gemm", {"at2": table_with(11, -1)}, "table row 2 does not fit"),
    ("delta_gemm", {"at2": table_with(18, 2**62)}, "table row 2 does not fit"),
    ("delta_gemm", {"at2": table_with(17, 2)}, "table row 2 has 8 lanes of V and 7 of U, expected"),
    ("delta_gemm_", {"at0": lambda t: t.half()}, "y must be float32, got float16"),
    ("delta_gemm_", {"at0": lambda t: t[0]}, r"y must have 2 dimensions, \[tokens, out\]"),
    ("delta_gemm_", {"at1": lambda t: t.int()}, "x must be .* or float32, got int32"),
    ("delta_gemm_", {"at0": lambda t: t[:4]}, r"y must be 6 \(tokens of x\) in dimension 0"),
    ("delta_gemm_", {"at0": lambda t: t.T.contiguous().T}, r"adjacent .*got stride 6"),
    ("delta_gemm_", {"at0": lambda t: t[:1].expand(6, OUT)}, "rows of y must not overlap: .*got 0"),
    (LAYERS, {"at2": []}, r"tables must be 1\.\.8 tensors, got 0"),
    (LAYERS, {"at2": lambda t: t * 3}, r"tables must be 1\.\.8 tensors, got 9"),
    (LAYERS, {"at2": item(1, Tensor.int)}, r"tables\[1\] must be int64, got int32"),
    (LAYERS, {"at2": item(2, lambda t: t[:2])}, r"tables\[2\] must be 3 \(capacity of tables\[0\]"),
    (LAYERS, {"at4": [OUT, OUT]}, "out_features must be 3, one a table, got 2"),
    (LAYERS, {"at4": [OUT, OUT, -1]}, "out_features must not be negative, got -1"),
    (LAYERS, {"at3": lambda t: t[:5]}, r"slots must be 6 \(tokens of x\)"),
    (LAYERS_, {"at0": lambda t: t[:2]}, "ys must be 3, one a table, got 2"),
    (LAYERS_, {"at0": item(1, Tensor.half)}, r"ys\[1\] must be float32, got float16"),
    (LAYERS_, {"at0": item(2, lambda t: t[:4])}, r"ys\[2\] must be 6 \(tokens of x\)"),
    (LAYERS_, {"at0": item(0, lambda t: t.T.contiguous().T)}, r"ys\[0\] must have adjacent"),
    (LAYERS_, {"at0": item(1, lambda t: t[:1].expand(6, OUT))}, r"rows of ys\[1\] must not"),
    (LAYERS_, {"at3": item(1, lambda t: t.clone().fill_(-1))}, r"tables\[1\] row 0 does not fit"),
    (SEGMENTS_, {"at0": lambda t: t[:2]}, "ys must be 3, one a table, got 2"),
    (SEGMENTS_, {"at4": Tensor.long}, "token_indices must be int32, got int64"),
    (SEGMENTS_, {"at4": lambda t: t[:5]}, r"token_indices must be 6 \(tokens of x\)"),
    (SEGMENTS_, {"at5": lambda t: t[None]}, r"token_counts must have 1 dimensions, \[segments\]"),
    (SEGMENTS_, {"at6": lambda t: t[:5]}, "token_starts must be at least 6 .*, got shape .5."),
    (SEGMENTS_, {"at6": Tensor.float}, "token_starts must be int32, got float32"),
    (SEGMENTS_, {"at7": lambda t: t[:5]}, r"segment_slots must be 6 \(segments of token_counts\)"),
]


@pytest.mark.parametrize(("name", "changes", "words"), REFUSALS)
def test_a_mistake_gets_a_sentence(name, changes, words):
    with pytest.raises(RuntimeError, match=f"{name}: .*{words}"):
        raw(name)(*replaced(name, **changes))


@pytest.mark.parametrize("overload", OVERLOADS)
def test_a_negative_max_rank_is_refused(device, overload):
    with pytest.raises(RuntimeError, match=f"{overload}: max_rank must not be negative, got -1"):
        raw(overload)(*arguments(overload, device), max_rank=-1)


def test_a_refusal_for_one_matrix_leaves_all_as_they_were():
    args = replaced("delta_gemm_.layers", at3=item(2, table_with(0, -1)))
    before = each_tensor(Tensor.clone, args[0])
    with pytest.raises(RuntimeError, match=r"tables\[2\] row 2 does not fit"):
        raw("delta_gemm_.layers")(*args)
    assert same(args[0], before)


def test_slots_that_nobody_uses_may_hold_anything():
    args = replaced("delta_gemm", at2=table_with(0, -1))
    args[3] = torch.zeros(TOKENS, dtype=torch.int32)
    raw("delta_gemm")(*args)


def test_a_refusal_is_its_sentence_and_nothing_else():
    with pytest.raises(RuntimeError) as refusal:
        ops.pack(torch.zeros(1, 1), bits=1)
    assert str(refusal.value) == "pack: codes must be uint8, got float32"


def test_a_library_that_is_not_built_says_how_to_build_it(tmp_path):
    shutil.copy(ops.__file__, tmp_path / "ops.py")
    with pytest.raises(ImportError, match="libadamix_ops.so is missing; run `pip install .`"):
        runpy.run_path(str(tmp_path / "ops.py"))
