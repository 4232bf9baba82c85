"""What the benchmarks share: shapes, contestants, and instruments."""
