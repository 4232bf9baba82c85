"""LightZero 0.2.0 and its git main: the adapter that puts the cache manager into their UniZero world
model."""

from lzero_kv.lightzero.install import install, uninstall

__all__ = ['install', 'uninstall']
