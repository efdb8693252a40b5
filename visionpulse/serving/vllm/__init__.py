"""The plugin of vLLM.

vllm serve MODEL --additional-config '{"visionpulse": {"preset": "10pct"}}'

Without that key vLLM runs exactly as it would without us.
"""


def register() -> None:
    """The `vllm.general_plugins` entry point: run in every process, perhaps more than once."""
    from . import compat

    compat.register()
