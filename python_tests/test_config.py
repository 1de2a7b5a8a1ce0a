"""Config: presets, the budget, and one sentence for each wrong value."""

import dataclasses
import json

import pytest

from adamix.config import Config

WRONG = [
    ("ratio", 0.0), ("ratio", -1.0), ("ratio", float("nan")), ("ratio", float("inf")),
    ("ratio", 1025.0), ("bits_per_weight", 0.0), ("bits_per_weight", -0.5),
    ("bits_per_weight", float("nan")), ("bits_per_weight", float("inf")),
    ("bit_widths", ()), ("bit_widths", (0,)), ("bit_widths", (9, 2)), ("bit_widths", (4, -1)),
    ("max_widths", 1), ("max_widths", 0), ("decomposition", "svd"), ("objective", "u"),
    ("passes", 0), ("passes", -1), ("svd_damping", -0.1), ("svd_damping", 1.0),
    ("damping", 0.0), ("damping", 1.0), ("damping", float("nan")),
    ("gain", -0.1), ("gain", 2.1), ("gain", float("nan")),
    ("solver", "scip"), ("calibration_sequences", 0), ("calibration_length", 1),
]


@pytest.mark.parametrize(("field", "value"), WRONG, ids=lambda x: str(x))
def test_a_wrong_value_is_refused_in_one_line_that_names_field_and_value(field, value):
    with pytest.raises(ValueError) as refusal:
        Config(**{field: value})
    sentence = str(refusal.value)
    assert sentence.startswith(f"{field} must be ")
    assert str(value) in sentence
    assert "\n" not in sentence


RIGHT = [
    ("ratio", 1024.0), ("ratio", 1e-3), ("bits_per_weight", 16.0), ("bit_widths", (1,)),
    ("bit_widths", (8,)), ("max_widths", 2), ("max_widths", None), ("passes", 1),
    ("damping", 1e-9), ("damping", 0.999), ("gain", 0.0), ("gain", 2.0),
    ("calibration_sequences", 1), ("calibration_length", 2),
]


@pytest.mark.parametrize(("field", "value"), RIGHT, ids=lambda x: str(x))
def test_a_value_at_the_edge_of_its_range_is_taken(field, value):
    assert getattr(Config(**{field: value}), field) == value


def test_ratio_and_bits_per_weight_together_are_refused():
    with pytest.raises(ValueError, match="ratio and bits_per_weight .* only one"):
        Config(ratio=16.0, bits_per_weight=1.0)


def test_with_neither_the_ratio_is_16():
    assert Config().ratio == 16.0
    assert Config().bits == 1.0


def test_a_ratio_is_measured_against_16_bit_weights():
    assert Config(ratio=16.0).bits == 1.0
    assert Config(ratio=5.0).bits == 3.2
    assert Config(bits_per_weight=0.75).bits == 0.75


def test_budget_bits_is_weights_times_bits_rounded_down():
    assert Config(bits_per_weight=1.0).budget_bits((33, 31)) == 1023
    assert Config(bits_per_weight=0.5).budget_bits((33, 31)) == 511
    assert Config(ratio=32.0).budget_bits((3584, 18944)) == 3584 * 18944 // 2


def test_bit_widths_are_kept_once_each_widest_first():
    assert Config(bit_widths=(2, 8, 2, 3)).bit_widths == (8, 3, 2)


def test_the_default_is_the_adamix_preset():
    assert Config.preset("adamix") == Config()
    config = Config()
    assert config.bit_widths == (8, 7, 6, 5, 4, 3, 2)
    assert (config.decomposition, config.objective) == ("output-aware", "v+u")
    assert config.max_widths is None and config.separate_widths
    assert (config.correction, config.passes) == (True, 4)
    assert (config.damping, config.svd_damping) == (0.1, 0.5)
    assert (config.unbiased, config.gain) == (True, 1.0)


def test_the_paper_preset_makes_the_papers_choices():
    config = Config.preset("paper")
    assert config.bit_widths == (8, 7, 6, 5, 4, 3, 2)
    assert (config.decomposition, config.objective, config.max_widths) == ("plain", "v", 4)
    assert (config.correction, config.passes, config.svd_damping) == (True, 1, 0.0)
    assert (config.damping, config.unbiased, config.separate_widths) == (0.01, False, False)


@pytest.mark.parametrize("name", ["adamix", "paper"])
def test_a_preset_takes_changes_and_either_size(name):
    config = Config.preset(name, bits_per_weight=0.5, seed=7)
    assert (config.ratio, config.bits, config.seed) == (None, 0.5, 7)
    assert Config.preset(name, ratio=8.0).bits == 2.0
    changes = {"ratio": None, "bits_per_weight": 0.5, "seed": 7}
    assert config == dataclasses.replace(Config.preset(name), **changes)


def test_an_unknown_preset_is_refused_with_the_names_that_exist():
    with pytest.raises(ValueError, match="adamix, paper, got 'delta-come'"):
        Config.preset("delta-come")


@pytest.mark.parametrize("config", [Config(), Config.preset("paper", bits_per_weight=0.5)])
def test_a_config_survives_json(config):
    assert Config(**json.loads(json.dumps(config.to_dict()))) == config


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().passes = 3
