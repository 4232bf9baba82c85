"""Inference of a caching world model: roots, search trees, and the transformer over what they hold."""
