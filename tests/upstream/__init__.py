"""Tests that need LightZero's git main."""
