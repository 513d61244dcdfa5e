"""``python -m diffsal`` and ``torchrun -m diffsal``."""

from diffsal.cli.main import main

if __name__ == "__main__":
    main()
