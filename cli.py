"""Launcher for a bare checkout: `python cli.py …` is `qspin …`."""

from qspin.__main__ import main

if __name__ == "__main__":
    main()
