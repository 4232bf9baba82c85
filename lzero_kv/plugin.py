"""Name this module in LightZero's ``import_names`` and importing it installs the cache manager.

It is the only module of the package whose import changes anything.
"""

from lzero_kv import install

install()
