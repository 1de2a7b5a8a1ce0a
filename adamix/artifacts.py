"""What travels between the stages, in the order in which it arises. Notation as in README."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
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


def levels(codes: Tensor, bits: Tensor) -> Tensor:
    """The odd integers 2 q − (2^b − 1) of codes `[lanes, n]`, a lane of `bits` `[lanes]`; fp64."""
    return 2.0 * codes.double() - (2.0 ** bits.double() - 1.0)[:, None]


@dataclass(frozen=True)
class Lanes:
    """Rows of V̂ or columns of Û as codes: lane i is `scales[i] * (2 q − (2^bits[i] − 1))`."""

    codes: Tensor  # [lanes, n] uint8
    bits: Tensor  # [lanes] int32
    scales: Tensor  # [lanes] fp32, > 0

    def levels(self) -> Tensor:
        """The odd integers that the codes stand for, `[lanes, n]` fp64."""
        return levels(self.codes, self.bits)

    def dequantize(self) -> Tensor:
        """`[lanes, n]` fp64."""
        return self.scales.double()[:, None] * self.levels()

    def select(self, lanes: Tensor | slice) -> Lanes:
        """The lanes at the given indices, in that order."""
        return Lanes(self.codes[lanes], self.bits[lanes], self.scales[lanes])


@dataclass(frozen=True)
class QuantizedDelta:
    """Δ̂ = Û_int · diag(scales) · V̂_int, components by widths descending, then by index."""

    U_codes: Tensor  # [rank, out] uint8, one lane a column of Û
    V_codes: Tensor  # [rank, in] uint8
    u_bits: Tensor  # [rank] int32, descending
    v_bits: Tensor  # [rank] int32, descending
    scales: Tensor  # [rank] fp32; the scales of U and V and the singular value in one number

    @property
    def rank(self) -> int:
        return self.scales.shape[0]

    def dequantize(self) -> Tensor:
        """Δ̂ `[out, in]` fp32."""
        U = levels(self.U_codes, self.u_bits) * self.scales.double()[:, None]
        return (U.T @ levels(self.V_codes, self.v_bits)).float()


@dataclass(frozen=True)
class PackedDelta:
    """A QuantizedDelta as it is stored and served; the order of the words is drawn in
    `csrc/layout/packed_layout.h`."""

    words: Tensor  # [words] int32: the rows of V̂, then the columns of Û
    scales: Tensor  # [rank] fp32
    v_counts: tuple[int, ...]  # rows of V̂ at width 8, 7, .., 1
    u_counts: tuple[int, ...]  # columns of Û at width 8, 7, .., 1
    shape: tuple[int, int]  # (out, in)

    def __post_init__(self) -> None:
        out_features, in_features = self.shape
        if sum(self.v_counts) != sum(self.u_counts):
            raise ValueError(f"a delta has as many rows of V as columns of U, got {self.v_counts} "
                             f"and {self.u_counts} at 8..1 bits")
        expected = (ops.v_words(in_features, self.v_counts)
                    + ops.u_words(out_features, self.u_counts))
        if self.words.shape != (expected,) or self.scales.shape != (self.rank,):
            raise ValueError(
                f"a {out_features} x {in_features} delta with {self.v_counts} rows of V and "
                f"{self.u_counts} columns of U at 8..1 bits has {expected} words and {self.rank} "
                f"scales, got {tuple(self.words.shape)} and {tuple(self.scales.shape)}"
            )

    def to(self, device: torch.device | str) -> PackedDelta:
        """The delta on a device."""
        return replace(self, words=self.words.to(device), scales=self.scales.to(device))

    @property
    def rank(self) -> int:
        """How many components are kept."""
        return sum(self.v_counts)

    @property
    def v_widths(self) -> dict[int, int]:
        """{bits: rows of V̂}, widths in use only."""
        return _in_use(self.v_counts)

    @property
    def u_widths(self) -> dict[int, int]:
        """{bits: columns of Û}, widths in use only."""
        return _in_use(self.u_counts)

    @property
    def widths(self) -> dict[tuple[int, int], int]:
        """{(bits of its row of V̂, of its column of Û): components}, widest first."""
        return dict(Counter(zip(_each(self.v_counts), _each(self.u_counts), strict=True)))

    @property
    def nbytes(self) -> int:
        """Bytes on disk: words, scales, and the table row that holds the counts."""
        return 4 * (self.words.numel() + self.scales.numel() + 2 * ops.MAX_BITS)

    @property
    def bits_per_weight(self) -> float:
        """`nbytes` in bits over the number of weights."""
        return 8 * self.nbytes / (self.shape[0] * self.shape[1])

    def factors(self) -> tuple[Tensor, Tensor]:
        """The odd integers that the codes stand for: V̂'s `[rank, in]`, Û's columns `[rank, out]`;
        fp32."""
        out_features, in_features = self.shape
        v_words = ops.v_words(in_features, self.v_counts)
        return (_unpacked(self.words[:v_words], self.v_counts, in_features),
                _unpacked(self.words[v_words:], self.u_counts, out_features))

    def dequantize(self) -> Tensor:
        """Δ̂ `[out, in]` fp32."""
        V, U = self.factors()
        return (U * self.scales[:, None]).T @ V


def _in_use(counts: tuple[int, ...]) -> dict[int, int]:
    return {ops.MAX_BITS - k: n for k, n in enumerate(counts) if n}


def _each(counts: tuple[int, ...]) -> list[int]:
    """The width of every lane."""
    return [bits for bits, count in _in_use(counts).items() for _ in range(count)]


def _unpacked(words: Tensor, counts: tuple[int, ...], n: int) -> Tensor:
    """A factor's levels `[rank, n]` fp32."""
    widths = torch.tensor(_each(counts), dtype=torch.float32, device=words.device)
    return 2.0 * unpack_factor(words, counts, n) - (2.0**widths - 1.0)[:, None]


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
