"""Serve the tiny model of the package on a GPU: run by `make gpu-check` where vLLM is installed.

python tests/serving/gpu_serve.py FLASH_ATTN|TRITON_ATTN

Pruned tokens with full graphs must be those of eager steps, and keeping all must say what vLLM's
own classes say. VLLM_USE_V2_MODEL_RUNNER chooses the runner.
"""

import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
DTYPES = {"FLASH_ATTN": "bfloat16", "TRITON_ATTN": "float32"}
SETTINGS = {
    "stock": None,
    "keep all": {"ratio": [1.0, 1.0]},
    "pruned": {"preset": "5pct"},
    "per_layer": {"preset": "5pct", "schedule": "per_layer"},
    "lookback": {"preset": "5pct", "schedule": "lookback"},
}


def runs(backend):
    """Every setting, eagerly and in graphs; not all memory, an engine follows another."""
    common = {
        "attention_backend": backend, "dtype": DTYPES[backend], "gpu_memory_utilization": 0.2,
    }  # fmt: skip
    for name, setting in SETTINGS.items():
        asked = {} if setting is None else {"additional_config": {"visionpulse": setting}}
        for is_eager in (True, False):
            llm = common | asked | {"enforce_eager": is_eager}
            yield {"name": f"{name}, {'eager' if is_eager else 'graphs'}", "llm": llm}


def main(backend):
    sys.path.insert(0, str(ROOT / "examples" / "serving"))
    import tiny_model

    spec = {"model": str(tiny_model.main(ROOT / "build" / "tiny-vllm")), "runs": [*runs(backend)]}
    command = [sys.executable, str(HERE / "engine.py"), json.dumps(spec)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, check=True)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    tokens = {one["name"]: one["rounds"][0]["tokens"] for one in found}
    for name in SETTINGS:
        assert tokens[f"{name}, graphs"] == tokens[f"{name}, eager"], f"{name}: graphs differ"
    if DTYPES[backend] == "float32":  # in 16 bits two right kernels may choose two tokens
        assert tokens["keep all, eager"] == tokens["stock, eager"], "keeping all differs"
    assert tokens["pruned, eager"] != tokens["stock, eager"], "nothing was pruned"
    classes = {one["name"]: one["classes"] for one in found}
    assert all(one.startswith("vllm.") for one in classes["stock, graphs"]), classes
    assert any(one.startswith("visionpulse.") for one in classes["pruned, graphs"]), classes
    print("holds", backend)


if __name__ == "__main__":
    main(*sys.argv[1:])
