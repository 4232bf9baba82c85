"""Key-value caches for UniZero world models.

The core (pools, manager, layout) knows no host program; :func:`install` loads it when it is called.
"""

from __future__ import annotations

from lzero_kv.config import KVCacheConfig
from lzero_kv.eviction import EvictionStrategy
from lzero_kv.layout import KVLayout
from lzero_kv.manager import KVCacheManager
from lzero_kv.pool import KVCachePool
from lzero_kv.stats import CacheStats

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
    from lzero_kv.hosts.lightzero import install as install_host

    install_host()


def uninstall() -> None:
    """Leave LightZero as it was before :func:`install`."""
    from lzero_kv.hosts.lightzero import uninstall as uninstall_host

    uninstall_host()
