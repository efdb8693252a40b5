"""Compile the CUDA engine for the host: the same sources under `cusim.h`, kept by content."""

import hashlib
import importlib.util
import os
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any
from uuid import uuid4

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "tests" / "cusim"
STREAM_KERNELS = ("kernels/cuda/attend.cu", "kernels/cuda/score.cu")  # those with rows
KERNELS = (*STREAM_KERNELS, "kernels/cuda/score_finish.cu", "kernels/cuda/select.cu")
HOST = ("csrc/cuda/plan.cpp", "csrc/cuda/launch.cpp", "csrc/cuda/engine.cpp")
BINDINGS = "tests/cusim/module.cpp"  # the longest to compile, and nothing there is watched
# Rows of entries.cuh that tell most in least time: both row tiles, and two head dims.
FEW = tuple(
    f"{kind}, {d}, {heads}"
    for kind in ("bf16, BFloat16", "fp8, Float8Beside16")
    for d in (64, 128)
    for heads in (8, 32)
)
PRELUDE = ("builtins.h", "warp_matrix.h")  # what every kernel includes, and no bug changes
ASAN = ("-fsanitize=address", "-fno-omit-frame-pointer", "-g1")


@dataclass(frozen=True)
class Edit:
    """One change to a source, as a planted bug makes it."""

    path: str
    before: str
    after: str


def _flags() -> list[str]:
    import pybind11

    return [
        *("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"),
        *("-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized", "-Werror"),
        *("-isystem", pybind11.get_include(), "-isystem", sysconfig.get_paths()["include"]),
    ]


def _digest(paths: list[Path], *words: str) -> str:
    sha = hashlib.sha256()
    for path in sorted(paths):
        sha.update(str(path.name).encode() + path.read_bytes())
    sha.update("\0".join(words).encode())
    return sha.hexdigest()[:16]


def _sources() -> list[Path]:
    folders = ("kernels/common", "kernels/cuda", "csrc", "csrc/cuda", "tests/cusim")
    found = [p for folder in folders for p in (ROOT / folder).iterdir() if p.is_file()]
    found += (HERE / "include").rglob("*.h")
    return [p for p in found if p.suffix in (".h", ".cuh", ".cu", ".cpp")]


def _compile(source: str, target: Path, extra: tuple[str, ...], roots: tuple[Path, ...]) -> None:
    path = next(root / source for root in roots if (root / source).exists())
    include = [f"-I{p}" for p in (*roots, HERE, HERE / "include")]
    language = "c++-header" if path.suffix == ".h" else "c++"
    partial = target.with_name(f"{target.name}.{uuid4()}")
    command = [
        *(os.environ.get("CXX", "g++"), "-x", language, *_flags(), *extra, *include),
        *("-c", str(path), "-o", str(partial)),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    partial.rename(target)


def _overlay(folder: Path, edits: tuple[Edit, ...]) -> Path:
    """Changed copies of the edited sources, under their own paths."""
    texts: dict[str, str] = {}
    for edit in edits:
        text = texts.get(edit.path) or (ROOT / edit.path).read_text()
        assert text.count(edit.before) == 1, f"{edit.path}: {edit.before!r} must stand there once"
        texts[edit.path] = text.replace(edit.before, edit.after)
    for path, text in texts.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    return folder


def _touched(source: str, edits: tuple[Edit, ...]) -> bool:
    """Whether a source is compiled anew for an edit, of itself or of a header.

    A header of `score` is one of `attend` too, where a bug shows as well: one of them is enough.
    """
    of_select, of_both = ("radix.cuh", "candidates.cuh"), ("spans.cuh", "arrival.cuh")

    def reached(path: str) -> bool:
        if source.endswith("select.cu") and path.endswith(of_select + of_both):
            return True
        if source.endswith("attend.cu") and path.endswith(".cuh"):
            return not path.endswith(of_select)
        return path == source

    return any(reached(edit.path) for edit in edits)


def _objects(
    folder: Path,
    sources: tuple[str, ...],
    extra: tuple[str, ...],
    roots: tuple[Path, ...],
    of_kernels: tuple[str, ...] = (),
) -> list[Path]:
    """One object a source; `of_kernels` are options that host code must not see."""
    folder.mkdir(parents=True, exist_ok=True)
    targets = [folder / (Path(source).name + ".o") for source in sources]
    missing = [(s, t) for s, t in zip(sources, targets, strict=True) if not t.exists()]
    with ThreadPoolExecutor(2) as pool:
        options = {s: (*of_kernels, *extra) if s in KERNELS else extra for s in sources}
        for job in [pool.submit(_compile, s, t, options[s], roots) for s, t in missing]:
            job.result()
    return targets


_one_prelude = Lock()


def _prelude(folder: Path, mode: tuple[str, ...]) -> tuple[str, ...]:
    """Options that include what every kernel does, compiled before."""
    header, compiled = folder / "prelude.h", folder / "prelude.h.gch"
    with _one_prelude:
        if not compiled.exists():
            folder.mkdir(parents=True, exist_ok=True)
            header.write_text("".join(f'#include "{name}"\n' for name in PRELUDE))
            _compile(str(header), compiled, mode, (ROOT,))
    return ("-include", str(header))


def build(
    asan: bool = False,
    edits: tuple[Edit, ...] = (),
    kernels: tuple[str, ...] | None = None,
    arch: str = "",
) -> Path:
    """The module `_cusim`, of those rows of entries.cuh alone that `kernels` names.

    What `edits` reach is compiled anew; the rest is that of the build without edits. With `arch`
    the kernels are what nvcc makes of them for that architecture.
    """
    rows = " ".join(f"X({row})" for row in kernels or ())
    few = (f"-DVP_STREAM_KERNELS(X)={rows}",) if kernels else ()
    mode = ASAN if asan else ()
    code = (f"-D__CUDA_ARCH__={arch}0", "-include", PRELUDE[0], *few) if arch else ()
    sources, place = _sources(), ROOT / "build" / "cusim"
    whole = place / _digest(sources, "objects", *mode, *code)
    bindings = place / _digest(sources, "objects")
    part = edits or kernels
    folder = place / _digest(sources, *mode, *code, rows, *map(repr, edits)) if part else whole
    module = folder / "_cusim.so"
    if module.exists():
        return module
    every = (*KERNELS, *HOST)
    changed = tuple(source for source in every if _touched(source, edits))
    if kernels and not edits:
        changed = STREAM_KERNELS
    objects = []
    if changed:
        roots = (_overlay(folder / "overlay", edits), ROOT)
        # first: of a function that two objects have, the linker takes the first
        objects += _objects(folder, changed, (*mode, *few), roots, (*code, *_prelude(whole, mode)))
    objects += _objects(whole, tuple(s for s in every if s not in changed), mode, (ROOT,), code)
    objects += _objects(bindings, (BINDINGS,), ("-O0",), (ROOT,))
    partial = folder / f"partial.{uuid4()}.so"
    link = [os.environ.get("CXX", "g++"), "-shared", *mode]
    subprocess.run([*link, *map(str, objects), "-o", str(partial)], check=True)
    partial.rename(module)
    return module


@cache
def load(module: Path | None = None) -> Any:
    """The module, for its host functions."""
    spec = importlib.util.spec_from_file_location("_cusim", module or build())
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded
