"""``python -m diffsal`` and ``torchrun -m diffsal``."""

from diffsal.cli.main import main

main()
