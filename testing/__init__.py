"""Slow references, real models and planted faults for tests, benchmarks and fuzzing; not in the wheel."""
