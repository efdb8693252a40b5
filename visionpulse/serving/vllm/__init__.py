"""The plugin of vLLM.

vllm serve MODEL --additional-config '{"visionpulse": {"preset": "10pct"}}'

Without that key vLLM runs exactly as it would without us.
"""


def register() -> None:
    """The `vllm.general_plugins` entry point: run in every process, perhaps more than once."""
    from . import compat

    compat.register()


def checked(model: str, flags: list[str]) -> list[str]:
    """The plan of `vllm serve MODEL ...`, line by line; raises what refuses it."""
    try:
        import vllm  # noqa: F401
    except ImportError as error:
        raise RuntimeError(
            "vllm is not installed here; run serve-check where `vllm serve` runs"
        ) from error
    from . import check

    return check.lines(model, flags)
