"""The rules that hold the tree together, checked on the text of the files."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("adamix", "csrc", "cpp_tests", "python_tests", "benchmarks")
CODE = {".py", ".h", ".cpp", ".cu", ".cuh"}
STAGES = ("source", "calibration", "compression", "storage", "serving")
# What a stage may import beside itself.
SHARED = {"artifacts", "config", "errors", "experts", "fake_ops", "naming", "ops", "panels",
          "parallel", "progress"}
MAX_FILE, MAX_FUNCTION, MAX_LINE = 400, 60, 100
LEFT_OPEN = re.compile("TO" "DO|FIX" "ME|XX" "X")

FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*")
               if path.suffix in CODE)
PYTHON = [path for path in FILES if path.suffix == ".py"]
NATIVE = [path for path in FILES if path.suffix != ".py"]


def names(paths):
    return [str(path.relative_to(ROOT)) for path in paths]


@pytest.mark.parametrize("path", FILES, ids=names(FILES))
def test_a_file_is_short_its_lines_too_and_nothing_is_left_open(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= MAX_FILE
    long = [number for number, line in enumerate(lines, 1) if len(line) > MAX_LINE]
    assert not long, f"lines over {MAX_LINE} columns: {long}"
    assert not [number for number, line in enumerate(lines, 1) if LEFT_OPEN.search(line)]


@pytest.mark.parametrize("path", PYTHON, ids=names(PYTHON))
def test_a_python_function_fits_a_screen(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = node.end_lineno - node.lineno + 1
            assert length <= MAX_FUNCTION, f"{node.name} has {length} lines"


def native_functions(text):
    """(first line, lines) of each block from `…(…) … {` at the margin to `}` at the margin."""
    start = None
    for number, line in enumerate(text.splitlines(), 1):
        if start is None and re.match(r"[A-Za-z_].*", line) and "(" in line:
            start = (number, line)
        if start is not None and (line.startswith("}") or re.match(r"\S.*[;}]$", line)):
            if line.startswith("}"):
                yield start[1], number - start[0] + 1
            start = None


def test_native_functions_are_found():
    text = ("int f(int a,\n      int b) {\n  g();\n}\n"
            "int h();\nstruct S {\n  int x;\n};\nint k() {\n}\n")
    assert list(native_functions(text)) == [("int f(int a,", 4), ("int k() {", 2)]


@pytest.mark.parametrize("path", NATIVE, ids=names(NATIVE))
def test_a_native_function_fits_a_screen(path):
    for first, length in native_functions(path.read_text()):
        assert length <= MAX_FUNCTION, f"{first} has {length} lines"


@pytest.mark.parametrize("path", NATIVE, ids=names(NATIVE))
def test_only_the_bindings_know_torch(path):
    if path.is_relative_to(ROOT / "csrc" / "bindings"):
        return
    included = re.findall(r'#\s*include\s*[<"]([^>"]+)', path.read_text())
    assert not [name for name in included
                if re.match(r"(torch|ATen|c10|pybind11|Python\.h)", name)]


def test_the_bindings_include_torch():
    text = "".join(path.read_text() for path in (ROOT / "csrc" / "bindings").iterdir())
    assert "#include <torch/" in text  # or the test above looks for the wrong thing


def imported(path):
    """Modules of adamix that a file imports: the first name below `adamix`, anywhere in it."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *filter(None, [node.module])])
            modules = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name.split(".")[1] for name in modules
                    if name.startswith("adamix.") and name.count("."))


COMPOSERS = {"engines"}  # folders that may import stages, as the files above them may
STAGE_FILES = [path for path in PYTHON if path.parent.parent == ROOT / "adamix"
               and path.parent.name not in COMPOSERS]


@pytest.mark.parametrize("path", STAGE_FILES, ids=names(STAGE_FILES))
def test_a_stage_imports_no_other_stage(path):
    assert path.parent.name in STAGES
    assert set(imported(path)) <= SHARED | {path.parent.name}


def test_imports_are_found():
    assert len(STAGE_FILES) >= 15
    assert {"artifacts", "storage", "source"} <= set(imported(ROOT / "adamix" / "pipeline.py"))


def test_what_stages_share_imports_no_stage():
    for name in sorted(SHARED):
        assert set(imported(ROOT / "adamix" / f"{name}.py")) <= SHARED | {"_C"}, name


def test_the_operators_are_called_from_one_file():
    users = [path for path in (ROOT / "adamix").rglob("*.py")
             if "torch.ops.adamix" in path.read_text()]
    assert names(users) == ["adamix/ops.py"]


def test_cmake_builds_every_source():
    listed = re.findall(r"[\w/]+\.(?:cpp|cu)\b", (ROOT / "CMakeLists.txt").read_text())
    listed = {name if name.startswith(("csrc/", "cpp_tests/")) else f"cpp_tests/{name}"
              for name in listed}
    there = {name for name in names(NATIVE) if name.endswith((".cpp", ".cu"))}
    assert listed == there and len(there) > 10


def test_kernels_are_written_without_inline_assembly_but_in_one_header():
    users = [path for path in NATIVE if re.search(r"\basm( volatile)?\(", path.read_text())]
    assert names(users) == ["csrc/common/cuda_instructions.cuh"]


FUNCTION = re.compile(r"^(?:inline |__device__ |__forceinline__ )+[\w:<>*]+[ *]+(\w+)\(", re.M)


def test_the_emulator_has_every_instruction():
    """But wgmma: on the emulator, as on most devices, mma.sync stands in for it."""
    device = (ROOT / "csrc/common/cuda_instructions.cuh").read_text()
    host = (ROOT / "cpp_tests/emulated_cuda/common/cuda_instructions.cuh").read_text()
    there = set(re.findall(r"^(?:template.*\n)?[\w ]*?\*? ?(\w+)\(", host, re.M))
    wanted = set(FUNCTION.findall(device))
    assert len(wanted) > 15
    assert {name for name in wanted if not name.startswith("wgmma")} <= there


@pytest.mark.parametrize("path", [path for path in FILES if path.suffix == ".cu"],
                         ids=lambda path: path.name)
def test_kernels_are_launched_by_functions_which_the_emulator_knows(path):
    assert "<<<" not in path.read_text()


def test_setup_has_no_second_list_of_sources_and_ships_every_package():
    assert not re.search(r"\.(cpp|cu|cuh)\b", (ROOT / "setup.py").read_text())
    text = (ROOT / "pyproject.toml").read_text()
    listed = set(re.findall(r'"(adamix[\w.]*)"', re.search(r"packages = \[.*?\]", text, re.S)[0]))
    there = {".".join(path.parent.relative_to(ROOT).parts)
             for path in (ROOT / "adamix").rglob("__init__.py")}
    assert listed == there


def test_no_test_file_needs_what_the_repository_lacks():
    outside = re.compile(r"\.\./" + "shared|/wo" + "rk/")
    assert not [path for path in FILES if outside.search(path.read_text())]
