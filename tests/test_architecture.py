"""The rules of the house, read off the sources: who imports whom, sizes, calls that are banned."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "visionpulse"

# What each room may import of ours at module level; a longer name wins over its prefix.
RECORDS = {"cache", "call", "selection", "visual", "workspace"}
ALLOWED = {
    "budgets": set(),
    "workspace": set(),
    "_native": set(),
    "tensor_checks": set(),
    "cache": {"tensor_checks"},
    "visual": {"tensor_checks"},
    "selection": set(),
    "call": {"cache", "selection", "visual", "workspace"},
    "checks": {"cache", "selection", "tensor_checks", "visual"},
    "config": {"budgets"},
    "schedule": {"config"},
    "reference": {"budgets", *RECORDS},
    "backends": {"config", *RECORDS},
    "backends.reference": {"backends", "reference", *RECORDS},
    "backends.packing": {*RECORDS},
    "backends.native": {"backends", "backends.packing", *RECORDS},
    "backends.cpu": {"backends.native", "backends.packing", "_native", *RECORDS},
    "backends.cuda": {"backends.native", "backends.packing", "_native", *RECORDS},
    "backends.triton": {"backends", "_triton", *RECORDS},
    "torch_ops": {"backends", *RECORDS},
    "ops": {
        "backends", "budgets", "checks", "config", "tensor_checks", "torch_ops", *RECORDS
    },
    "layer_ops": {"backends", "config", "ops", *RECORDS},
    "figures": set(),
    "trace": {"figures", *RECORDS},
    "models": {
        "backends", "config", "layer_ops", "ops", "schedule", "trace.record", *RECORDS
    },
    "data": set(),
    "calibration": {"config", "figures", "models", "ops", *RECORDS},
    "bench": {"backends", "config", "figures", "ops", "schedule", "testing", *RECORDS},
    "testing": {"budgets", "config", "reference", *RECORDS},
    "__init__": {"backends", "budgets", "config", "models", "ops", *RECORDS},
    "integrations": {"models"},
    "cli": {
        "__version__", "backends", "bench", "calibration", "config", "data", "models", "ops",
        "selection", "trace",
    },
    "__main__": {"cli"},
}  # fmt: skip
OPTIONAL = {
    "transformers",
    "triton",
    "matplotlib",
    "vllm",
    "tqdm",
    "lmms_eval",
    "accelerate",
    "peft",
}
ENVIRONMENT = {"VISIONPULSE_BACKEND", "VISIONPULSE_CPU_ISA", "VISIONPULSE_CUDA_ARCHS"}
# Names of others that we honour: of Triton in its backend, of CMake in the build.
FOREIGN_ENVIRONMENT = {"TRITON_INTERPRET", "CMAKE_BUILD_PARALLEL_LEVEL"}
LONGEST = 400


def tracked(*patterns):
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).exists()]


def module_of(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def module_level(tree):
    """Statements that run on import, without those for type checkers only."""
    todo = list(tree.body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        yield node
        todo += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]


def imports_of(path):
    """(ours, others): modules of the package, and top-level names from outside."""
    module = module_of(path)
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    if module == "__init__":
        package = []
    ours, others = set(), set()
    for node in module_level(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            others |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            others.add(node.module.split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1]
            if node.module:
                ours.add(".".join([*base, node.module]))
            else:
                ours |= {".".join([*base, alias.name]) for alias in node.names}
    return ours, others


def sources():
    return [path for path in tracked("visionpulse/*.py", "visionpulse/**/*.py")]


def rule_for(module):
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        prefix = ".".join(parts[:length])
        if prefix in ALLOWED:
            return prefix, ALLOWED[prefix]
    pytest.fail(f"{module} has no row in ALLOWED: say who it may import")


@pytest.mark.parametrize("path", sources(), ids=module_of)
def test_imports_go_in_the_allowed_direction(path):
    module = module_of(path)
    room, allowed = rule_for(module)
    for target in imports_of(path)[0]:
        same_room = target == room or target.startswith(f"{room}.")
        known = any(target == a or target.startswith(f"{a}.") for a in allowed)
        assert same_room or known, f"{module} may not import {target}"


@pytest.mark.parametrize("path", sources(), ids=module_of)
def test_optional_packages_are_imported_inside_functions(path):
    found = imports_of(path)[1] & OPTIONAL
    assert not found, f"{module_of(path)} imports {found} when it is imported"


def test_no_file_is_longer_than_a_room():
    kinds = [f"*.{end}" for end in ("py", "h", "cpp", "cu", "cuh", "sh")]
    long = {
        str(path.relative_to(ROOT)): lines
        for path in tracked(*kinds)
        if (lines := len(path.read_text().splitlines())) > LONGEST
    }
    assert not long, f"split these: {long}"


BANNED = (
    # nothing in a decode step reads the device
    (
        r"\.(item|tolist|cpu|numpy)\(",
        ("ops.py", "torch_ops.py", "backends/", "models/attention.py"),
    ),
    (r"\bprint\(", ("",)),
    (r"\bexcept\s*:", ("",)),
)
MAY_PRINT = "cli/"


@pytest.mark.parametrize("pattern, places", BANNED, ids=[p for p, _ in BANNED])
def test_banned_calls(pattern, places):
    for path in sources():
        name = str(path.relative_to(PACKAGE))
        if not name.startswith(places) or ("print" in pattern and name.startswith(MAY_PRINT)):
            continue
        code = re.sub(r"(?s)\"\"\".*?\"\"\"|#[^\n]*", "", path.read_text())
        assert not re.search(pattern, code), f"{pattern} in {name}"


def test_banned_triton_calls():
    for path in tracked("kernels/triton/*.py"):
        assert not re.search(r"make_block_ptr|tl\.advance|triton\.autotune", path.read_text()), path


def test_environment_variables_are_few_and_read_in_one_place():
    read = {}
    for path in tracked(
        "visionpulse/*.py", "visionpulse/**/*.py", "kernels/*", "csrc/*", "setup.py"
    ):
        text = path.read_text()
        if re.search(r"os\.environ|getenv", text):
            for name in re.findall(r"[\"']([A-Z][A-Z0-9]*_[A-Z0-9_]+)[\"']", text):
                read.setdefault(name, []).append(str(path.relative_to(ROOT)))
    ours = {name for name in read if name.startswith("VISIONPULSE")}
    assert ours <= ENVIRONMENT
    assert set(read) - ours <= FOREIGN_ENVIRONMENT, read
    assert all(len(read[name]) == 1 for name in ours), read


def test_the_kernels_folder_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_csrc_and_kernels_include_no_torch():
    for path in tracked("csrc/*", "kernels/cpu/*", "kernels/cuda/*", "kernels/common/*"):
        assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", path.read_text()), path


def test_the_rules_can_fail(tmp_path):
    """A module that breaks them is seen."""
    text = "import triton\nfrom . import ops\ndef f():\n    import transformers\n"
    path = PACKAGE / "visual.py"
    broken = ast.parse(text)
    assert {type(n).__name__ for n in module_level(broken)} == {"Import", "ImportFrom"}
    ours, others = imports_of(path)
    assert ours == {"tensor_checks"} and not others & OPTIONAL
