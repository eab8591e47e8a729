"""Real architectures, tiny and random, and two pretrained models from their packages."""
