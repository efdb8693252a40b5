"""Write the tables of docs/accuracy.md from the rows that were measured."""

import json
import re
from pathlib import Path

import correlate
import table

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "accuracy.md"
RESULTS = ROOT / "benchmarks" / "results"
PARTS = {
    "table": ("accuracy.jsonl", table.printed),
    "correlation": ("accuracy-correlation.jsonl", correlate.printed),
}


def filled(page: str) -> str:
    """The page with each table between its marks, made from the committed rows."""
    for mark, (file, printed) in PARTS.items():
        rows = [json.loads(line) for line in (RESULTS / file).read_text().splitlines()]
        text = f"<!-- {mark} -->\n{printed(rows).strip()}\n<!-- end -->"
        page = re.sub(rf"(?s)<!-- {mark} -->.*?<!-- end -->", lambda _, t=text: t, page)
    return page


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
