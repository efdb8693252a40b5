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
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "tests" / "cusim"
KERNELS = ("kernels/cuda/attend.cu", "kernels/cuda/score.cu", "kernels/cuda/select.cu")
HOST = (
    *("csrc/cuda/plan.cpp", "csrc/cuda/launch.cpp", "csrc/cuda/engine.cpp"),
    "tests/cusim/module.cpp",
)
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


def _compile(source: str, target: Path, extra: tuple[str, ...], overlay: Path | None) -> None:
    roots = ([overlay] if overlay else []) + [ROOT]
    path = next(root / source for root in roots if (root / source).exists())
    include = [f"-I{p}" for p in (*roots, HERE, HERE / "include")]
    partial = target.with_suffix(".partial")
    command = [
        *(os.environ.get("CXX", "g++"), "-x", "c++", *_flags(), *extra, *include),
        *("-c", str(path), "-o", str(partial)),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    partial.rename(target)


def _overlay(folder: Path, edits: tuple[Edit, ...]) -> Path | None:
    """Changed copies of the edited sources, under their own paths."""
    texts: dict[str, str] = {}
    for edit in edits:
        text = texts.get(edit.path) or (ROOT / edit.path).read_text()
        assert text.count(edit.before) == 1, f"{edit.path}: {edit.before!r} must stand there once"
        texts[edit.path] = text.replace(edit.before, edit.after)
    for path, text in texts.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    return folder if texts else None


def _touched(source: str, edits: tuple[Edit, ...]) -> bool:
    """Whether an edit reaches a source, itself or in a header."""
    of_select = ("row.cuh", "last.cuh", "radix.cuh", "candidates.cuh")
    headers = of_select if source.endswith("select.cu") else (".cuh",)
    kernel = source in KERNELS
    return any(edit.path == source or (kernel and edit.path.endswith(headers)) for edit in edits)


def _objects(
    folder: Path, sources: tuple[str, ...], extra: tuple[str, ...], overlay: Path | None
) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    targets = [folder / (Path(source).name + ".o") for source in sources]
    missing = [(s, t) for s, t in zip(sources, targets, strict=True) if not t.exists()]
    with ThreadPoolExecutor(2) as pool:
        for job in [pool.submit(_compile, s, t, extra, overlay) for s, t in missing]:
            job.result()
    return targets


def build(
    asan: bool = False, edits: tuple[Edit, ...] = (), kernels: tuple[str, ...] | None = None
) -> Path:
    """The module `_cusim`; `kernels` limits what is compiled to rows of entries.cuh."""
    mode = ASAN if asan else ()
    extra = mode
    if kernels is not None:
        rows = " ".join(f"X({row})" for row in kernels)
        extra = (*mode, f"-DVP_STREAM_KERNELS(X)={rows}")
    sources = _sources()
    folder = ROOT / "build" / "cusim" / _digest(sources, *extra, *map(repr, edits))
    module = folder / "_cusim.so"
    if module.exists():
        return module
    overlay = _overlay(folder / "overlay", edits)
    # what an edit does not touch comes from the build without edits
    changed = tuple(source for source in (*KERNELS, *HOST) if edits and _touched(source, edits))
    kept = tuple(source for source in (*KERNELS, *HOST) if source not in changed)
    shared = ROOT / "build" / "cusim" / _digest(sources, "objects", *extra)
    objects = _objects(folder, changed, extra, overlay) + _objects(shared, kept, extra, None)
    partial = folder / "partial.so"
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
