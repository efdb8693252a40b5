"""Every image-text-to-text type of transformers: what docs/families.md says of it is still so."""

import importlib.util
from pathlib import Path

import pytest
import transformers

HERE = Path(__file__).resolve().parent
_spec = importlib.util.spec_from_file_location("family_table", HERE / "family_table.py")
table = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(table)
COMMITTED = table.results()


def test_the_page_shows_what_is_committed():
    assert table.PAGE.read_text() == table.page()


def test_what_does_not_work_says_why():
    for found in COMMITTED.values():
        assert all(one.because for one in found.values())
        assert sum(table.counts(found).values()) == len(found) > 80


def test_families_of_the_matrix_are_among_those_that_work_with_pictures():
    from visionpulse.models.families import TESTED

    for found in COMMITTED.values():
        tested = [found[kind] for kind in TESTED if kind in found]  # pixtral is a part of llava's
        assert len(tested) >= len(TESTED) - 1
        assert all((one.outcome, one.because) == ("works", "pictures") for one in tested)


@pytest.mark.deep
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", table.kinds())
def test_a_type_is_as_the_page_says(kind):
    if transformers.__version__ not in COMMITTED:
        pytest.fail(f"no results of {transformers.__version__}: run tests/models/family_table.py")
    assert table.look(kind) == COMMITTED[transformers.__version__][kind]
