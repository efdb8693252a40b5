"""The page of a trace, opened in a real browser: clicked, hovered over, and without a network."""

import json
import os
import shutil
import subprocess

import numpy as np
import pytest

from visionpulse.models import Trace
from visionpulse.trace.layout import PictureGrid
from visionpulse.trace.page import png

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--no-first-run", "--remote-debugging-pipe",
    "--window-size=1200,1000", "--force-device-scale-factor=1",
)  # fmt: skip


def trace_of(kept_by_step, spans, layers=(2,), rows=1, mass=None):
    """A trace of one conversation; `kept_by_step` are positions, the same for every layer."""
    columns = {name: [] for name in ("step", "layer", "row", "token", "mass")}
    positions, ends = [], []
    for step, kept in enumerate(kept_by_step):
        for layer in layers:
            for row in range(rows):
                values = (step, layer, row, 10 + step, mass[step] if mass else 0.25)
                for name, value in zip(columns, values, strict=True):
                    columns[name].append(value)
                positions += kept
                ends.append(len(positions))
    total = sum(end - begin for begin, end in spans)
    ints = {name: np.array(columns[name]) for name in ("step", "layer", "row", "token")}
    n = len(ends)
    return Trace(
        conversation=np.zeros(n, np.int64), **ints, n_visual=np.full(n, total),
        mass=np.array(columns["mass"], float), mass_mean=np.array(columns["mass"], float) / 2,
        ends=np.array(ends), positions=np.array(positions),
        spans={(0, row): list(spans) for row in range(rows)},
        about={"model": "tiny", "config": {"tau": "0.4", "ratio": "(0.05, 0.1)"},
               "anchors": list(layers), "layers": 6},
    )  # fmt: skip


class Browser:
    """Chromium over its debugging pipe: file descriptor 3 in, 4 out, messages end with a zero."""

    def __init__(self, profile):
        to_child, self._write = os.pipe()
        self._read, from_child = os.pipe()
        # descriptors 3 and 4 of the child; the shell moves them there
        command = f"exec 3<&{to_child} 4>&{from_child}; exec {CHROMIUM} "
        command += " ".join((*FLAGS, f"--user-data-dir={profile}", "about:blank"))
        self._process = subprocess.Popen(
            ["bash", "-c", command], pass_fds=(to_child, from_child),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_child)
        os.close(from_child)
        self._rest, self._number, self.events = b"", 0, []
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(t["targetId"] for t in targets if t["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=page, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    _session = None

    def call(self, method, **params):
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def _next(self):
        while b"\0" not in self._rest:
            part = os.read(self._read, 1 << 16)
            assert part, "the browser went away"
            self._rest += part
        message, self._rest = self._rest.split(b"\0", 1)
        return json.loads(message)

    def open(self, path):
        self.call("Page.navigate", url=f"file://{path}")
        while not any(e.get("method") == "Page.loadEventFired" for e in self.events):
            self.events.append(self._next())
        self.run("new Promise(done => requestAnimationFrame(() => setTimeout(done, 50)))")

    def run(self, code):
        made = self.call("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in made, made
        return made["result"].get("value")

    def mouse(self, kind, x, y):
        button = "left" if "moved" not in kind.lower() else "none"
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button=button, clickCount=1)

    def click(self, x, y):
        self.mouse("mousePressed", x, y)
        self.mouse("mouseReleased", x, y)

    def box(self, selector):
        return json.loads(
            self.run(
                f"(() => {{ const e = document.querySelector({selector!r});"
                "e.scrollIntoView({block: 'center'});"
                "return JSON.stringify(e.getBoundingClientRect()); })()"
            )
        )

    def pixel(self, index, x, y):
        """The colour of a picture's canvas at a share of its width and height."""
        return self.run(
            f"(() => {{ const c = document.querySelectorAll('#pictures canvas')[{index}];"
            f"return Array.from(c.getContext('2d').getImageData("
            f"Math.round({x} * c.width), Math.round({y} * c.height), 1, 1).data); }})()"
        )

    def screenshot(self, path):
        import base64

        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(data["data"]))

    def close(self):
        os.close(self._write)
        self._process.terminate()
        self._process.wait(20)
        os.close(self._read)


@pytest.fixture
def browser(tmp_path):
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine: the page was not opened")
    found = Browser(tmp_path / "profile")
    yield found
    found.close()


def pictures():
    """Two pictures: a white one of 4 x 4 tokens, a red one of 2 x 3."""
    white = np.full((64, 64, 3), 255, np.uint8)
    red = np.zeros((40, 60, 3), np.uint8)
    red[..., 0] = 200
    return [PictureGrid(4, 4, white, "first"), PictureGrid(2, 3, red, "second")]


def text(browser, name):
    return browser.run(f"document.getElementById({name!r}).textContent")


def test_a_person_can_walk_through_the_steps(browser, tmp_path):
    # positions 5..20 are the first picture, 30..35 the second
    steps = [[5, 20], [6], [30, 35], [5, 31]]
    trace = trace_of(steps, [(5, 21), (30, 36)], mass=[0.1, 0.2, 0.9, 0.4])
    out = trace.to_html(tmp_path / "page.html", pictures=pictures(), tokenizer=lambda t: f"<{t}>")
    browser.open(out)

    assert text(browser, "n-step") == "1 of 4"
    assert text(browser, "n-token") == "<10>" and text(browser, "n-next") == "<11>"
    assert text(browser, "n-kept") == "2 of 22 (9.1 %)"
    assert text(browser, "n-mass") == "0.100"
    # the first and the last cell of the white picture are bright, all else is dark
    assert min(browser.pixel(0, 1 / 8, 1 / 8)[:3]) == 255
    assert min(browser.pixel(0, 7 / 8, 7 / 8)[:3]) == 255
    assert max(browser.pixel(0, 3 / 8, 1 / 8)[:3]) < 90
    assert max(browser.pixel(1, 1 / 6, 1 / 4)[:3]) < 90

    # click on the chart at the third of four steps
    box = browser.box("#chart")
    browser.click(box["x"] + 34 + (box["width"] - 74) * 2.5 / 4, box["y"] + 60)
    assert text(browser, "n-step") == "3 of 4" and text(browser, "n-mass") == "0.900"
    assert browser.pixel(1, 1 / 6, 1 / 4)[:3] == [200, 0, 0]
    assert max(browser.pixel(0, 1 / 8, 1 / 8)[:3]) < 90

    # click on the last token, then move the slider by key
    box = browser.box("#text .token:last-child")
    browser.click(box["x"] + 4, box["y"] + 4)
    assert text(browser, "n-step") == "4 of 4" and text(browser, "n-next") == "(last)"
    browser.run("document.getElementById('step').focus()")
    for kind in ("keyDown", "keyUp"):
        browser.call("Input.dispatchKeyEvent", type=kind, key="ArrowLeft", code="ArrowLeft",
                     windowsVirtualKeyCode=37)  # fmt: skip
    assert text(browser, "n-step") == "3 of 4"


def test_hovering_names_the_token(browser, tmp_path):
    trace = trace_of([[5, 20], [5], [30]], [(5, 21), (30, 36)])
    browser.open(trace.to_html(tmp_path / "page.html", pictures=pictures()))
    canvas = browser.box("#pictures canvas")
    browser.mouse("mouseMoved", canvas["x"] + 5, canvas["y"] + 5)
    assert text(browser, "tip") == (
        "visual token 0, row 0, column 0\nkept in this step, kept in 2 of 3 steps"
    )
    assert browser.run("getComputedStyle(document.getElementById('tip')).display") == "block"
    second = browser.run(
        "(() => { const b = document.querySelectorAll('#pictures canvas')[1]"
        ".getBoundingClientRect(); return [b.x + b.width - 4, b.y + 4]; })()"
    )
    browser.mouse("mouseMoved", *second)
    assert text(browser, "tip").startswith("visual token 18, row 0, column 2\nnot kept")


def test_the_heat_map_counts_steps(browser, tmp_path):
    trace = trace_of([[5, 20], [5], [30]], [(5, 21), (30, 36)])
    browser.open(trace.to_html(tmp_path / "page.html", pictures=pictures()))
    browser.run("(() => { const m = document.getElementById('mode'); m.value = 'all';"
                "m.dispatchEvent(new Event('change')); })()")  # fmt: skip
    often, once, never = (browser.pixel(0, x, y)[:3] for x, y in
                          ((1 / 8, 1 / 8), (7 / 8, 7 / 8), (3 / 8, 1 / 8)))  # fmt: skip
    assert often != once and once != never and often != never
    assert max(browser.pixel(1, 1 / 6, 1 / 4)[:3]) > 150  # kept in a later step than this one


def test_layers_and_rows_can_be_chosen(browser, tmp_path):
    trace = trace_of([[5], [6, 7]], [(5, 21)], layers=(2, 4), rows=2)
    browser.open(trace.to_html(tmp_path / "page.html"))
    for name, wanted in (("layer", ["2", "4"]), ("row", ["0", "1"])):
        values = browser.run(f"Array.from(document.getElementById({name!r}).options, o => o.value)")
        assert values == wanted
    browser.run("(() => { const s = document.getElementById('row'); s.value = '1';"
                "s.dispatchEvent(new Event('change')); })()")  # fmt: skip
    assert text(browser, "n-kept") == "1 of 16 (6.3 %)"


def test_thousands_of_tokens_and_hundreds_of_steps(browser, tmp_path):
    random = np.random.default_rng(0)
    kept = [sorted(random.choice(4096, 400, replace=False).tolist()) for _ in range(300)]
    trace = trace_of(kept, [(0, 4096)])
    pixels = random.integers(0, 255, (896, 896, 3)).astype(np.uint8)
    out = trace.to_html(tmp_path / "page.html", pictures=[PictureGrid(64, 64, pixels)])
    browser.open(out)
    begun = browser.run("performance.now()")
    browser.run("for (let i = 0; i < 300; i++) go(i)")
    assert text(browser, "n-step") == "300 of 300"
    assert text(browser, "n-kept") == "400 of 4096 (9.8 %)"
    # a person moving the slider must not wait: a second is far above what 300 redraws need
    assert (browser.run("performance.now()") - begun) / 300 < 1000


def test_the_page_asks_nothing_of_a_network_and_reports_no_error(browser, tmp_path):
    trace = trace_of([[5, 20], [6]], [(5, 21), (30, 36)])
    browser.open(trace.to_html(tmp_path / "page.html", pictures=pictures()))
    browser.run("go(1)")
    asked = [e["params"]["request"]["url"] for e in browser.events
             if e.get("method") == "Network.requestWillBeSent"]  # fmt: skip
    assert asked and all(url.startswith(("file:", "data:")) for url in asked), asked
    wrong = [e for e in browser.events
             if e.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded")]  # fmt: skip
    assert not wrong, wrong


def test_text_of_a_model_cannot_break_out_of_the_page(tmp_path):
    trace = trace_of([[5]], [(5, 21)])
    evil = "</script><script>alert(1)</script>"
    out = trace.to_html(tmp_path / "page.html", tokenizer=lambda t: evil, title=evil)
    page = out.read_text()
    assert page.count("</script>") == 1 and "alert(1)" in page


def test_a_png_reads_back(tmp_path):
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 255, (7, 11, 3)).astype(np.uint8)
    (tmp_path / "a.png").write_bytes(png(pixels))
    with image.open(tmp_path / "a.png") as read:
        assert np.array_equal(np.asarray(read), pixels)


def test_pictures_must_hold_the_visual_tokens():
    trace = trace_of([[5]], [(5, 21)])
    with pytest.raises(ValueError, match="has 16 visual tokens, the pictures given have 3 x 5"):
        list(trace.layouts([PictureGrid(3, 5)]))
    with pytest.raises(ValueError, match="holds no step"):
        list(trace_of([], [(5, 21)]).layouts())


def test_a_saved_trace_is_drawn_the_same(tmp_path):
    trace = trace_of([[5, 20], [30]], [(5, 21), (30, 36)])
    trace.save(tmp_path / "trace.npz")
    pages = [
        which.to_html(tmp_path / f"{name}.html", pictures=pictures()).read_text()
        for name, which in (("a", trace), ("b", Trace.load(tmp_path / "trace.npz")))
    ]
    assert pages[0] == pages[1]
