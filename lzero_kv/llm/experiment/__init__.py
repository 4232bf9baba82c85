"""Experiments: tasks, methods, scores, sweeps and their reports."""
