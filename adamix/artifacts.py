"""What travels between the stages, in the order in which it arises. Notation as in README."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from adamix import ops
from adamix.naming import read_indices
from adamix.panels import unpack_factor

SMALL = 32  # a matrix with a side below this is kept whole: its scales would outweigh its codes


@dataclass(frozen=True)
class WeightPair:
    """One tensor of the base and of the fine-tune, as stored in the checkpoints."""

    name: str
    base: Tensor
    finetuned: Tensor

    def to(self, device: torch.device | str) -> WeightPair:
        """The pair on a device."""
        return WeightPair(self.name, self.base.to(device), self.finetuned.to(device))

    @property
    def delta(self) -> Tensor:
        """ΔW = W_ft − W_base, in fp32 (exact enough: both operands are 16-bit or fp32)."""
        return self.finetuned.float() - self.base.float()


@dataclass(frozen=True)
class Hessian:
    """H = X Xᵀ + λ I of one linear layer's inputs, with the two factors that the method needs."""

    matrix: Tensor  # [in, in] fp64
    order: Tensor  # [in] int64: the inputs by falling diagonal of H, as GPTQ takes them
    inverse_upper: Tensor  # [in, in] fp32, H[order, order]⁻¹ = inverse_upperᵀ · inverse_upper
    ridge: float = 0.0  # λ

    @cached_property
    def lower(self) -> Tensor:
        """`[in, in]` fp64, H = lower · lowerᵀ; made when asked for, as for tall matrices."""
        return torch.linalg.cholesky(self.matrix)


@dataclass(frozen=True)
class Factors:
    """ΔW ≈ U · diag(s) · V; component i is (column i of U, s[i], row i of V)."""

    U: Tensor  # [out, rank] fp64
    s: Tensor  # [rank] fp64
    V: Tensor  # [rank, in] fp64, unit rows

    def __post_init__(self) -> None:
        ranks = (self.U.shape[1], self.s.shape[0], self.V.shape[0])
        if len(set(ranks)) != 1:
            raise ValueError(f"U, s and V must agree in rank, got {ranks}")


@dataclass(frozen=True)
class Lanes:
    """Rows of V̂ or columns of Û as codes: lane i is `scales[i] * (2 q − (2^bits[i] − 1))`."""

    codes: Tensor  # [lanes, n] uint8
    bits: Tensor  # [lanes] int32
    scales: Tensor  # [lanes] fp32, > 0

    def levels(self) -> Tensor:
        """The odd integers that the codes stand for, `[lanes, n]` fp64."""
        return 2.0 * self.codes.double() - (2.0 ** self.bits.double() - 1.0)[:, None]

    def dequantize(self) -> Tensor:
        """`[lanes, n]` fp64."""
        return self.scales.double()[:, None] * self.levels()

    def select(self, lanes: Tensor | slice) -> Lanes:
        """The lanes at the given indices, in that order."""
        return Lanes(self.codes[lanes], self.bits[lanes], self.scales[lanes])


@dataclass(frozen=True)
class QuantizedDelta:
    """Δ̂ = Û_int · diag(scales) · V̂_int, components by width descending, then by index."""

    U_codes: Tensor  # [rank, out] uint8, one lane a column of Û
    V_codes: Tensor  # [rank, in] uint8
    bits: Tensor  # [rank] int32, descending
    scales: Tensor  # [rank] fp32; the scales of U and V and the singular value in one number

    @property
    def rank(self) -> int:
        return self.bits.shape[0]

    def dequantize(self) -> Tensor:
        """Δ̂ `[out, in]` fp32."""
        odd = (2.0 ** self.bits.double() - 1.0)[:, None]
        U = (2.0 * self.U_codes.double() - odd) * self.scales.double()[:, None]
        return (U.T @ (2.0 * self.V_codes.double() - odd)).float()


@dataclass(frozen=True)
class PackedDelta:
    """A QuantizedDelta as it is stored and served; the order of the words is drawn in
    `csrc/layout/packed_layout.h`."""

    words: Tensor  # [words] int32: the rows of V̂, then the columns of Û
    scales: Tensor  # [rank] fp32
    counts: tuple[int, ...]  # components at width 8, 7, .., 1
    shape: tuple[int, int]  # (out, in)

    def __post_init__(self) -> None:
        out_features, in_features = self.shape
        expected = ops.v_words(in_features, self.counts) + ops.u_words(out_features, self.counts)
        if self.words.shape != (expected,) or self.scales.shape != (sum(self.counts),):
            raise ValueError(
                f"a {out_features} x {in_features} delta with {self.counts} components at 8..1 "
                f"bits has {expected} words and {sum(self.counts)} scales, got "
                f"{tuple(self.words.shape)} and {tuple(self.scales.shape)}"
            )

    def to(self, device: torch.device | str) -> PackedDelta:
        """The delta on a device."""
        return PackedDelta(self.words.to(device), self.scales.to(device), self.counts, self.shape)

    @property
    def rank(self) -> int:
        """How many components are kept."""
        return sum(self.counts)

    @property
    def widths(self) -> dict[int, int]:
        """{bits: components}, widths in use only."""
        return {ops.MAX_BITS - k: n for k, n in enumerate(self.counts) if n}

    @property
    def nbytes(self) -> int:
        """Bytes on disk: words, scales, and the table row that holds the counts."""
        return 4 * (self.words.numel() + self.scales.numel() + len(self.counts))

    @property
    def bits_per_weight(self) -> float:
        """`nbytes` in bits over the number of weights."""
        return 8 * self.nbytes / (self.shape[0] * self.shape[1])

    def dequantize(self) -> Tensor:
        """Δ̂ `[out, in]` fp32."""
        out_features, in_features = self.shape
        v_words = ops.v_words(in_features, self.counts)
        V_codes = unpack_factor(self.words[:v_words], self.counts, in_features)
        U_codes = unpack_factor(self.words[v_words:], self.counts, out_features)
        widths = [bits for bits, count in self.widths.items() for _ in range(count)]
        odd = 2.0 ** torch.tensor(widths, device=self.words.device)[:, None] - 1.0
        U, V = 2.0 * U_codes - odd, 2.0 * V_codes - odd
        return (U * self.scales[:, None]).T @ V


@dataclass(frozen=True)
class Manifest:
    """`delta_config.json`: what a delta is, apart from its numbers."""

    base: str  # name or path as given
    finetuned: str
    dtype: str  # of the fine-tune's weights, e.g. "bfloat16"
    fingerprint: dict[str, str]  # of the base: {"sha256": every byte, "sampled": 64 KiB a tensor}
    config: dict[str, object]
    calibration: dict[str, object]
    compressed: dict[str, tuple[int, int, str]]  # kind -> out, in, layer numbers
    whole: dict[str, str]  # kind -> layer numbers
    extra_rows: list[str]  # tensors whose rows beyond the base's are stored whole
    tied: list[str]  # tensors that are another tensor of the same model
    equal: dict[str, str]  # kind -> layer numbers: as in the base, nothing stored
    absent: list[str]  # tensors that the base has and the fine-tune lacks
    # Kinds of `compressed` that a checkpoint holds as [in, out], transposed.
    transposed: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, object]:
        """The fields as JSON values; without `transposed` where nothing is."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__
                if name != "transposed" or self.transposed}

    @property
    def transposed_names(self) -> set[str]:
        """The matrices of the kinds in `transposed`."""
        return {name for kind in self.transposed
                for name in read_indices(kind, self.compressed[kind][2])}

    @classmethod
    def from_dict(cls, body: dict[str, object]) -> Manifest:
        """The inverse of `to_dict`; unknown keys are left alone. Raises KeyError, TypeError."""
        fields = {name: body[name] for name in cls.__dataclass_fields__ if name != "transposed"}
        fields["transposed"] = list(body.get("transposed", []))
        if not all(1 <= int(n) < 2**31 for shape in fields["compressed"].values()
                   for n in shape[:2]):
            raise ValueError("a matrix has a side outside 1..2^31 - 1")
        fields["compressed"] = {kind: (int(out), int(inn), str(indices))
                                for kind, (out, inn, indices) in fields["compressed"].items()}
        if not set(fields["transposed"]) <= set(fields["compressed"]):
            raise ValueError("a kind in transposed is not in compressed")
        for name in ("fingerprint", "config", "calibration", "compressed", "whole", "equal"):
            fields[name] = dict(fields[name].items())
        return cls(**fields)


@dataclass(frozen=True)
class ModelDelta:
    """A fine-tune's difference from its base, compressed, by tensor name."""

    matrices: dict[str, PackedDelta]
    whole: dict[str, Tensor]  # the fine-tune's own values
    extra_rows: dict[str, Tensor]  # what follows the base's last row
    manifest: Manifest

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors, without the file's header."""
        others = (*self.whole.values(), *self.extra_rows.values())
        return sum(m.nbytes for m in self.matrices.values()) + sum(t.nbytes for t in others)
