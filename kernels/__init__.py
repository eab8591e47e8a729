"""Kernel families: FAMILY.py has the reference, the operator and when it is used, FAMILY_triton.py the Triton code."""
