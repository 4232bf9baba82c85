"""Key-value caches for UniZero world models, and layer budgets for any transformer.

Public names load their modules on first use: ``lzero_kv.budget`` needs neither a pool nor a host program.
:func:`install` loads the host.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lzero_kv.lazy import lazy_names

if TYPE_CHECKING:
    from lzero_kv.cache.eviction import EvictionStrategy
    from lzero_kv.cache.layout import KVLayout
    from lzero_kv.cache.manager import KVCacheManager
    from lzero_kv.cache.pool import KVCachePool
    from lzero_kv.cache.stats import CacheStats
    from lzero_kv.config import KVCacheConfig

__version__ = '0.1.0'
"""The one place of the version; the package's metadata reads it here."""

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

_MODULES = {
    'CacheStats': 'lzero_kv.cache.stats',
    'EvictionStrategy': 'lzero_kv.cache.eviction',
    'KVCacheConfig': 'lzero_kv.config',
    'KVCacheManager': 'lzero_kv.cache.manager',
    'KVCachePool': 'lzero_kv.cache.pool',
    'KVLayout': 'lzero_kv.cache.layout',
}


__getattr__, __dir__ = lazy_names(__name__, _MODULES, __all__)


def install() -> None:
    """Put the cache manager behind LightZero's ``use_new_cache_manager`` flag."""
    from lzero_kv.lightzero import install as install_host

    install_host()


def uninstall() -> None:
    """Leave LightZero as it was before :func:`install`."""
    from lzero_kv.lightzero import uninstall as uninstall_host

    uninstall_host()
