"""Scores of models on benchmarks: metrics, tasks, runs, intervals and reports."""
