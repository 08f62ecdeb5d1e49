"""`python -m qalora_compile`."""

from __future__ import annotations

import sys

from qalora_compile.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
