"""What tests and benchmarks share: named cases, the tolerance table, properties, timing."""

from .cases import (
    CASES,
    FLOAT8_CASES,
    FLOAT8_QUERY_CASES,
    QUERY_CASES,
    Case,
    Half,
    Problem,
    Scales,
)
from .compare import (
    assert_clear_error,
    assert_masses,
    assert_output,
    assert_scores,
    assert_valid_selection,
)

__all__ = [
    "CASES",
    "FLOAT8_CASES",
    "FLOAT8_QUERY_CASES",
    "QUERY_CASES",
    "Case",
    "Half",
    "Problem",
    "Scales",
    "assert_clear_error",
    "assert_masses",
    "assert_output",
    "assert_scores",
    "assert_valid_selection",
]
