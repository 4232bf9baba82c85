"""Resumable measurements: rows on disk, their division among processes, and bootstrap intervals."""
