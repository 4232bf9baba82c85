"""Bounded pools of cached keys and values. Nothing here knows a host program."""
