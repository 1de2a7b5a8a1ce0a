"""Compress the difference between a fine-tuned model and its base, and serve it.

Names are imported when they are first used: torch and transformers take seconds to load, and
`adamix --help` needs neither.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from adamix.config import Config
from adamix.errors import AdamixError
from adamix.version import __version__

if TYPE_CHECKING:
    from adamix.api import attach
    from adamix.artifacts import ModelDelta, PackedDelta
    from adamix.compression.error import relative_error
    from adamix.estimation import Estimate, estimate
    from adamix.evaluation import Evaluation, evaluate
    from adamix.inspection import Inspection, inspect
    from adamix.merging import MergeSummary, load, merge
    from adamix.pipeline import Summary, compress, compress_matrix
    from adamix.serving.bank import BankMetrics, DeltaBank
    from adamix.serving.continuous import ContinuousBatching, continuous_batching
    from adamix.tuning import TuneSummary, tune

_HOME = {
    "BankMetrics": "serving.bank",
    "ContinuousBatching": "serving.continuous",
    "DeltaBank": "serving.bank",
    "Estimate": "estimation",
    "Evaluation": "evaluation",
    "Inspection": "inspection",
    "MergeSummary": "merging",
    "ModelDelta": "artifacts",
    "PackedDelta": "artifacts",
    "Summary": "pipeline",
    "TuneSummary": "tuning",
    "attach": "api",
    "compress": "pipeline",
    "compress_matrix": "pipeline",
    "continuous_batching": "serving.continuous",
    "estimate": "estimation",
    "evaluate": "evaluation",
    "inspect": "inspection",
    "load": "merging",
    "merge": "merging",
    "relative_error": "compression.error",
    "tune": "tuning",
}

__all__ = [
    "AdamixError",
    "BankMetrics",
    "Config",
    "ContinuousBatching",
    "DeltaBank",
    "Estimate",
    "Evaluation",
    "Inspection",
    "MergeSummary",
    "ModelDelta",
    "PackedDelta",
    "Summary",
    "TuneSummary",
    "__version__",
    "attach",
    "compress",
    "compress_matrix",
    "continuous_batching",
    "estimate",
    "evaluate",
    "inspect",
    "load",
    "merge",
    "relative_error",
    "tune",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'adamix' has no attribute {name!r}")
    value = getattr(import_module(f"adamix.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
