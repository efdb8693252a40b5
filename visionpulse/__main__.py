"""`python -m visionpulse <verb>`, the same as `visionpulse <verb>`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
