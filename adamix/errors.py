"""One named error a fault; every message is one sentence with what was expected and what came."""


class AdamixError(ValueError):
    """The base of all errors that a user's input can cause."""


class CheckpointError(AdamixError):
    """A checkpoint that cannot be read: missing, truncated, or not safetensors."""


class MismatchError(AdamixError):
    """Two checkpoints that are not a base and its fine-tune: architecture, shapes, vocabulary."""


class NonFiniteError(AdamixError):
    """NaN or Inf in weights or activations."""


class BudgetError(AdamixError):
    """A size that cannot be reached: it does not pay for a component, or for the exact tensors."""


class SolverError(AdamixError):
    """A solver of the integer program that is not installed, or that python-mip cannot load."""


class MemoryLimitError(AdamixError):
    """A bound on memory that not even one matrix at a time keeps."""


class DeviceError(AdamixError):
    """A device that is not here, or that nothing here runs on."""


class RankError(AdamixError):
    """Another process of the same compression that failed or ended."""


class CalibrationError(AdamixError):
    """A calibration source that gives no usable tokens."""


class DeltaFileError(AdamixError):
    """A delta folder that is truncated, foreign, or of another format version."""


class FingerprintError(AdamixError):
    """A base that is not the one the delta was made from."""


class BankError(AdamixError):
    """A bank that does not know a fine-tune, cannot hold it, or cannot route it."""


class BankFullError(BankError):
    """A fine-tune that does not fit beside those that must stay on the device."""


class ResumeError(AdamixError):
    """Unfinished work beside the output that is another run's, or in another process's hands."""


class OutputError(AdamixError):
    """An output folder that exists, or cannot be written."""


def reason(error: BaseException, limit: int = 200) -> str:
    """The first line of another library's message, for a sentence of ours."""
    lines = str(error).strip().splitlines()
    first = lines[0] if lines else type(error).__name__
    return first if len(first) <= limit else f"{first[:limit]}…"
