"""A finished run, taken elsewhere: adapters, merged models, GGUF files, cards, the Hub."""
