"""Key-value caches for UniZero world models.

The core (pools, manager, layout) knows no host program; :func:`install` loads it when it is called.
"""

from __future__ import annotations

from lzero_kv.cache.eviction import EvictionStrategy
from lzero_kv.cache.layout import KVLayout
from lzero_kv.cache.manager import KVCacheManager
from lzero_kv.cache.pool import KVCachePool
from lzero_kv.cache.stats import CacheStats
from lzero_kv.config import KVCacheConfig

__all__ = [
    'CacheStats',
    'EvictionStrategy',
    'KVCacheConfig',
    'KVCacheManager',
    'KVCachePool',
    'KVLayout',
    'install',
    'uninstall',
]


def install() -> None:
    """Put the cache manager behind LightZero's ``use_new_cache_manager`` flag."""
    from lzero_kv.lightzero import install as install_host

    install_host()


def uninstall() -> None:
    """Leave LightZero as it was before :func:`install`."""
    from lzero_kv.lightzero import uninstall as uninstall_host

    uninstall_host()
