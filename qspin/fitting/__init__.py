"""How much fits: a model's shape, what it takes of memory, and how much memory there is."""
