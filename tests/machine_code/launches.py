"""Compile what the machine code is read from, and the launches of a decode step.

Queries of bfloat16 and head dim 128 alone, in seconds: what the numbers of latency speak of. K and
V are bfloat16 too, or of 8 bits.
"""

import hashlib
import os
import subprocess
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

from proof_tools import NVCC, version_of

from .walk import DRAM, L2, Array

ROOT = Path(__file__).resolve().parents[2]
ROWS = (
    "X(bf16, BFloat16, 128, 8) X(bf16, BFloat16, 128, 32) X(bf16, BFloat16, 128, 64) "
    "X(fp8, Float8Beside16, 128, 8)"
)
SOURCES = ("attend", "score", "score_finish", "select")
SIMULATED = ("tests/cusim", "tests/cusim/include")
H200 = (90, 132, 232448)  # capability, multiprocessors, shared memory of a block


class Step(NamedTuple):
    """A decode step of `rows` rows, 5 % of whose visual tokens are kept."""

    name: str  # dense, anchor-dense, anchor-pruned, follower
    rows: int
    visual: int
    spans: int = 1
    heads: int = 32
    kv_heads: int = 8
    text: int = 256
    float8: bool = False  # of K and V
    queries: int = 1  # of a row

    @property
    def kept(self) -> int:
        return self.visual // 20

    @property
    def key_bytes(self) -> int:
        return 128 if self.float8 else 256

    @property
    def tile_keys(self) -> int:
        """Keys of a tile."""
        return 32 if self.float8 else 16


class Launch(NamedTuple):
    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    cluster: int
    splits: int  # of a row
    arguments: bytes


def kept_file(made_of: list[Path], words: str, suffix: str, command: list[str]) -> Path:
    """What a compiler makes, kept by the content of its sources and by its command."""
    sha = hashlib.sha256(words.encode())
    for path in made_of:
        sha.update(path.read_bytes())
    target = ROOT / "build" / "machine-code" / f"{sha.hexdigest()[:16]}{suffix}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.stem}.{uuid4()}{suffix}")
        done = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        partial.rename(target)
    return target


def files_of(*folders: str, root: Path = ROOT) -> list[Path]:
    kinds = (".h", ".cuh", ".cu", ".cpp")
    return sorted(p for f in folders for p in (root / f).iterdir() if p.suffix in kinds)


def cubin(source: str, target: str = "90", root: Path = ROOT) -> Path:
    """The machine code of one of SOURCES, from a tree that may be a changed copy."""
    assert NVCC is not None, "no nvcc: on PATH, or pip install nvidia-cuda-nvcc"
    folder = ROOT / "build" / "machine-code"
    folder.mkdir(parents=True, exist_ok=True)
    one = folder / f"one-{source}.cu"
    text = f'#define VP_STREAM_KERNELS(X) {ROWS}\n#include "kernels/cuda/{source}.cu"\n'
    if not one.exists() or one.read_text() != text:
        one.write_text(text)
    flags = ["-std=c++17", "-O3", f"-arch=sm_{target}", "-cubin"]
    made_of = files_of("kernels/cuda", "kernels/common", root=root)
    words = f"{source} {flags} {text} {version_of('nvcc')}"
    return kept_file(made_of, words, ".cubin", [NVCC, *flags, f"-I{root}", str(one)])


@cache
def launches_of(step: Step, chip: tuple[int, int, int] = H200) -> tuple[Launch, ...]:
    """As the engine itself makes them."""
    source = ROOT / "tests/machine_code/launches.cpp"
    made_of = files_of("kernels/cuda", "kernels/common", "csrc", "csrc/cuda", *SIMULATED)
    flags = ["-std=c++17", "-O0", "-Wno-unknown-pragmas", f"-I{ROOT}"]
    flags += [f"-I{ROOT / folder}" for folder in SIMULATED]
    command = [os.environ.get("CXX", "g++"), *flags, str(source)]
    tool = kept_file([*made_of, source], " ".join(flags), ".exe", command)
    shape = (step.rows, step.heads, step.kv_heads, step.text, step.visual, step.kept, step.spans)
    shape += (int(step.float8), step.queries)
    words = [step.name, *map(str, (*chip, *shape))]
    lines = subprocess.run([tool, *words], check=True, capture_output=True, text=True).stdout
    found = []
    for kernel, x, y, z, threads, shared, cluster, splits, hexed in map(
        str.split, lines.splitlines()
    ):
        grid = (int(x), int(y), int(z))
        sizes = int(threads), int(shared), int(cluster), int(splits)
        found.append(Launch(kernel, grid, *sizes, bytes.fromhex(hexed)))
    return tuple(found)


def key_positions(step: Step) -> list[int]:
    """The position of each key that a follower attends to, text first, in its own order."""
    begins = span_begins(step)
    visual = [b + i for b, e in begins for i in range(e - b)]
    chosen = [visual[20 * n] for n in range(step.kept)]
    is_visual = set(visual)
    return [p for p in range(step.text + step.visual) if p not in is_visual] + chosen


def span_begins(step: Step) -> list[tuple[int, int]]:
    """The spans of visual tokens: as long as each other, text between and around."""
    size, gap = step.visual // step.spans, step.text // (step.spans + 1)
    return [(gap + n * (size + gap), gap + n * (size + gap) + size) for n in range(step.spans)]


def arrays_of(step: Step) -> dict[int, Array]:
    """Numbered as launches.cpp does. K and V come from DRAM, the rest was just written, from L2."""
    spans = span_begins(step)
    size = step.visual // step.spans
    words: list[int] = [edge for span in spans for edge in span]
    before = [n * size for n in range(step.spans + 1)]
    chosen = key_positions(step)[step.text :] if step.name == "follower" else None

    def many(row: list[int]) -> Any:
        return lambda at: row[at % len(row)]

    return {
        1: Array("k", DRAM), 2: Array("v", DRAM), 3: Array("starts", L2, lambda _: 0),
        4: Array("lengths", L2, lambda _: step.text + step.visual),
        5: Array("spans", L2, many(words)), 6: Array("offsets", L2, many(before)),
        7: Array("indices", L2, many(chosen) if chosen else lambda n: 128 + 20 * n),
        8: Array("counts", L2, lambda _: step.kept), 9: Array("q", L2), 10: Array("out", L2),
        11: Array("mass", L2), 12: Array("mass_mean", L2), 13: Array("scratch", L2),
        14: Array("counters", L2), 15: Array("k_scale", L2), 16: Array("v_scale", L2),
    }  # fmt: skip
