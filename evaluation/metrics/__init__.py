"""Metrics as plain functions. Where a benchmark has a scorer of its own, the numbers are that scorer's, oddities included."""
