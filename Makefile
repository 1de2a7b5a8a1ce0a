# make demo   compress the shipped fine-tune to 1/16, see what it cost, draw the pictures
# make test   all C++ and Python tests
# Both make .venv, install, and build the extension first; nothing outside this folder is touched
# but for missing system packages, which are installed where that can be done (root and apt).

PYTHON ?= python3
VENV := $(CURDIR)/.venv
BUILD := $(CURDIR)/build/cpp_tests
# Compute capabilities to build CUDA kernels for, where nvcc is found; empty: all supported.
CUDA_ARCHITECTURES ?=
CMAKE_ARGS ?= $(if $(CUDA_ARCHITECTURES),-DADAMIX_CUDA_ARCHITECTURES=$(CUDA_ARCHITECTURES))
export CMAKE_ARGS
export PATH := $(VENV)/bin:$(PATH)

SOURCES := CMakeLists.txt setup.py pyproject.toml constraints.txt $(shell find csrc -type f)

.PHONY: demo test test-cpp test-python lint install clean system system-test

demo: install
	@python benchmarks/demo.py

test: test-cpp test-python

test-cpp: install system-test
	cmake -S . -B $(BUILD) -G Ninja -DADAMIX_BUILD_PYTHON=OFF -DADAMIX_BUILD_TESTS=ON $(CMAKE_ARGS)
	cmake --build $(BUILD)
	ctest --test-dir $(BUILD) --output-on-failure

test-python: install
	python -m pytest -q

lint: install
	ruff check .
	clang-format --dry-run -Werror $$(find csrc cpp_tests -type f)

install: $(VENV)/.installed

$(VENV)/.installed: $(SOURCES)
	@$(MAKE) --no-print-directory system
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	pip install -q --disable-pip-version-check -c constraints.txt setuptools cmake ninja pybind11 torch
	pip install -q --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

system:
	@sh scripts/need.sh g++ 'c++ --version'
	@sh scripts/need.sh python3-venv '$(PYTHON) -c "import venv, ensurepip"'
	@sh scripts/need.sh python3-dev '$(PYTHON) scripts/python_header.py'

system-test:
	@sh scripts/need.sh libgtest-dev 'c++ -std=c++17 -E -include gtest/gtest.h -x c++ /dev/null'

clean:
	rm -rf build demo
