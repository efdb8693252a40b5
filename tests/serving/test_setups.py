"""Engines of several ranks, compiled ones and ones that draft say what a plain engine says."""

import os
import sys
from functools import cache
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import drafter
import test_engine
from test_engine import SETTINGS, engine

pytestmark = pytest.mark.deep
COMPILED = {"enforce_eager": False}
# Stages of three layers. Without vLLM's compiler its CPU engine has no pipeline stages.
STAGES = COMPILED | {"pipeline_parallel_size": 2, "compilation_config": {"backend": "eager"}}
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}
RUNS = {
    "compiled": engine("lookback", SETTINGS["lookback"], **COMPILED),
    "tensor ranks": engine("two anchors", SETTINGS["two anchors"], tensor_parallel_size=2),
    "pipeline stages": engine("two anchors", SETTINGS["two anchors"], **STAGES),
    "drafts of EAGLE": engine("5pct", SETTINGS["5pct"], speculative_config=drafter.CONFIG),
    "drafts of n-grams": engine("5pct", SETTINGS["5pct"], speculative_config=NGRAM),
}


@cache
def result(name):
    """What an engine made, in a process of its own; each rank takes what cores there are."""
    drafter.write(test_engine.model())
    env = os.environ | {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return test_engine.made([RUNS[name] | {"name": name}], env)[name]


@pytest.mark.parametrize("name", RUNS)
def test_an_engine_says_what_the_patched_model_says(name):
    assert result(name)["rounds"][0]["tokens"] == test_engine.expected(RUNS[name]["name"])
    assert result(name)["classes"] == ["visionpulse.serving.vllm.cpu.PulseImpl"]
