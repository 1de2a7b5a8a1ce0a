"""Builds the native parts with CMake and ships them in the package.

Sources and flags: CMakeLists.txt. Metadata: pyproject.toml. More options for CMake go into the
customary variable: CMAKE_ARGS="-DADAMIX_CUDA=OFF" pip install .
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def cmake(*arguments: object) -> None:
    subprocess.run(["cmake", *map(str, arguments)], check=True)


class CMakeBuild(build_ext):
    """One CMake build; its install step puts both libraries beside the Python modules."""

    def build_extension(self, ext: Extension) -> None:
        options = shlex.split(os.environ.get("CMAKE_ARGS", ""))
        python = f"-DPython_EXECUTABLE={sys.executable}"
        cmake("-S", ROOT, "-B", self.build_temp, "-G", "Ninja", python, *options)
        jobs = ("--parallel", self.parallel) if self.parallel else ()
        cmake("--build", self.build_temp, *jobs)
        self.install_into(Path(self.get_ext_fullpath(ext.name)).parent)

    def copy_extensions_to_source(self) -> None:
        self.install_into(ROOT / "adamix")  # an editable install; the base class knows of _C alone

    def install_into(self, package: Path) -> None:
        cmake("--install", self.build_temp, "--prefix", package.resolve())


setup(ext_modules=[Extension("adamix._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
