"""A pytest plugin that writes each test's fate as it happens, and junit made of that.

`pytest -p suite_log --suite-log FILE`: a line of JSON when a test begins and for each of its
reports, so that a suite which is killed has lost nothing, and what hung in it is known.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

KEPT = 6000  # characters of a traceback
NO_XML = re.compile(r"[^\t\n\r -\ud7ff\ue000-\ufffd]")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--suite-log", type=Path, help="file of lines to add to")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--suite-log")
    if path and not hasattr(config, "workerinput"):  # a process of pytest-xdist reports to its own
        config.pluginmanager.register(Log(path))


class Log:
    """Adds the lines, each flushed."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("a", buffering=1)

    def _write(self, test: str, **more: Any) -> None:
        self.file.write(json.dumps({"test": test, **more}) + "\n")

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._write(nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            text = "" if report.passed else str(report.longreprtext)[-KEPT:]
            self._write(report.nodeid, outcome=report.outcome, seconds=report.duration, text=text)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            text = str(report.longreprtext)[-KEPT:]
            self._write(report.nodeid, outcome="failed", seconds=0.0, text=text)


@dataclass
class Fate:
    """What is known of one test."""

    outcome: str = "hung"
    seconds: float = 0.0
    text: str = "it had begun when the suite was ended"


def fates(lines: Iterable[str]) -> dict[str, Fate]:
    """The last word on each test; one that began and said nothing is `hung`."""
    found: dict[str, Fate] = {}
    for line in lines:
        if not line.endswith("\n"):
            continue  # cut off by the kill
        said = json.loads(line)
        fate = found.setdefault(said["test"], Fate())
        outcome = said.get("outcome")
        if outcome in ("passed", "failed", "skipped") and fate.outcome != "failed":
            fate.outcome, fate.seconds, fate.text = outcome, said["seconds"], said["text"]
    return found


def junit(suites: dict[str, dict[str, Fate]]) -> str:
    """The suites as one junit file; a test that hung is an error."""
    root = ElementTree.Element("testsuites")
    kinds = {"failed": "failure", "skipped": "skipped", "hung": "error"}
    for name, tests in suites.items():
        outcomes = [fate.outcome for fate in tests.values()]
        words = {"failed": "failures", "hung": "errors", "skipped": "skipped"}
        counts = {word: str(outcomes.count(outcome)) for outcome, word in words.items()}
        about = {"name": name, "tests": str(len(tests)), **counts}
        suite = ElementTree.SubElement(root, "testsuite", about)
        for test, fate in tests.items():
            path, _, short = test.partition("::")
            place = {"classname": path.removesuffix(".py").replace("/", "."), "name": short}
            one = ElementTree.SubElement(suite, "testcase", place, time=f"{fate.seconds:.3f}")
            if kind := kinds.get(fate.outcome):
                text = NO_XML.sub("?", fate.text).strip()
                ElementTree.SubElement(one, kind, message=text.rpartition("\n")[2]).text = text
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode") + "\n"
