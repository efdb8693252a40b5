"""The methods that VisionPulse is compared with, for scripts that see their own folder alone."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
import methods

__all__ = ["methods"]
