"""Kernels with one public door each (`api.py`): arrays in, arrays out, no model code."""
