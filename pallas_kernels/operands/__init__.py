"""Operands of the tensor cores: rows of x in float16, and weights looked up in a table."""
