"""Asking a model every question of a benchmark, and keeping what it said."""
