"""Tests against a real LightZero installation: real policies, real models, the real compiled tree search."""
