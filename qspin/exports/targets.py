"""What an iteration is exported as, and onto which weights of its base; see export.py. Free of torch."""

from __future__ import annotations

from typing import Literal

Target = Literal["adapter", "merged-16bit", "merged-4bit", "gguf", "ollama"]
Onto = Literal["original", "dequantised"]
