"""Experiments, one file each; `python -m distill.run experiments` lists them."""
