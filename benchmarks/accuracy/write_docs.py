"""Write the tables of the pages and the README from the rows that were measured."""

import re
from pathlib import Path

import acceptance
import claims
import correlate
import float8
import lossless
import reuse
import table

from visionpulse.files import write_text

ROOT = Path(__file__).resolve().parents[2]
PAGES = tuple(
    ROOT / page
    for page in (
        "docs/accuracy.md", "docs/internals/accuracy-tables.md", "docs/memory.md", "README.md",
        "docs/lossless.md", "docs/internals/lossless-acceptance.md",
    )
)  # fmt: skip
RESULTS = ROOT / "benchmarks" / "results"
TABLE, RETRAINED = "accuracy.jsonl", "accuracy-retrained.jsonl"
ACCEPTANCE = "accuracy-acceptance.jsonl"
# mark on a page: the files that its text is made of, and what makes it
PARTS = {
    "claims": ((TABLE,), claims.printed),
    "table": ((TABLE,), table.printed),
    "correlation": (("accuracy-correlation.jsonl",), correlate.printed),
    "retrained": ((TABLE, RETRAINED), claims.retrained),
    "reuse": (("accuracy-reuse.jsonl",), reuse.printed),
    "float8": (("accuracy-float8.jsonl",), float8.printed),
    "request": ((), float8.request),
    "tier": (("accuracy-reuse.jsonl",), reuse.tier),
    "evidence": ((TABLE,), claims.front),
    "lossless": (("accuracy-lossless.jsonl",), lossless.printed),
    "kinds": ((ACCEPTANCE,), acceptance.brief),
    "acceptance": ((ACCEPTANCE,), acceptance.printed),
}


def filled(page: str) -> str:
    """A page with each table between its marks, made from the committed rows."""
    for mark, (files, printed) in PARTS.items():
        text = printed(*(table.read(RESULTS / file) for file in files)).strip()
        text = f"<!-- {mark} -->\n{text}\n<!-- end -->"
        page = re.sub(rf"(?s)<!-- {mark} -->.*?<!-- end -->", lambda _, t=text: t, page)
    return page


if __name__ == "__main__":
    for page in PAGES:
        write_text(page, filled(page.read_text()))
