"""Configs in LightZero's form, a script each; they are also the package ``lzero_kv.configs``.

``lzero-kv config NAME`` prints one: a copy of it runs anywhere, because it imports LightZero and lzero_kv alone.
"""
