"""Every Python block of docs/ runs, in order; links and commands name things that exist."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from visionpulse import cli

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGES = sorted(DOCS.rglob("*.md"))


def fenced(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.S | re.M)


@pytest.mark.parametrize("page", [p for p in PAGES if fenced(p, "python")], ids=lambda p: p.stem)
def test_the_blocks_run(page, tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    if "trace.plot" in page.read_text():
        pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in fenced(page, "python"):
        exec(compile(code, page.name, "exec"), names)
    assert "print(" not in page.read_text() or capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def commands():
    for page in PAGES:
        text = "\n".join(fenced(page, "sh") + fenced(page, ""))
        inline = re.findall(r"`(visionpulse [a-z]+[^`]*)`", page.read_text())
        for line in [*text.replace("\\\n", " ").splitlines(), *inline]:
            if line.startswith("visionpulse "):
                yield pytest.param(shlex.split(line)[1:], id=line[:50])


@pytest.mark.parametrize("words", list(commands()))
def test_commands_are_verbs_with_options_that_exist(words, capsys, monkeypatch):
    verb, options = words[0], [w for w in words[1:] if w.startswith("-") and w != "--"]
    assert verb in cli.VERBS, f"visionpulse has no verb {verb}"
    with pytest.raises(SystemExit) as ended:
        cli.main([verb, "--help"])
    assert ended.value.code == 0
    known = capsys.readouterr().out
    before_program = options if "--" not in words else words[1 : words.index("--")]
    for option in (o for o in before_program if o.startswith("-")):
        assert option in known, f"visionpulse {verb} has no option {option}"


def test_presets_of_the_page_are_the_presets():
    import visionpulse as vp

    text = (DOCS / "presets.md").read_text()
    for name, config in vp.PRESETS.items():
        if config.schedule == "dense":
            assert f'`"{name}"` prunes nothing' in text
            continue
        low, high = (f"{100 * ratio:g} %" for ratio in config.ratio)
        assert re.search(rf'\| `"{name}"`[^|]*\| {config.tau} \| {low} to {high} \|', text)


def test_every_field_of_the_config_is_explained():
    import dataclasses

    import visionpulse as vp

    text = (DOCS / "presets.md").read_text()
    explained = set(re.findall(r"^\| `(\w+)` \|", text, re.M))
    # two fields are for measurements, not for users of a preset
    assert {f.name for f in dataclasses.fields(vp.PulseConfig)} - explained <= {"refresh", "dense"}


SITE = DOCS.parent / "mkdocs.yml"


def test_every_page_is_on_the_site():
    named = set(re.findall(r"(?:- |: )([\w/-]+\.md)$", SITE.read_text(), re.M))
    assert named == {str(page.relative_to(DOCS)) for page in PAGES}


@pytest.mark.deep
def test_the_site_is_built_and_asks_nothing_of_other_hosts(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=SITE.parent, capture_output=True, text=True,
                          env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > len(PAGES)  # and the page of a missing one
    fetched = r"<(?:script|img|link|iframe)[^>]*(?:src|href)=\"?(https?://[^\"> ]+)"
    assert not [found for page in pages for found in re.findall(fetched, page.read_text())]
    reference = (tmp_path / "api.html").read_text()
    for name in ("patch", "PulseConfig", "decode", "attend", "KVCache", "VisualTokens", "TopK"):
        assert name in reference, f"the reference lacks {name}"
