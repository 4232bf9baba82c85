"""Validation: LightZero's own cache beside this one, and a recomputation that says which is right.

Loaded only where ``cache_validation_mode`` or a command asks for it. ``validator`` receives the events of
inference. The truth comes from ``histories`` and ``oracle``. ``stock`` is LightZero's world model over the
same weights; ``mode_store`` asks its cache, ``mode_model`` runs all of it, ``mode`` is what both share.
``compare`` gives each of the ``rows`` its verdict, within a ``tolerance``; ``causes`` prove why the stock
cache is wrong, ``faults`` recognise what a wrong cache served. ``findings`` are saved failures, ``report``
and ``page`` the results of a run.
"""
