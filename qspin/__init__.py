"""qspin: self-play fine-tuning (SPIN, arXiv 2401.01335) on one consumer GPU, or on a laptop's CPU."""

__version__ = "0.1.0"
