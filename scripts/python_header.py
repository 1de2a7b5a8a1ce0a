"""Exit with 0 where this Python's C header is installed (Debian: python3-dev)."""

import pathlib
import sys
import sysconfig

sys.exit(not (pathlib.Path(sysconfig.get_path("include")) / "Python.h").exists())
