"""The machine code of the Triton kernels on sm_90: loads in flight, barriers behind an arrival."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from proof_tools import version_of

pytestmark = [
    pytest.mark.deep,
    pytest.mark.skipif(version_of("triton") is None, reason="no Triton"),
]


class Limit(NamedTuple):
    copying_loops: int  # loops whose loads are copies in a pipeline: at least so many
    instructions: (
        int  # of a warp in one step of the longest of them, at most: 64 keys, or 4096 codes
    )
    barriers: int  # in the code behind the arrival, at most
    looped: int  # of them in loops: each step of a loop meets them again


# With Triton 3.6; a loop of loads that wait for each other is nowhere. Each reduction of a block
# takes barriers, and select reduces in every step of its passes.
LIMITS = {
    "dense score_kernel": Limit(2, 454, 18, 2),
    "decode score_kernel": Limit(1, 513, 19, 0),
    "decode select_kernel": Limit(2, 458, 26, 13),
    "decode attend_kernel": Limit(2, 462, 18, 2),
    "follow attend_kernel": Limit(2, 532, 18, 2),
    # as many for half of the bytes
    "dense score_kernel, 8 bits": Limit(2, 453, 18, 2),
    "decode score_kernel, 8 bits": Limit(1, 492, 19, 0),
    "decode select_kernel, 8 bits": Limit(2, 458, 26, 13),
    "decode attend_kernel, 8 bits": Limit(2, 491, 18, 2),
    "follow attend_kernel, 8 bits": Limit(2, 505, 18, 2),
}
PINNED = "3.6."


def test_triton_kernels_keep_their_loads_in_flight_and_their_barriers_few():
    command = [sys.executable, "-m", "machine_code.triton_kernels"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    done = subprocess.run(
        command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert set(found) == set(LIMITS)
    pinned = (version_of("triton") or "").startswith(PINNED)
    for name, limit in LIMITS.items():
        of = found[name]
        assert of["serial loops"] == 0, name
        assert of["copying loops"] >= limit.copying_loops, name
        if pinned:  # another one schedules and reduces otherwise
            assert of["instructions"] <= limit.instructions, name
            assert of["barriers"] <= limit.barriers, name
            assert of["barriers in loops"] <= limit.looped, name
