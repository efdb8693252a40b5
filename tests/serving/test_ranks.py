"""Engines of several ranks, and compiled ones, say what one rank says without the compiler."""

import os
import sys
from functools import cache
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import test_engine
from test_engine import SETTINGS, engine

pytestmark = pytest.mark.deep
COMPILED = {"enforce_eager": False}
# Stages of three layers. Without vLLM's compiler its CPU engine has no pipeline stages.
STAGES = COMPILED | {"pipeline_parallel_size": 2, "compilation_config": {"backend": "eager"}}
RUNS = {
    "compiled": engine("lookback", SETTINGS["lookback"], **COMPILED),
    "tensor ranks": engine("two anchors", SETTINGS["two anchors"], tensor_parallel_size=2),
    "pipeline stages": engine("two anchors", SETTINGS["two anchors"], **STAGES),
    "pipeline stages, per_layer": engine("per_layer", SETTINGS["per_layer"], **STAGES),
}


@cache
def results():
    """What the engines made: each of two ranks takes what cores there are."""
    runs = [run | {"name": name} for name, run in RUNS.items()]
    return test_engine.made(runs, os.environ | {"VLLM_CPU_OMP_THREADS_BIND": "nobind"})


@pytest.mark.parametrize("name", RUNS)
def test_an_engine_says_what_the_patched_model_says(name):
    setting = RUNS[name]["name"]
    assert results()[name]["rounds"][0]["tokens"] == test_engine.expected(setting)
    assert results()[name]["classes"] == ["visionpulse.serving.vllm.cpu.PulseImpl"]
