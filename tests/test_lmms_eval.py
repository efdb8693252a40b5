"""A whole run of lmms-eval on data of its format: the plugin's model, and the launcher's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny model with tokenizer and processor, and the task."""
    made = tmp_path_factory.mktemp("lmms")
    for script, place in (
        ("examples/serving/tiny_model.py", "model"),
        ("tests/lmms_eval_task.py", "task"),
    ):
        command = [sys.executable, str(ROOT / script), str(made / place)]
        subprocess.run(command, check=True, capture_output=True)
    return made


# settings of lmms-eval's class: a tiny picture is not enlarged, and no system prompt
COMMON = "pretrained=model,device=cpu,device_map=cpu,min_pixels=1024,attn_implementation=sdpa,"
COMMON += "system_prompt="
RUNS = {
    "plugin": (
        ["lmms_eval", "--model", "visionpulse_qwen3_vl"], ",vp_preset=5pct,vp_log=log.jsonl"
    ),
    "launcher": (
        ["visionpulse", "run", "--preset", "5pct", "--log", "log.jsonl", "-m", "--", "lmms_eval",
         "--model", "qwen3_vl"], "",
    ),
}  # fmt: skip


@pytest.mark.deep
@pytest.mark.parametrize("which", RUNS)
def test_a_run_answers_with_sparse_steps(which, folder):
    (folder / "log.jsonl").unlink(missing_ok=True)
    command, settings = RUNS[which]
    done = subprocess.run(
        [sys.executable, "-m", *command, "--model_args", COMMON + settings, "--tasks",
         "glyph_trail", "--include_path", "task", "--batch_size", "1", "--output_path", which],
        cwd=folder, capture_output=True, text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    (results,) = (folder / which).rglob("*_results.json")
    assert json.loads(results.read_text())["results"]["glyph_trail"]["exact,none"] == 1.0
    (line,) = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    assert line["steps"] > 60 and line["retention"]["mean"] <= 0.05
