"""The package as a folder of Hugging Face's `kernels`, loaded by its own tool without a hub."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "visionpulse"
# The name differs from that of the package, so a relative import that is missing fails.
ABOUT = {
    "id": "_visionpulse_0", "name": "visionpulse", "version": 1, "license": "Apache-2.0",
    "python-depends": [], "backend": {"type": "cpu"},
}  # fmt: skip
USE = """
import sys
from pathlib import Path
import kernels, torch
vp = kernels.get_local_kernel(Path(sys.argv[1]), backend="cpu")
assert "visionpulse" not in sys.modules
q, k, v = torch.randn(1, 8, 64), torch.randn(1, 2, 200, 64), torch.randn(1, 2, 200, 64)
visual = vp.VisualTokens.from_spans([[(10, 150)]])
out, selection = vp.decode(q, vp.KVCache(k, v), visual)
same, _ = vp.decode(q, vp.KVCache(k, v), visual, backend="reference")
torch.testing.assert_close(out, same, rtol=1e-4, atol=1e-5)
print(vp.__file__, vp.explain(q, vp.KVCache(k, v), visual).name)
"""


@pytest.mark.deep
def test_the_kernels_tool_loads_the_package_from_a_folder(tmp_path):
    build = tmp_path / "build" / "torch-cpu"
    shutil.copytree(PACKAGE, build, ignore=shutil.ignore_patterns("__pycache__"))
    (build / "metadata.json").write_text(json.dumps(ABOUT))
    done = subprocess.run(
        [sys.executable, "-c", USE, str(tmp_path)], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    where, backend = done.stdout.split()
    assert str(build) in where and backend == "cpu"
