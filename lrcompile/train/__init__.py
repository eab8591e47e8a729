"""The training driver: a typed config, data, optimizers, checkpoints and the loop, over the public API and torch.distributed."""
