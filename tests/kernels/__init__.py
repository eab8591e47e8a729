"""Tests of kernels/: numbers in Triton's interpreter, code compiled ahead of time, and the same numbers on a GPU."""
