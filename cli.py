"""Launcher for a bare checkout: `python cli.py …` is `qspin …`."""

from qspin.cli import main

if __name__ == "__main__":
    main()
