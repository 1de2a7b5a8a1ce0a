"""The rival methods of benchmarks/methods against their published descriptions."""

import importlib
import itertools
import math
import sys
from pathlib import Path

import pytest
import torch

from adamix import relative_error

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))
methods, tables, plot = map(importlib.import_module, ("methods", "method_tables", "plot_methods"))
(adamix_published, bitdelta, components, delta_come, delta_dct, delta_dq, group_gptq, impart,
 low_rank, quantizer, ultradelta) = (importlib.import_module(f"methods.{name}") for name in (
     "adamix_published", "bitdelta", "components", "delta_come", "delta_dct", "delta_dq",
     "group_gptq", "impart", "low_rank", "quantizer", "ultradelta"))

QUALITY = (ROOT / "benchmarks" / "QUALITY.md").read_text()
OUT, IN = 96, 160


@pytest.fixture(scope="module")
def case():
    """A delta whose singular values fall, and correlated inputs."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=random)

    falling = 0.9 ** torch.arange(OUT)
    delta = 1e-3 * (normal(OUT, OUT) * falling @ normal(OUT, IN) + 0.5 * normal(OUT, IN))
    inputs = normal(IN, IN) @ normal(IN, 4 * IN) + normal(IN, 4 * IN)
    return delta, inputs @ inputs.T


def error(result, case):
    return relative_error(case[0], result.dense, case[1])


# --- the shared quantizer ----------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_a_group_that_lies_on_a_grid_is_exact(bits):
    codes = torch.arange(2**bits).repeat(3, 8)[:, : max(2**bits, 8)].float()
    values = 0.25 * (codes - (2**bits - 1) // 2)
    grid = quantizer.fit(values, torch.full((3,), bits))
    assert grid.scale.tolist() == [0.25] * 3
    assert torch.equal(torch.stack([grid.round(column) for column in values.T], 1), values)


def test_gptq_leaves_values_on_a_grid_alone(case):
    codes = torch.randint(0, 4, (5, IN), generator=torch.Generator().manual_seed(1))
    weights = 0.5 * (codes.float() - 1.0)
    order = case[1].diagonal().argsort(descending=True)
    for begin in (0, quantizer.GROUP):  # each group has its least and its largest level
        weights[:, order[begin]], weights[:, order[begin + 1]] = -0.5, 1.0
    assert torch.equal(quantizer.gptq(weights, case[1], torch.full((5, 1), 2)), weights)


def test_gptq_without_correlations_is_rounding_to_the_nearest_level():
    weights = torch.randn(4, 200, generator=torch.Generator().manual_seed(2))
    got = quantizer.gptq(weights, torch.eye(200), torch.full((4, 1), 3))
    for begin, end in ((0, 128), (128, 200)):
        part = weights[:, begin:end]
        low, high = part.amin(1, keepdim=True), part.amax(1, keepdim=True)
        scale = ((high - low) / 7).half().float()
        levels = scale[..., None] * (torch.arange(8) - torch.round(-low / scale)[..., None])
        nearest = (part[..., None] - levels).abs().amin(-1)
        torch.testing.assert_close((part - got[:, begin:end]).abs(), nearest, atol=1e-6, rtol=0)


def test_gptq_is_the_plain_loop_over_columns_in_float64(case):
    """Without blocks: after each column all that are still to come take their part of its error."""
    weights, H = case[0][:16].double(), case[1].double()
    H = H + 0.01 * H.diagonal().mean() * torch.eye(IN)
    order = H.diagonal().argsort(descending=True)
    upper = torch.linalg.cholesky(torch.linalg.inv(H[order][:, order]), upper=True)
    left, expected = weights[:, order].clone(), torch.empty_like(weights)
    for j in range(IN):
        if j % 128 == 0:
            group = left[:, j : j + 128]
            low, high = group.amin(1).clamp_max(0), group.amax(1).clamp_min(0)
            scale = ((high - low) / 7).half().double()
            zero = torch.round(-low / scale)
        codes = (torch.round(left[:, j] / scale) + zero).clamp(0, 7)
        expected[:, order[j]] = scale * (codes - zero)
        lost = (left[:, j] - expected[:, order[j]]) / upper[j, j]
        left[:, j + 1 :] -= lost[:, None] * upper[j, j + 1 :]
    got = quantizer.gptq(case[0][:16], case[1], torch.full((16, 1), 3))
    # fp32 turns a value about half-way between two levels now and then, and what follows it
    rows = [torch.allclose(*pair, atol=1e-9) for pair in zip(got.double(), expected, strict=True)]
    assert sum(rows) >= 14


def test_gptq_has_less_error_than_rounding_and_more_bits_have_less(case):
    delta, gram = case
    errors = []
    for bits in (2, 3, 4):
        widths = torch.full((OUT, 1), bits)
        got = relative_error(delta, quantizer.gptq(delta, gram, widths), gram)
        assert got < relative_error(delta, quantizer.gptq(delta, torch.eye(IN), widths), gram)
        errors.append(got)
    assert errors == sorted(errors, reverse=True)


def test_columns_of_several_widths_form_groups_of_one_width_each(case):
    U = torch.randn(7, 150, generator=torch.Generator().manual_seed(3))
    widths = torch.tensor([8] * 2 + [2] * 148)
    got = quantizer.gptq(U, torch.eye(150), widths[None])
    assert all(len(row[2:130].unique()) <= 4 for row in got)
    assert (got[:, :2] - U[:, :2]).abs().max() < 0.51 * 2 * U[:, :2].abs().max() / 255


# --- sizes, counted a second time --------------------------------------------------------------


def test_the_bits_of_components_are_those_of_their_arrays():
    shape, widths = (OUT, IN), [8] * 2 + [3] * 32 + [2] * 5
    bits = IN * 1  # which of two groups an input is of
    for b in widths:
        bits += b * (OUT + IN)  # codes of a row of V and a column of U
        bits += 2 * (16 + b)  # 160 inputs: two groups of V
        bits += 16  # s
    bits += OUT * ((16 + 8) + (16 + 3) + (16 + 2))  # U: a group an output and width
    assert components.stored_bits(shape, widths) == bits


def test_the_bits_of_the_others_are_those_of_their_arrays(case):
    delta, gram = case
    weights = delta.numel()
    assert bitdelta.compress(delta, gram, 2 * weights).bits == weights + 16
    assert group_gptq.two_bits(delta, gram, 9 * weights).bits == (
        2 * weights + OUT * 2 * (16 + 2) + IN)
    rank = low_rank.compress(delta, gram, weights).rank
    assert low_rank.compress(delta, gram, weights).bits == 16 * rank * (OUT + IN)
    kept = ultradelta.pruned(delta, gram, 3, weights)
    count = int((kept.dense != 0).sum())
    places = math.log2(math.comb(weights, count))
    assert kept.bits == pytest.approx(3 * count + places + 48, abs=1.5)
    patches = delta_dct.compress(delta, gram, weights)
    shown = delta_dct.patches_of(patches.dense).abs().amax((1, 2)) > 1e-9
    assert patches.bits == int(shown.sum()) * (2 * 256 + 32) + 60 + 16
    dropped = delta_dq.dropped(delta, gram, 3, 64, weights)
    assert dropped.bits == 3 * int((dropped.dense != 0).sum()) + 64 + 48
    sparse = impart.compress(delta, gram, weights)
    assert sparse.bits <= weights and sparse.rank > 0


# --- each method -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", methods.METHODS)
def test_a_method_keeps_to_its_budget_and_its_error_falls_with_bits(case, name):
    errors = []
    for bits in (0.75, 1.5, 3.0):
        result = methods.METHODS[name](*case, int(bits * case[0].numel()))
        assert result.dense.shape == case[0].shape and result.dense.dtype == torch.float32
        assert 0.5 * bits < result.bits / case[0].numel() <= bits
        errors.append(error(result, case))
    assert errors == sorted(errors, reverse=True) and errors[0] < 1.0


@pytest.mark.parametrize("name", methods.FIXED)
def test_a_method_of_one_size_refuses_a_smaller_budget(case, name):
    whole = methods.FIXED[name](*case, 10**9)
    assert methods.FIXED[name](*case, whole.bits).bits == whole.bits
    assert methods.FIXED[name](*case, whole.bits - 1) is None


def test_bitdelta_has_the_least_squares_scale(case):
    dense = bitdelta.compress(*case, 10**9).dense
    levels = dense.unique()
    assert len(levels) == 2 and levels[0] == -levels[1]
    signs = torch.where(case[0] >= 0, 1.0, -1.0)
    assert torch.equal(dense.sign(), signs)
    least = (case[0] * signs).sum() / signs.square().sum()  # argmin over α of ‖ΔW − α sign(ΔW)‖
    assert levels[1].item() == pytest.approx(least.item(), rel=2**-10)


def test_low_rank_is_the_best_of_its_rank(case):
    result = low_rank.compress(*case, case[0].numel())
    U, s, V = torch.linalg.svd(case[0].double(), full_matrices=False)
    best = (U[:, : result.rank] * s[: result.rank]) @ V[: result.rank]
    assert (result.dense - best).norm() < 1e-3 * best.norm()  # fp16 rounds by 2^-11 at most


@pytest.mark.parametrize(("first", "expected"), [
    (delta_come.DELTA_COME, [8] * 2 + [3] * 32 + [2] * 5), (((8, 2),), [8] * 2 + [2] * 37),
    (((8, 32),), [8] * 32 + [2] * 7)])
def test_fixed_widths_are_the_published_ones_and_as_many_as_fit(first, expected):
    budget = components.stored_bits((OUT, IN), expected)
    assert delta_come.fixed_widths((OUT, IN), budget, first) == expected
    assert delta_come.fixed_widths((OUT, IN), budget - 1, first) == expected[:-1]
    assert len(delta_come.fixed_widths((OUT, IN), 10**9, first)) == OUT


def test_adamix_published_uses_few_widths_and_its_correction_does_not_hurt(case):
    for bits in (1.0, 2.0):
        budget = int(bits * case[0].numel())
        plan = adamix_published.plan(*case, budget)
        assert len(set(plan.values()) | {0}) <= 4 and set(plan.values()) <= set(range(2, 9))
        with_it = adamix_published.corrected(*case, budget)
        without = adamix_published.uncorrected(*case, budget)
        assert with_it.bits == without.bits and error(with_it, case) <= error(without, case)


def test_the_error_of_v_is_that_of_equation_5(case):
    delta, gram = case
    errors = adamix_published.v_errors(delta, gram, 10)
    _, s, V = torch.linalg.svd(delta.double(), full_matrices=False)
    whole = s[3] ** 2 * V[3] @ gram.double() @ V[3]
    assert errors[3, -1].item() == pytest.approx(whole.item(), rel=1e-3)  # s is in 16 bits
    V_hat = quantizer.gptq(V[3:4], gram, torch.tensor([[2]])).double()[0]
    lost = s[3] ** 2 * (V[3] - V_hat) @ gram.double() @ (V[3] - V_hat)
    assert errors[3, 6].item() == pytest.approx(lost.item(), rel=1e-3)


def test_impart_drops_more_of_what_matters_less():
    s = 0.95 ** torch.arange(40.0)
    shares = impart.dropped_shares(s, 0.8, 0.5, 1.0)
    gamma = (0.8 - 0.5) / (1 - 0.5)
    torch.testing.assert_close(shares, (1 - s / s[0])[: len(shares)] * gamma)
    whole = 20 - len(shares)  # of the 20 that β leaves, dropped from the end
    assert (shares.sum().item() + whole) / 20 >= gamma - 1e-9
    assert (shares.sum().item() + shares[-1].item() + whole - 1) / 20 < gamma + 1 / 20


def test_impart_keeps_the_mean_of_what_it_drops_at_random():
    lanes = torch.ones(1, 20000, dtype=torch.float64)
    masked = impart._masked(lanes, torch.tensor([0.75]), torch.Generator().manual_seed(0))
    assert masked.unique().tolist() == [0.0, 4.0] and masked.mean().item() == pytest.approx(1.0)


def test_the_cosine_transform_is_orthonormal_and_patches_come_back():
    cosines = delta_dct.dct_matrix(16)
    torch.testing.assert_close(cosines @ cosines.T, torch.eye(16), atol=1e-6, rtol=0)
    flat = cosines @ torch.ones(16, 16) @ cosines.T
    assert flat[0, 0].item() == pytest.approx(16.0) and flat.flatten()[1:].abs().max() < 1e-5
    matrix = torch.randn(33, 50, generator=torch.Generator().manual_seed(4))
    assert torch.equal(delta_dct.joined(delta_dct.patches_of(matrix), (33, 50)), matrix)


def test_ultradelta_keeps_the_same_share_of_each_value(case):
    values = ultradelta.rounded(case[0], 3)
    assert len(values.unique()) <= 8
    sparse, kept = ultradelta.keep_share(values, 0.25)
    assert kept == int((sparse != 0).sum())
    for value in values.unique():
        assert int((sparse == value).sum()) == int(0.25 * int((values == value).sum()))


def test_deltadq_keeps_as_many_entries_of_every_group(case):
    budget = int(0.3 * 4 * case[0].numel()) + delta_dq.BESIDE + 1

    def drawn():
        return (delta_dq.places_in_groups(case[0].shape, 64)
                < delta_dq.kept_of(64, 4, case[0], budget))

    kept = drawn()
    for group, count in zip(kept.split(64, dim=1), (19, 19, 9), strict=True):  # 64, 64 and 32
        assert (group.sum(dim=1) == count).all()
    assert len({tuple(row) for row in kept.tolist()}) == OUT  # at random, row by row
    assert torch.equal(kept, drawn())
    dense = delta_dq.dropped(*case, 2, 64, case[0].numel()).dense
    assert len(dense.unique()) <= 1 + 2**2
    delta, gram = case
    errors = {(bits, group): relative_error(
        delta, delta_dq.dropped(delta, gram, bits, group, budget).dense, gram)
        for bits, group in itertools.product(delta_dq.WIDTHS, delta_dq.GROUPS)}
    assert errors[delta_dq.chosen_codes(delta, gram, budget)] <= 1.0001 * min(errors.values())


# --- the page ----------------------------------------------------------------------------------


def test_the_page_has_the_tables_of_the_rows():
    text = tables.markdown(tables.read())
    assert "python benchmarks/bench_methods.py --table" in QUALITY
    assert f"\n\n{text}\n\n" in QUALITY, "paste what benchmarks/bench_methods.py --table prints"


def test_every_row_keeps_to_its_budget_and_every_method_has_every_matrix():
    rows = tables.read()
    assert all(row.budget is None or row.bits_per_weight <= row.budget for row in rows)
    assert {mean.matrices for mean in tables.means(rows).values()} == {14}
    assert {row.method for row in rows} == {*methods.METHODS, *methods.FIXED}
    assert all(row.commit and row.command and row.date for row in rows)


def test_the_picture_is_on_the_page_and_none_of_its_texts_lies_on_another():
    from test_results import texts_are_apart

    assert f"](results/{plot.PICTURE})" in QUALITY and (plot.ROWS.parent / plot.PICTURE).is_file()
    texts_are_apart(plot.figure_of(tables.read()))


@pytest.mark.parametrize("name", ["this project", "this project, preset paper",
                                  "trellis codes", "codes of four together"])
def test_what_a_budget_does_not_pay_for_is_no_reconstruction(case, name):
    delta, gram = case
    assert methods.METHODS[name](delta, gram, 300) is None
