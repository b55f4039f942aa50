"""References and checks behind :func:`sinklens.check_model`: every function against its formula, written out."""
