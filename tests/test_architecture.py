"""The rules of the house, read off the sources: who imports whom, sizes, words, banned calls."""

import ast
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "architecture"))
from imports import PACKAGE, ROOT, circles, imports_of, module_of

# What each module may import of ours, in its functions too; a longer name wins over its prefix.
RECORDS = {"cache", "selection", "visual"}
ALLOWED = {
    "_native": set(),
    "budgets": set(),
    "data": set(),
    "figures": {"files"},
    "files": set(),
    "selection": set(),
    "tensor_checks": set(),
    "workspace": set(),
    "float8": set(),
    "cache": {"float8", "tensor_checks"},
    "cpu": {"_native"},
    "visual": {"tensor_checks"},
    "call": {"workspace", *RECORDS},
    "checks": {"float8", "tensor_checks", *RECORDS},
    "usual": {"cache", "float8", "selection", "tensor_checks", "visual"},
    "config": {"budgets", "files"},
    "schedule": {"config"},
    "queries": {"call", "cache", "visual"},
    "reference": {"budgets", "call", "float8", *RECORDS},
    "backends": {"call", "config", "float8", "selection"},
    "backends.reference": {"backends", "call", "reference", "selection"},
    "backends.by_query": {"backends", "call", "queries", "selection"},
    "backends.native": {"cache"},
    "backends.packing": {"call", "float8", *RECORDS},
    "backends.cpu": {
        "_native", "backends", "backends.native", "cache", "call", "selection", "workspace"
    },
    "backends.cuda": {
        "_native", "backends", "backends.by_query", "backends.native", "backends.packing", "cache",
        "call", "queries", "selection", "visual", "workspace",
    },
    "backends.triton": {"backends", "cache", "call", "selection"},
    "torch_ops": {"backends", "call", "queries", "workspace", *RECORDS},
    "ops": {
        "backends", "budgets", "call", "checks", "config", "queries", "tensor_checks", "torch_ops",
        "usual", "workspace", *RECORDS,
    },
    "layer_ops": {"backends", "call", "config", "ops", "queries", "workspace", *RECORDS},
    "trace": {"figures", "files", "selection", "visual"},
    "models": {
        "backends", "bench.cost", "bench.memory", "config", "files", "float8", "layer_ops", "ops",
        "schedule", "trace.record", "workspace", *RECORDS,
    },
    "calibration": {
        "cache", "config", "figures", "files", "models", "ops", "trace.record", "visual"
    },
    "testing": {"budgets", "call", "config", "float8", "reference", *RECORDS},
    "bench": {
        "_native", "backends", "call", "config", "figures", "files", "float8", "layer_ops", "ops",
        "schedule", "testing", "workspace", *RECORDS,
    },
    "integrations": {"__init__", "models"},
    "serving": {
        "backends", "backends.cpu", "budgets", "call", "config", "cpu", "float8", "layer_ops",
        "models.tensor_parallel", "schedule", "workspace", *RECORDS,
    },
    "__init__": {
        "backends", "budgets", "calibration", "config", "cpu", "models", "ops", "workspace",
        *RECORDS,
    },
    "cli": {
        "__init__", "backends", "bench", "calibration", "config", "data", "files", "layer_ops",
        "models", "ops", "selection", "serving.vllm", "trace", "workspace",
    },
    "__main__": {"cli"},
}  # fmt: skip
OPTIONAL = {
    "transformers", "triton", "matplotlib", "vllm", "sglang", "prometheus_client", "lmms_eval",
    "accelerate", "peft",
}  # fmt: skip
# Modules that only an engine imports have the engine; the package above them does not.
INSIDE = {"serving.vllm": {"vllm", "prometheus_client"}}
ENVIRONMENT = {
    "VISIONPULSE_BACKEND", "VISIONPULSE_CPU_ISA", "VISIONPULSE_CUDA_ARCHS",
    "VISIONPULSE_LINEINFO", "VISIONPULSE_PREBUILT", "VISIONPULSE_SERVING",
}  # fmt: skip
# Names of others that we honour: of Triton in its backend, of CMake in the build, of Prometheus
# where an engine has several processes.
FOREIGN_ENVIRONMENT = {
    "TRITON_INTERPRET", "CMAKE_BUILD_PARALLEL_LEVEL", "PROMETHEUS_MULTIPROC_DIR"
}  # fmt: skip
LONGEST = 400


def tracked(*patterns):
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).exists()]


def sources():
    return [path for path in tracked("visionpulse/*.py", "visionpulse/**/*.py")]


def rule_for(module):
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        prefix = ".".join(parts[:length])
        if prefix in ALLOWED:
            return prefix, ALLOWED[prefix]
    pytest.fail(f"{module} has no row in ALLOWED: say who it may import")


def covers(allowed, target):
    return target == allowed or target.startswith(f"{allowed}.")


def targets_of(path):
    """What a file imports of ours from outside its own folder or row."""
    room = rule_for(module_of(path))[0]
    ours = {one.target for one in imports_of(path) if one.ours}
    return {target for target in ours if not covers(room, target)}


@pytest.mark.parametrize("path", sources(), ids=module_of)
def test_imports_go_in_the_allowed_direction(path):
    allowed = rule_for(module_of(path))[1]
    for target in targets_of(path):
        known = any(covers(one, target) for one in allowed)
        assert known, f"{module_of(path)} may not import {target}"


def test_every_allowance_is_used():
    used = defaultdict(set)
    for path in sources():
        used[rule_for(module_of(path))[0]] |= targets_of(path)
    idle = {
        room: left
        for room, allowed in ALLOWED.items()
        if (left := {one for one in allowed if not any(covers(one, t) for t in used[room])})
    }
    assert not idle, f"nobody needs these: {idle}"
    assert set(used) == set(ALLOWED), f"rows without a module: {set(ALLOWED) - set(used)}"


def graph():
    return {module_of(p): {i.target for i in imports_of(p) if i.ours} for p in sources()}


def test_no_modules_import_each_other():
    """Not in a circle, and not through a function or for a type either."""
    found = circles({module: targets - {module} for module, targets in graph().items()})
    assert not found, f"these need each other: {found}"


def test_class_names_are_used_once():
    homes = defaultdict(list)
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                homes[node.name].append(module_of(path))
    twice = {name: where for name, where in homes.items() if len(where) > 1}
    assert not twice, f"one name, one class: {twice}"


@pytest.mark.parametrize("path", sources(), ids=module_of)
def test_optional_packages_are_imported_inside_functions(path):
    found = {one.target for one in imports_of(path) if one.at_import and not one.ours} & OPTIONAL
    found -= INSIDE.get(module_of(path).rpartition(".")[0], set())
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
        (
            "ops.py",
            "torch_ops.py",
            "backends/",
            "models/attention.py",
            "models/step.py",
            "models/traced_ops.py",
            "models/lookback.py",
        ),
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


# A word with one meaning has no second name: {pattern: (what to say, where it counts)}.
KERNELS = ("kernels", "csrc")
EVERYWHERE = (*KERNELS, "visionpulse")
SECOND_NAMES = {
    r"choose|choice_of_keys": ("select", KERNELS),
    r"_scan_kernel|_rank_kernel|vp_rank": (
        "_score_kernel, _select_kernel, vp_score_...",
        EVERYWHERE,
    ),
    r"\bkRows\b|\bkRowBytes\b|\bwarp_rows\b": ("kHeads, kKeyBytes, warp_heads", KERNELS),
    r"\b(q|k|v|out|logits)_row\b": ("..._stride", KERNELS),
    r"\bsort_keys?\b|\bordered_keys?\b": ("sort_code", EVERYWHERE),
    r"\bKeep\b|\bkeep_logits\b|\bKEPT\b": ("stored_logits", KERNELS),
    r"\bLanding\b|\bfade\b": ("CopyBarrier, rescale", KERNELS),
    r"struct_checks|\bstructs\b": ("cache, visual, selection, tensor_checks", EVERYWHERE),
    r"\b[Tt]old\b|\bShown\b": ("what the thing is", ("visionpulse",)),
}


def second_names(text, folder):
    return {
        f"{found[0]} -> {name}"
        for pattern, (name, where) in SECOND_NAMES.items()
        if folder in where and (found := re.search(pattern, text))
    }


def test_words_have_one_meaning():
    """The words of CONTRIBUTING, each without a second name."""
    found = {
        str(path.relative_to(ROOT)): words
        for path in tracked("kernels/*", "csrc/*", "visionpulse/*.py", "visionpulse/**/*.py")
        if (words := second_names(path.read_text(), path.relative_to(ROOT).parts[0]))
    }
    assert not found, found


def test_a_second_name_is_seen():
    assert second_names("void choose(int k);", "csrc") == {"choose -> select"}
    assert not second_names("choose a backend", "visionpulse")
    assert not second_names("select(q_stride, sort_codes)", "kernels")


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


PLANTED = """
import triton
from . import ops
if TYPE_CHECKING:
    from .config import PulseConfig
def late():
    import transformers
    from .models import session
"""


def test_a_module_that_breaks_the_rules_is_seen():
    found = imports_of(PACKAGE / "workspace.py", text=PLANTED)
    assert {one.target for one in found if one.ours} == {"ops", "config", "models.session"}
    assert {one.target for one in found if one.at_import} == {"triton", "ops"}
    assert not imports_of(PACKAGE / "workspace.py", text="import os\n")[0].ours


def test_a_circle_is_seen():
    chain = {"a": {"b"}, "b": {"c"}, "c": set()}
    assert circles(chain) == []
    assert circles(chain | {"c": {"a"}}) == [["a", "b", "c"]]
    assert circles(chain | {"c": {"b"}}) == [["b", "c"]]
