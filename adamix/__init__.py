"""Compress the difference between a fine-tuned model and its base, and serve it."""

from adamix.artifacts import ModelDelta, PackedDelta
from adamix.compression.error import relative_error
from adamix.config import Config
from adamix.errors import AdamixError
from adamix.pipeline import Summary, compress, compress_matrix
from adamix.version import __version__

__all__ = ["AdamixError", "Config", "ModelDelta", "PackedDelta", "Summary", "__version__", "compress",
           "compress_matrix", "relative_error"]
