"""A sink taken apart: queries and keys, margin, what it writes, mass against value."""
