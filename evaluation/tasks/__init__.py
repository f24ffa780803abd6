"""Benchmarks: what is asked, about which media, and how answers are scored."""
