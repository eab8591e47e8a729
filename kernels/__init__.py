"""Kernel families: one file each, with its plain-torch reference."""
