"""`python -m qspin`, and what a launcher of several processes is given: `accelerate launch … -m qspin run …`."""

from qspin.cli import main

main()
