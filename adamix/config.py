"""One frozen configuration: what is compressed to what, and which steps of the method are on."""

from __future__ import annotations

import dataclasses
import math
import operator
from dataclasses import dataclass
from typing import Literal

MODEL_BITS = 16  # what "ratio" is measured against: a fine-tune is served in 16-bit weights
PRESETS = ("adamix", "paper")
SHORT_TEXT = 8  # tokens of a text: shorter ones in the mean say little of a model
# Fields that are younger than some files, left out where they are this.
YOUNGER = {"vision": True, "sample_from": "auto", "gain": 1.0}


@dataclass(frozen=True)
class Config:
    """Every choice of the method; validated once, saved in `delta_config.json`.

    Exactly one of `ratio` and `bits_per_weight` sets the size; with neither, `ratio` is 16.

    Args:
        ratio: 16-bit bytes of the tensors that differ, divided by the bytes of the delta file.
        bits_per_weight: the same as bits for each weight of a compressed matrix, scales counted.
        bit_widths: widths that a component may get besides 0, each in 1..8 (paper section 3.2, Q).
        separate_widths: the row of V and the column of U of a component have a width each, and a
            bit goes where it lowers the error most: the shorter of the two is cheaper. `objective`
            "v" says nothing of U: there both have the same.
        max_widths: at most this many widths in use in one matrix, 0 bits counted (the paper's
            f_max); None for no limit. With separate widths, pairs of them.
        decomposition: "output-aware" takes the SVD of ΔW L with H = L Lᵀ, "plain" that of ΔW.
        objective: "v+u" predicts the error of both factors, "v" that of V alone (paper eq. 5).
        correction: Target Correction for Consistency (paper eq. 8) before U is quantized.
        unbiased: a component's scale makes up for what rounding takes off its size. Rounding with
            the least squared error shrinks by as much as it loses, at 2 bits an eighth in each
            factor: every layer would do less of what the fine-tune does, and that adds up.
        gain: power of the factors by which `unbiased` raises scales, in [0, 2]. Above 1 they make
            up for more, for the noise of rounding in what norms divide by, say: the model comes
            nearer to the fine-tune, and each matrix has more error.
        passes: how often U is quantized; from the second pass on V is solved for again before.
        damping: λ in H = X Xᵀ + λ I, as a share of the mean diagonal of X Xᵀ.
        svd_damping: what the output-aware SVD adds to that λ: its components then hold for inputs
            that the calibration lacks too, at no more error on those that it has.
        solver: the integer program's solver, "highs" or "cbc". Programs of separate widths are
            solved by dynamic programming, all but never by it.
        allocate: "matrix" gives every matrix the same bits a weight (as the paper does), "model"
            spends one budget where it lowers the summed output error most.
        embeddings: compress the embedding and `lm_head`; False stores them whole.
        vision: compress what is outside of the language model too: a vision tower and what projects
            its output; False stores it whole. Text calibrates, so nothing is known of its inputs.
        calibration_sequences: how many sequences calibrate.
        calibration_length: tokens a sequence.
        sample_from: who writes the calibration text where none is given: "finetuned", "base",
            "both", half of the sequences each, or "auto": the fine-tune, and both where its texts
            have fewer than 8 tokens in the mean. One whose training left the prompts out of the
            loss may write little else than ends of text; its base still writes.
        seed: of self-calibration's sampling and of the choice of calibration text.

    Raises:
        ValueError: a value outside its range; the sentence names it.
    """

    ratio: float | None = None
    bits_per_weight: float | None = None
    bit_widths: tuple[int, ...] = (8, 7, 6, 5, 4, 3, 2)
    separate_widths: bool = True
    max_widths: int | None = None
    decomposition: Literal["output-aware", "plain"] = "output-aware"
    objective: Literal["v+u", "v"] = "v+u"
    correction: bool = True
    unbiased: bool = True
    gain: float = 1.0
    passes: int = 4
    damping: float = 0.1
    svd_damping: float = 0.5
    solver: Literal["highs", "cbc"] = "highs"
    allocate: Literal["matrix", "model"] = "matrix"
    embeddings: bool = True
    vision: bool = True
    calibration_sequences: int = 128
    calibration_length: int = 256
    sample_from: Literal["auto", "finetuned", "both", "base"] = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.ratio is not None and self.bits_per_weight is not None:
            raise ValueError("ratio and bits_per_weight say the same thing: give only one of them")
        if self.ratio is None and self.bits_per_weight is None:
            object.__setattr__(self, "ratio", 16.0)
        try:
            widths = sorted({operator.index(b) for b in self.bit_widths}, reverse=True)
            for name in ("passes", "calibration_sequences", "calibration_length", "seed"):
                object.__setattr__(self, name, operator.index(getattr(self, name)))
            if self.max_widths is not None:
                object.__setattr__(self, "max_widths", operator.index(self.max_widths))
        except TypeError:
            raise ValueError(
                "bit_widths must be whole numbers in 1..8, and max_widths, passes, "
                f"calibration_sequences, calibration_length and seed whole numbers, got {self}"
            ) from None
        object.__setattr__(self, "bit_widths", tuple(widths))
        for name, value in (("ratio", self.ratio), ("bits_per_weight", self.bits_per_weight)):
            if value is not None and not (math.isfinite(value) and 0 < value <= 1024):
                raise ValueError(f"{name} must be a number in (0, 1024], got {value}")
        _require("bit_widths", bool(self.bit_widths) and all(1 <= b <= 8 for b in self.bit_widths),
                 "one or more widths in 1..8", self)
        _require("max_widths", self.max_widths is None or self.max_widths >= 2, "None or >= 2",
                 self)
        _require("decomposition", self.decomposition in ("output-aware", "plain"),
                 "'output-aware' or 'plain'", self)
        _require("objective", self.objective in ("v+u", "v"), "'v+u' or 'v'", self)
        _require("passes", self.passes >= 1, ">= 1", self)
        _require("damping", 0 < self.damping < 1, "in (0, 1)", self)
        _require("svd_damping", 0 <= self.svd_damping < 1, "in [0, 1)", self)
        _require("gain", 0 <= self.gain <= 2, "in [0, 2]", self)
        _require("solver", self.solver in ("highs", "cbc"), "'highs' or 'cbc'", self)
        _require("allocate", self.allocate in ("matrix", "model"), "'matrix' or 'model'", self)
        _require("calibration_sequences", self.calibration_sequences >= 1, ">= 1", self)
        _require("sample_from", self.sample_from in ("auto", "finetuned", "both", "base"),
                 "'auto', 'finetuned', 'both' or 'base'", self)
        _require("seed", 0 <= self.seed < 2**63, "in 0..2**63 - 1", self)
        _require("calibration_length", self.calibration_length >= 2, ">= 2", self)

    @classmethod
    def preset(cls, name: str, **changes: object) -> Config:
        """A named configuration: "adamix" (all defaults) or "paper" (the published method's
        choices, with this project's quantizer); `changes` are fields that differ from it."""
        if name not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
        config = cls()
        if name == "paper":
            config = cls(decomposition="plain", objective="v", separate_widths=False, max_widths=4,
                         passes=1, svd_damping=0.0, damping=0.01, unbiased=False)
        if changes.get("bits_per_weight") is not None:
            changes.setdefault("ratio", None)
        return dataclasses.replace(config, **changes)  # type: ignore[arg-type]

    @property
    def bits(self) -> float:
        """The budget in bits for each weight of a compressed matrix."""
        if self.bits_per_weight is not None:
            return self.bits_per_weight
        assert self.ratio is not None
        return MODEL_BITS / self.ratio

    def budget_bits(self, shape: tuple[int, int]) -> int:
        """The budget of one matrix `[out, in]` in bits."""
        return int(self.bits * shape[0] * shape[1])

    def to_dict(self) -> dict[str, object]:
        """The fields as JSON values; without those that are younger than some files, and as there.
        """
        fields = dataclasses.asdict(self) | {"bit_widths": list(self.bit_widths)}
        return {name: value for name, value in fields.items()
                if name not in YOUNGER or YOUNGER[name] != value}


def _require(name: str, holds: bool, expected: str, config: Config) -> None:
    if not holds:
        raise ValueError(f"{name} must be {expected}, got {getattr(config, name)!r}")
