"""The C++ tests: built by CMake, run by ctest, plain, under sanitizers, and for 64-bit Arm."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STRESS_PROBLEMS = "100"
ARM = "aarch64-linux-gnu"
BUILDS = {
    "plain": (),
    "address": ("-DVISIONPULSE_SANITIZE=address,undefined", "-DCMAKE_BUILD_TYPE=Debug"),
    # races are between threads, not between instructions: one instruction set shows them
    "thread": (
        "-DVISIONPULSE_SANITIZE=thread",
        "-DVISIONPULSE_ISAS=none",
        "-DCMAKE_BUILD_TYPE=Debug",
    ),
    "arm": (
        "-DCMAKE_SYSTEM_NAME=Linux",
        "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        f"-DCMAKE_CXX_COMPILER={ARM}-g++",
        f"-DCMAKE_CROSSCOMPILING_EMULATOR=qemu-aarch64;-L;/usr/{ARM}",
    ),
}


def run(*command, **environment):
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=1200
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built():
    """Build a tree of BUILDS once; a second run of the tests compiles only what changed."""
    for tool in ("cmake", "ninja", "ctest"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed; pip install cmake ninja")

    def build(name):
        tree = ROOT / "build" / f"ctest-{name}"
        options = ("-DVISIONPULSE_PYTHON=OFF", "-DVISIONPULSE_TESTS=ON", *BUILDS[name])
        run("cmake", "-S", ROOT, "-B", tree, "-G", "Ninja", *options)
        run("cmake", "--build", tree, "-j", str(min(2, os.cpu_count() or 1)))
        return tree

    return build


def ctest(tree, **environment):
    run("ctest", "--test-dir", tree, "--output-on-failure", "--no-tests=error", **environment)


@pytest.mark.deep
def test_units_and_random_problems(built):
    ctest(built("plain"))


@pytest.mark.deep
def test_units_of_amx_hold_its_instructions(built):
    units = list(built("plain").rglob("avx512_amx.cpp.o"))
    if not units:
        pytest.skip("no compiler for AMX, or no x86-64")
    (unit,) = units
    assert list(built("plain").rglob("amx_model.cpp.o")), "the tests lost the model of AMX"
    code = run("objdump", "-d", "--no-show-raw-insn", unit)
    for name in ("ldtilecfg", "tileloadd", "tdpbf16ps", "tilestored", "tilerelease"):
        assert name in code
    others = [path for path in unit.parent.glob("*.o") if path != unit]
    assert others and not any("tdpbf16ps" in run("objdump", "-d", path) for path in others)


@pytest.mark.deep
def test_memory_under_random_stress(built):
    tree = built("address")
    ctest(tree)
    run(tree / "test_random", STRESS_PROBLEMS, "1000")


@pytest.mark.deep
def test_threads_do_not_race(built):
    ctest(built("thread"))


@pytest.mark.deep
def test_neon_under_an_emulator(built):
    for tool in (f"{ARM}-g++", "qemu-aarch64"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed; apt install g++-{ARM} qemu-user")
    tree = built("arm")
    ctest(tree, VP_UNDER_QEMU="1")
    older = "cortex-a72"  # without BFDOT, which would be an illegal instruction

    def random(cpu, problems, first_seed, **environment):
        emulator = ("qemu-aarch64", "-cpu", cpu, "-L", f"/usr/{ARM}")
        return run(*emulator, tree / "test_random", problems, first_seed, **environment)

    # seeds with bfloat16 of 20 columns, a tail of pairs: of one query, and of several
    assert "sets: neon_bf16 neon baseline, chosen: neon_bf16" in random("max", "6", "166")
    assert "chosen: neon\n" in random("max", "1", "241", VISIONPULSE_CPU_ISA="neon")
    assert "sets: neon baseline, chosen: neon" in random(older, "5", "7")
    with pytest.raises(AssertionError, match=r"'neon_bf16', but this .* has: neon, baseline"):
        random(older, "1", "7", VISIONPULSE_CPU_ISA="neon_bf16")


def test_kernel_sources_include_no_library_code():
    # an inline function of the standard library compiled for one instruction set could be linked
    # into code that runs on an older CPU
    allowed = {"<cstdint>", "<immintrin.h>", "<arm_neon.h>"}
    for source in [*ROOT.glob("kernels/cpu/**/*"), *ROOT.glob("kernels/common/*")]:
        if source.is_dir():
            continue
        for line in source.read_text().splitlines():
            words = line.split()
            if words[:1] == ["#include"] and words[1].startswith("<"):
                assert words[1] in allowed, f"{source}: {line}"
