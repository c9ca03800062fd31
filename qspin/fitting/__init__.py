"""How much fits: a model's shape, what it takes in memory and how much work it is, and how much memory there is."""
