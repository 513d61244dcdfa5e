"""``python -m diffsal`` and ``torchrun -m diffsal``."""

from diffsal.cli import main

main()
