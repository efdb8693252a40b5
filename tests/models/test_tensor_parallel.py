"""Two gloo processes that split the heads give the K, indices and tokens of one."""

import os
import subprocess
import sys

import pytest
import torch

import visionpulse as vp

pytest.importorskip("accelerate")

CONFIGS = {
    "max": vp.PulseConfig(tau=0.5, ratio=(0.05, 0.4)),
    "mean": vp.PulseConfig(tau=0.5, ratio=(0.05, 0.4), mass="mean", score="logit"),
    "8-bits": vp.PulseConfig(tau=0.5, ratio=(0.05, 0.4), cache="fp8"),
    "dense-anchor": vp.PulseConfig(tau=0.5, ratio=(0.05, 0.4), anchor_output="dense"),
}

# One rank: load the sharded model, generate under each config, keep what it did.
RANK = """
import sys
import torch
import torch.distributed as dist
from transformers import AutoModelForImageTextToText, CompileConfig
from transformers.distributed import DistributedConfig
import visionpulse as vp

torch.set_num_threads(1)
dist.init_process_group("gloo")
for folder in sys.argv[1:]:
    inputs, configs = torch.load(folder + "/inputs.pt", weights_only=False)
    model = AutoModelForImageTextToText.from_pretrained(
        folder, distributed_config=DistributedConfig(tp_plan="auto"), dtype=torch.float32
    ).eval()
    results = {}
    for name, config in configs.items():
        with vp.patch(model, config, record=True) as session:
            assert session.patched.heads is not None
            tokens = model.generate(**inputs)
            results[name] = tokens, [(e.selection.indices, e.selection.counts) for e in
                                  session.recorder.entries]
    if folder.endswith("llava"):
        graph = CompileConfig(fullgraph=True, dynamic=False, mode=None, backend="aot_eager")
        graph._compile_all_devices = True
        with vp.patch(model, configs["max"]) as session:
            results["compiled"] = model.generate(
                **inputs, cache_implementation="static", compile_config=graph
            )
            assert session.stats.steps == 7
    torch.save(results, f"{folder}/rank{dist.get_rank()}.pt")
dist.destroy_process_group()
"""


def one_process(vlm, folder):
    """What the whole model does, left with its weights for the ranks to repeat."""
    inputs = vlm.inputs([9, "i", 6, "i", 3], [4, "i", 5])
    inputs |= {"do_sample": False, "max_new_tokens": 8, "suppress_tokens": [150, 151, 152, 153]}
    expected = {}
    for name, config in CONFIGS.items():
        with vp.patch(vlm.model, config, record=True) as session:
            tokens = vlm.model.generate(**inputs)
            kept = [(e.selection.indices, e.selection.counts) for e in session.recorder.entries]
        expected[name] = tokens, kept
    vlm.model.save_pretrained(folder)
    torch.save((inputs, CONFIGS), folder / "inputs.pt")
    return expected


@pytest.mark.deep  # three processes that import everything
def test_two_ranks_keep_what_one_process_keeps(tiny, tmp_path):
    folders = {family: tmp_path / family for family in ("llava", "qwen2_5_vl")}
    expected = {family: one_process(tiny(family), folder) for family, folder in folders.items()}
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2",
        "--master-port=0", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0",
        str(script), *map(str, folders.values()),
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    for family, folder in folders.items():
        for rank in range(2):
            result = torch.load(folder / f"rank{rank}.pt", weights_only=False)
            for name, (tokens, kept) in expected[family].items():
                mine, selections = result[name]
                assert torch.equal(mine, tokens), (family, name)
                assert len(selections) == len(kept) == 7
                for (indices, counts), (wanted, want) in zip(selections, kept, strict=True):
                    assert torch.equal(counts, want), (family, name)
                    assert torch.equal(indices, wanted), (family, name)
            if family == "llava":  # the reduction is part of the graph
                assert torch.equal(result["compiled"], expected[family]["max"][0])
