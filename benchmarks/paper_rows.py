"""The rows of bench_paper.py, beside those of rows.py; without torch."""

from __future__ import annotations

from dataclasses import dataclass

WIDTHS = (8, 7, 6, 5, 4, 3, 2)  # that a component may have


@dataclass(frozen=True)
class ErrorRow:
    """Output errors of one type of linear layer in one group of layers: means over its matrices."""

    model: str
    family: str
    method: str
    ratio: float
    train_seed: int
    seed: int
    group: str  # "low", "mid" or "high"
    kind: str  # q_proj ..
    matrices: int | None = None
    error_all: float | None = None  # relative: Σ of squares lost over Σ of squares
    error_out: float | None = None  # the same over the outputs that are largest in the fine-tune
    square_all: float | None = None  # mean square lost an output (paper eq. 1)
    square_out: float | None = None
    tokens: int | None = None
    device: str = ""
    commit: str = ""
    command: str = ""
    date: str = ""

    @property
    def key(self) -> tuple[object, ...]:
        return (self.model, self.family, self.method, self.ratio, self.train_seed, self.seed,
                self.group, self.kind)


@dataclass(frozen=True)
class StageRow:
    """Seconds that compressing a matrix of one type takes, one after the other: means."""

    model: str
    family: str
    method: str
    ratio: float
    kind: str  # q_proj ..
    shape: str  # out x in
    matrices: int | None = None
    decomposition: float | None = None
    simulation: float | None = None
    optimization: float | None = None  # the integer program
    quantization: float | None = None  # with the correction
    other: float | None = None
    whole: float | None = None  # measured round all of it
    threads: int | None = None
    device: str = ""
    commit: str = ""
    command: str = ""
    date: str = ""

    @property
    def key(self) -> tuple[object, ...]:
        return self.model, self.family, self.method, self.ratio, self.kind, self.device


@dataclass(frozen=True)
class ComponentRow:
    """A component of the plain SVD of a matrix: its singular value, and ΔV_i H ΔV_iᵀ at each width
    (the "quantization" term of paper eq. 5), for inputs of mean square one."""

    model: str
    family: str
    matrix: str
    rank: int  # from 1
    singular_value: float | None = None
    bits_8: float | None = None
    bits_7: float | None = None
    bits_6: float | None = None
    bits_5: float | None = None
    bits_4: float | None = None
    bits_3: float | None = None
    bits_2: float | None = None
    commit: str = ""
    command: str = ""
    date: str = ""

    @property
    def key(self) -> tuple[object, ...]:
        return self.model, self.family, self.matrix, self.rank


@dataclass(frozen=True)
class PlanRow:
    """How many rows of V and columns of U of a compressed matrix are at each width."""

    model: str
    family: str
    method: str
    ratio: float
    matrix: str
    out_features: int
    in_features: int
    v_bits_8: int = 0
    v_bits_7: int = 0
    v_bits_6: int = 0
    v_bits_5: int = 0
    v_bits_4: int = 0
    v_bits_3: int = 0
    v_bits_2: int = 0
    v_bits_1: int = 0
    u_bits_8: int = 0
    u_bits_7: int = 0
    u_bits_6: int = 0
    u_bits_5: int = 0
    u_bits_4: int = 0
    u_bits_3: int = 0
    u_bits_2: int = 0
    u_bits_1: int = 0
    commit: str = ""
    command: str = ""
    date: str = ""

    @property
    def key(self) -> tuple[object, ...]:
        return self.model, self.family, self.method, self.ratio, self.matrix
