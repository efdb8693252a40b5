"""Every CUDA kernel on every architecture of a release: no spill, registers within a table.

The table is `cuda_registers.json`, the most registers of each kernel over the architectures. Who
needs more says so on purpose: `python tests/test_cuda_build.py` writes the table anew.
"""

import hashlib
import json
import re
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# By the PTX that CMakeLists.txt makes them of.
KINDS = {"80": ("80", "86", "89"), "90": ("90", "100", "120")}
ARCHS = tuple(arch for archs in KINDS.values() for arch in archs)
SOURCES = tuple(sorted(path.stem for path in (ROOT / "kernels" / "cuda").glob("*.cu")))
TABLE = Path(__file__).with_name("cuda_registers.json")
MOST_KERNELS = 170  # of one architecture: what six of them can be built from in five minutes
STEP = 8  # registers are handed out to a warp in eights

ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)

# A kernel that keeps 200 sums at once, with 40 registers for them.
GREEDY = """
extern "C" __global__ void __launch_bounds__(512, 3) greedy(float* x) {
  float sum[200];
#pragma unroll
  for (int i = 0; i < 200; ++i) sum[i] = x[i * 512 + threadIdx.x];
  for (int n = 0; n < 9; ++n) {
#pragma unroll
    for (int i = 0; i < 200; ++i) sum[i] = sum[i] * sum[(i * 7 + 1) % 200] + sum[(i + 1) % 200];
  }
#pragma unroll
  for (int i = 0; i < 200; ++i) x[i * 512 + threadIdx.x] = sum[i];
}
"""

# On PATH, or as the packages nvidia-cuda-{nvcc,crt,runtime,cccl} and nvidia-nvvm bring it.
PACKAGED = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin" / "nvcc"
NVCC = shutil.which("nvcc") or shutil.which(PACKAGED)

pytestmark = [
    pytest.mark.deep,
    pytest.mark.skipif(NVCC is None, reason="no nvcc, on PATH or among Python's packages"),
]


def digest():
    sha = hashlib.sha256()
    for folder in ("kernels/common", "kernels/cuda"):
        for path in sorted((ROOT / folder).iterdir()):
            sha.update(path.name.encode() + path.read_bytes())
    return sha.hexdigest()[:16]


def assembled(source, kind, target):
    """What ptxas says of one file for the architectures of one kind."""
    codes = ",".join(f"sm_{arch}" for arch in KINDS[kind])
    command = [
        *(NVCC, "-std=c++17", "-O3", "-DVP_SPLIT", "-Xptxas", "-v", f"-I{ROOT}"),
        *("-Werror", "all-warnings"),
        *("-gencode", f"arch=compute_{kind},code=[{codes}]"),
        *("-c", str(source), "-o", str(target)),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    target.unlink()
    return done.stdout + done.stderr


def compiled(source, kind):
    """The same of one of ours; kept by the content of the sources."""
    folder = ROOT / "build" / "cuda-matrix" / digest()
    log = folder / f"{source}-{kind}.log"
    if not log.exists():
        folder.mkdir(parents=True, exist_ok=True)
        path = ROOT / "kernels" / "cuda" / f"{source}.cu"
        log.write_text(assembled(path, kind, log.with_suffix(".o")))
    return log.read_text()


def kernels_of(log):
    """{architecture: {kernel: what ptxas says of it}}."""
    numbers, found = ("stack", "stores", "loads", "registers"), {}
    for entry in map(re.Match.groupdict, ENTRY.finditer(log)):
        kernels = found.setdefault(entry["arch"].removeprefix("sm_"), {})
        kernels[entry["name"]] = {key: int(entry[key]) for key in numbers}
    return found


def build_matrix():
    """The same of all our files."""
    jobs = [(source, kind) for kind in KINDS for source in SOURCES]
    with ThreadPoolExecutor(2) as pool:
        logs = list(pool.map(lambda job: compiled(*job), jobs))
    built = {arch: {} for arch in ARCHS}
    for log in logs:
        for arch, kernels in kernels_of(log).items():
            built[arch] |= kernels
    return built


def spilled(matrix):
    return {
        (arch, name): facts
        for arch, kernels in matrix.items()
        for name, facts in kernels.items()
        if facts["stack"] or facts["stores"] or facts["loads"]
    }


def over(matrix, table):
    return {
        (arch, name): (facts["registers"], table.get(name))
        for arch, kernels in matrix.items()
        for name, facts in kernels.items()
        if facts["registers"] > table.get(name, 0)
    }


@pytest.fixture(scope="module")
def matrix():
    return build_matrix()


def test_every_architecture_has_the_same_kernels(matrix):
    names = {arch: set(kernels) for arch, kernels in matrix.items()}
    for arch in ARCHS:
        assert names[arch] == names["90"], arch
    assert len(names["90"]) <= MOST_KERNELS
    expected = {
        f"vp_{stage}_{dtype}_d{d}_h{heads}"
        for stage in ("attend", "score")
        for dtype in ("bf16", "fp16", "fp32")
        for d in (64, 80, 96, 128, 192, 256)
        for heads in (4 if dtype == "fp32" else 8, 32)
    } | {
        f"vp_{stage}_{kind}_d{d}_h{heads}"
        for stage in ("attend", "score")
        for kind, heads in (("fp8", 8), ("fp8", 32), ("fp8_fp32", 32))
        for d in (64, 128, 192, 256)
    } | {
        f"vp_{stage}_{kind}_d{d}_h64"  # several queries
        for stage in ("attend", "score")
        for kind, dims in {
            **dict.fromkeys(("bf16", "fp16", "fp8"), (64, 128, 256)),
            "fp32": (128, 256), "fp8_fp32": (256,),
        }.items()
        for d in dims
    }  # fmt: skip
    assert expected | {"vp_score_finish", "vp_select_global", "vp_select_cluster"} == names["90"]


def test_no_kernel_spills(matrix):
    assert not spilled(matrix)


def test_registers_stay_within_the_table(matrix):
    table = json.loads(TABLE.read_text())
    assert set(table) == set(matrix["90"])
    assert not over(matrix, table)


def test_a_greedy_kernel_would_be_seen(tmp_path):
    source = tmp_path / "greedy.cu"
    source.write_text(GREEDY)
    planted = kernels_of(assembled(source, "80", tmp_path / "greedy.o"))
    assert set(planted) == set(KINDS["80"])
    facts = planted["89"]["greedy"]
    assert facts["stores"] > 0 and facts["loads"] > 0
    assert spilled(planted).keys() == {(arch, "greedy") for arch in planted}
    assert ("89", "greedy") in over(planted, {"greedy": facts["registers"] - 1})
    assert over(planted, {}) and not over(planted, {"greedy": 255})


def main():
    built = build_matrix()
    most = {
        name: max(-(-built[arch][name]["registers"] // STEP) * STEP for arch in ARCHS)
        for name in sorted(built["90"])
    }
    most = {name: min(registers, 255) for name, registers in most.items()}
    TABLE.write_text(json.dumps(most, indent=1) + "\n")


if __name__ == "__main__":
    main()
