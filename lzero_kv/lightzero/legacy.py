"""Names of the host's own cache that outside code still calls ``clear()`` on."""

from __future__ import annotations

from typing import Any


class Clearable:
    """Stands for one of the host's cache dictionaries: empty, and clears the manager's pools when it is
    cleared.

    Args:
        owner: the object that keeps the pools.
        method: name of its method that clears them.
    """

    def __init__(self, owner: Any, method: str) -> None:
        self._owner = owner
        self._method = method

    def clear(self) -> None:
        """Clear what this name stands for."""
        getattr(self._owner, self._method)()
