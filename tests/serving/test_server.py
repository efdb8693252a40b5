"""A server as people use it: eight clients that stream, one that dies, metrics, a restart."""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import environment
from server import Server

pytestmark = pytest.mark.deep
ROOT = Path(__file__).resolve().parents[2]
SETTING = {"preset": "5pct"}


@pytest.fixture(scope="module")
def model():
    sys.path.insert(0, str(ROOT / "examples" / "serving"))
    import tiny_model

    return tiny_model.main(ROOT / "build" / "tiny-vllm")


def command(server, **options):
    client = Path(__file__).with_name("client.py")
    return [str(environment.python()), str(client), json.dumps({"url": server.url, **options})]


def asked(server, **options):
    done = subprocess.run(command(server, **options), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:] + server.log.read_text()[-3000:]
    return json.loads(done.stdout)


@pytest.fixture
def scratch(monkeypatch):
    """A server's own temporary folder, of a short name: that of a socket in it has a bound."""
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setenv("TMPDIR", folder)
        yield Path(folder)


def test_eight_clients_a_dead_one_and_a_restart(model, tmp_path, scratch):
    with Server(model, SETTING, tmp_path / "first.log") as server:
        said = asked(server, clients=8, questions=16)
        assert all(said["right"]) and sum(said["words"]) > 200

        # each answer's first token is prefill's; vLLM says how many it made in all
        made = server.metrics()["vllm:generation_tokens_total"] - 16
        rows = server.until("visionpulse:decode_rows_total", lambda n: n == made)
        seen = server.metrics()
        visual, kept = (seen[f"visionpulse:{name}_tokens_total"] for name in ("visual", "kept"))
        assert visual == 400 * rows  # one anchor a step, pictures of 20 by 20
        assert 0.01 <= kept / visual <= 0.05
        assert seen["visionpulse:retention_count"] == seen["visionpulse:mass_count"] == rows
        assert 0 < seen["visionpulse:mass_sum"] < rows
        assert [*scratch.glob("visionpulse-*")]  # what workers wrote, until it ends

        with subprocess.Popen(command(server, stream=True), stdout=subprocess.PIPE) as client:
            assert client.stdout.readline() == b"word\n"  # it is halfway
            assert server.metrics()["vllm:num_requests_running"] == 1
            client.kill()
        server.until("vllm:num_requests_running", lambda n: n == 0)
        assert all(asked(server, clients=2, questions=2)["right"])

        off = {"vllm_xargs": {"visionpulse": "off"}}
        was = server.metrics().get("visionpulse:dense_rows_total", 0.0)
        assert all(asked(server, clients=2, questions=2, extra=off)["right"])
        server.until("visionpulse:dense_rows_total", lambda n: n > was)

        wrong = {"vllm_xargs": {"visionpulse": "6pct"}}
        said = asked(server, refused=True, extra=wrong)
        assert said["status"] == 400 and "a preset (" in said["said"] and "'6pct'" in said["said"]
        assert server.stop() == 0
    assert not [*scratch.glob("visionpulse-*")]

    with Server(model, SETTING, tmp_path / "second.log") as server:
        assert server.metrics().get("visionpulse:decode_rows_total", 0.0) == 0
        assert all(asked(server, clients=8, questions=8)["right"])
        assert server.stop() == 0


def test_two_engines_and_two_api_servers_answer_and_count_together(model, tmp_path, monkeypatch):
    """Data parallelism: engines share nothing, and every API server shows the series of both."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # two on the cores there are
    flags = ("--data-parallel-size", "2", "--api-server-count", "2")
    with Server(model, SETTING, tmp_path / "two.log", *flags) as server:
        said = asked(server, clients=8, questions=16)
        assert all(said["right"])
        made = server.metrics()["vllm:generation_tokens_total"] - 16
        assert server.until("visionpulse:decode_rows_total", lambda n: n == made) > 0
        engines = set(re.findall(r'decode_rows_total\{.*engine="(\d)"', server.get("/metrics")))
        assert engines == {"0", "1"}
        assert server.stop() == 0
