"""The compiled module is used only with the sources it was built from; else one line says so."""

import shutil
import warnings
from types import SimpleNamespace

import pytest
import torch

import visionpulse as vp
from visionpulse import _native, backends

SOURCE = "csrc/cpu/bind.h"


@pytest.fixture
def stale(monkeypatch, tmp_path):
    """A checkout whose binding was changed after the module was built."""
    shutil.copytree(_native._ROOT / "csrc", tmp_path / "csrc")
    with (tmp_path / SOURCE).open("a") as file:
        file.write("// changed\n")
    monkeypatch.setattr(_native, "_ROOT", tmp_path)
    _native._load.cache_clear()
    backends._say_slow.cache_clear()
    yield
    _native._load.cache_clear()
    backends._say_slow.cache_clear()


def decode(**options):
    q, kv = torch.ones(1, 2, 16), vp.KVCache(torch.ones(1, 1, 8, 16), torch.ones(1, 1, 8, 16))
    return vp.decode(q, kv, vp.VisualTokens.from_spans([[(1, 5)]]), **options)


def test_a_module_that_fits_its_sources_is_used():
    assert _native.failure() is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode()


def test_a_module_older_than_its_sources_is_refused_in_one_line(stale):
    said = vp.backends()["cpu"]
    assert SOURCE in said and "pip install" in said and "\n" not in said
    with pytest.raises(vp.BackendUnavailableError, match=SOURCE):
        decode(backend="cpu")
    with pytest.raises(ImportError, match=SOURCE):
        _native.module()


def test_a_torch_that_shows_its_tensors_in_another_way_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(_native, "torch", SimpleNamespace(Tensor=int, __version__="9.0"))
    _native._load.cache_clear()
    try:
        said = vp.backends()["cpu"]
    finally:
        _native._load.cache_clear()
    assert "torch 9.0" in said and "DLPack" in said and "pip install" in said and "\n" not in said


def test_where_no_kernels_can_be_used_it_is_said_once_that_decoding_is_slow(stale):
    with pytest.warns(UserWarning, match=f"slow.*{SOURCE}.*pip install"):
        decode()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode()


def test_a_module_that_names_no_binding_is_older_than_any_checkout():
    unnamed = type("Module", (), {})
    assert _native._changed(unnamed) == "csrc/cpu/bind.h"


def test_an_installed_module_without_sources_beside_it_is_taken(monkeypatch, tmp_path):
    monkeypatch.setattr(_native, "_ROOT", tmp_path)
    assert _native._changed(type("Module", (), {"binding": "csrc/cpu/bind.h:0"})) is None
