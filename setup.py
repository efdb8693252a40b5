"""Build `visionpulse._C` with CMake and lay the packages out; the rest is in pyproject.toml."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, __version__, find_namespace_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def check_tools() -> None:
    """Pip brings the tools; without isolation they may be missing or old."""
    lacking = [tool for tool in ("cmake", "ninja") if shutil.which(tool) is None]
    if importlib.util.find_spec("pybind11") is None:
        lacking.append("pybind11")
    if int(__version__.split(".")[0]) < 77:
        lacking.append(f"setuptools 77 or later (here {__version__})")
    if lacking:
        way_out = "install them, or leave --no-build-isolation out where there is a network"
        raise SystemExit(f"visionpulse cannot be built without {', '.join(lacking)}: {way_out}")


class CMakeBuild(build_ext):
    """Configure, build and copy the one extension; a second run rebuilds only what changed."""

    def build_extension(self, ext: Extension) -> None:
        if prebuilt := os.environ.get("VISIONPULSE_PREBUILT"):  # of these sources, elsewhere
            self.lay_out(ext, Path(prebuilt))
            return
        import pybind11

        # one tree per interpreter, kept between runs; isolated builds move every tool, so each
        # path is given anew
        tag = sysconfig.get_config_var("SOABI") or sys.implementation.cache_tag
        tree = ROOT / "build" / f"cmake-{tag}"
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(tree), "-G", "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DVISIONPULSE_CUDA_ARCHS={os.environ.get('VISIONPULSE_CUDA_ARCHS', '')}",
            f"-DVISIONPULSE_LINEINFO={os.environ.get('VISIONPULSE_LINEINFO', '0')}",
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1))
        subprocess.run(["cmake", "--build", str(tree), "--target", "_C", "-j", jobs], check=True)

        self.lay_out(ext, tree / Path(self.get_ext_filename("_C")).name)

    def lay_out(self, ext: Extension, built: Path) -> None:
        """Put the built module into the package."""
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # unlink first: writing into a library that a running process has mapped would crash it
        target.unlink(missing_ok=True)
        shutil.copy2(built, target)


check_tools()
setup(
    packages=[
        # namespaces too: folders of package data have no __init__.py
        *find_namespace_packages(str(ROOT), include=["visionpulse", "visionpulse.*"]),
        "visionpulse._triton",
    ],
    # The Triton kernels live beside the other kernels, but not as `kernels.triton`: a top-level
    # `kernels` would shadow the Hugging Face package of that name, which transformers imports.
    package_dir={"visionpulse._triton": "kernels/triton"},
    ext_modules=[Extension("visionpulse._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    zip_safe=False,
)
