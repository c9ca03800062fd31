"""qspin: self-play fine-tuning (SPIN, arXiv 2401.01335) on one consumer GPU, or on a laptop's CPU."""

import logging

__version__ = "0.1.0"

# bitsandbytes says at each import that an optional kernel from the hub is not installed
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
