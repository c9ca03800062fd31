"""What a decoder is computed with: 4-bit layers with LoRA, attention over a packed row, and the kernels of backends."""
