"""Configs in LightZero's form, a script each; they are also the package ``lzero_kv.configs``.

``lzero-kv config NAME`` prints one. A copy runs anywhere: it imports LightZero and lzero_kv alone.
"""
