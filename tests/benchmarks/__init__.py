"""Tests of the benchmarks' instruments and shapes; nothing here is timed."""
