"""Planted faults, to see that the checks catch them: the kernels' text is edited at import."""

import importlib.util
import sys
import tempfile
from pathlib import Path

KERNELS = Path(__file__).resolve().parents[2] / "kernels" / "triton"
FAULTS = {
    # the first of several equal scores is skipped
    "ties": (
        "_radix",
        ("(n_equal_here < ties))", "(n_equal_here >= 1) & (n_equal_here <= ties))"),
        ("tl.minimum(n_equal_here, ties)", "tl.minimum(tl.maximum(n_equal_here - 1, 0), ties)"),
    ),
    # -0.0 sorts below +0.0
    "minus-zero": ("_radix", ("tl.where(size == 0, 0, bits", "tl.where(size < 0, 0, bits")),
    # a row is cut by the capacity of the cache
    "neighbours": ("score", ("split_of(end - begin,", "split_of(n_slots,")),
    # the last split merges the values of all without rescaling them
    "merge": ("_math", ("tl.exp(m_s - shift(m))[:, None] * part", "part")),
    # a query sees the key behind its own
    "tail": ("score", ("(n[None, :] < own_end[:, None])", "(n[None, :] <= own_end[:, None])")),
    # each query of a row follows the list of the first
    "list": ("attend", ("indices_ptr + row * k_max", "indices_ptr + b * n_queries * k_max")),
    # NaN of 8 bits is read as 480
    "nan": ("_float8", ("(((size + 1) & 0x80) << 7)", "0")),
    # every KV head takes the scale of the first
    "scale": ("_float8", ("tl.load(ptr + g * stride)", "tl.load(ptr)")),
    # the conversion by integers takes the NaN of an odd column for that of an even one
    "column": ("_float8", ("prmt.b32 nan, nan, 0, 0xaa88;", "prmt.b32 nan, nan, 0, 0xbb99;")),
    # bytes of e4m3 are converted one at a time, where the chip could take two
    "single": ("tuning", ("CHIP, INTEGERS, PLAIN = 1, 2, 3", "CHIP, INTEGERS, PLAIN = 3, 2, 3")),
    "tf32": (
        "score",
        ('tl.dot(q, tl.trans(k), input_precision="ieee")', "tl.dot(q, tl.trans(k))"),
    ),
    "spill": (
        "tuning",
        ("half=Tile(16384, 4, 3), full=Tile(16384, 8, 3)", "half=Tile(65536, 1, 1), full=None"),
    ),
    "unfenced": ("_math", ('sem="acq_rel"', 'sem="relaxed"')),
    "narrow": ("_host", ("unit = gcd(16 // kv.k_data.element_size(), *k, *v)", "unit = 1")),
}


def plant(name):
    """Load the faulty module in place of the right one."""
    module, *exchanges = FAULTS[name]
    text = (KERNELS / f"{module}.py").read_text()
    for right, wrong in exchanges:
        assert text.count(right) == 1, f"{right!r} is {text.count(right)} times in {module}.py"
        text = text.replace(right, wrong)
    path = Path(tempfile.mkdtemp()) / f"{module}.py"
    path.write_text(text)
    # the package without its modules: they import one another by name, and must find the fault
    full = "visionpulse._triton"
    spec = importlib.util.find_spec(full)
    package = importlib.util.module_from_spec(spec)
    sys.modules[full] = package
    faulty = importlib.util.spec_from_file_location(f"{full}.{module}", path)
    sys.modules[faulty.name] = importlib.util.module_from_spec(faulty)
    setattr(package, module, sys.modules[faulty.name])
    faulty.loader.exec_module(sys.modules[faulty.name])
    spec.loader.exec_module(package)
