"""Run the command line: ``python -m lightning_optim`` does what ``lightning-optim`` does."""

from __future__ import annotations

import sys

from lightning_optim.cli import main

if __name__ == "__main__":
    sys.exit(main())
