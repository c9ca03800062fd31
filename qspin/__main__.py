"""`qspin`, `python -m qspin`, and what starts several processes is given: `accelerate launch … -m qspin run …`."""

from qspin.stopping import heed_stops


def main() -> None:
    """The console script. Ctrl-C is heeded before the command line is imported, which takes a moment."""
    heed_stops()
    from qspin import cli

    cli.main()


if __name__ == "__main__":
    main()
