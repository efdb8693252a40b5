"""What tests and benchmarks share: named cases, the tolerance table, properties, timing."""

from .cases import CASES, QUERY_CASES, Case, Problem
from .compare import (
    assert_clear_error,
    assert_masses,
    assert_output,
    assert_scores,
    assert_valid_selection,
)

__all__ = [
    "CASES",
    "QUERY_CASES",
    "Case",
    "Problem",
    "assert_clear_error",
    "assert_masses",
    "assert_output",
    "assert_scores",
    "assert_valid_selection",
]
