"""Versions of the tools that proofs depend on, and packages that one proof alone needs."""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from functools import cache
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# On PATH, or as the packages nvidia-cuda-{nvcc,crt,runtime,cccl} and nvidia-nvvm bring it.
PACKAGED_NVCC = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin" / "nvcc"
NVCC = shutil.which("nvcc") or shutil.which(PACKAGED_NVCC)
# What a CPU needs for each of our instruction sets, as /proc/cpuinfo names it.
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def _said(*command: str, pattern: str = r"(\d+(\.\d+)+)") -> str | None:
    """The version number that a program prints."""
    if not command[0] or shutil.which(command[0]) is None:
        return None
    said = subprocess.run(command, capture_output=True, text=True).stdout
    found = re.search(pattern, said)
    return found[1] if found else None


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) if info.exists() else set()
    return " ".join([platform.machine(), *(flag for flag in FLAGS if flag in flags)])


def _package(name: str) -> str | None:
    try:
        return metadata.version(name).split("+")[0]
    except metadata.PackageNotFoundError:
        return None


@cache
def version_of(tool: str) -> str | None:
    """The version of a tool, None where it is not here."""
    if tool == "cpu":
        return _cpu()
    if tool == "nvcc":
        return _said(NVCC or "", "--version", pattern=r"V(\d+\.\d+\.\d+)")
    if tool == "g++":
        return _said(os.environ.get("CXX", "g++"), "-dumpfullversion")
    if tool.endswith("-g++"):
        return _said(tool, "-dumpfullversion")
    if tool.startswith("qemu-"):
        return _said(tool, "--version")
    return _package(tool)


def installed(package: str) -> Path:
    """The folder of a package that stands before that of the environment, downloaded once."""
    folder = ROOT / "build" / "packages" / package
    if not (folder / ".ready").exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
        subprocess.run([*pip, str(folder), package], check=True)
        (folder / ".ready").touch()
    return folder
