"""LightZero 0.2.0: the adapter that puts the cache manager into its UniZero world model."""

from lzero_kv.lightzero.install import install, uninstall

__all__ = ['install', 'uninstall']
