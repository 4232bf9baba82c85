"""Interval estimates over seeds and documents."""
