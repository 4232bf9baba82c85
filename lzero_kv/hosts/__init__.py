"""Adapters, one folder per host. Only these know the world model they serve."""
