"""A run under way: what its phases share, and each of them."""
