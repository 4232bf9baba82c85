"""Validation: LightZero's own cache beside this one, and a recomputation that says which is right.

Loaded only where ``cache_validation_mode`` or a command asks for it. ``validator`` receives the events of
inference. The truth comes from ``histories`` and ``oracle``. ``stock`` is LightZero's world model over the
same weights; ``mode`` asks its cache, or runs all of it. ``compare`` gives each row its verdict, within a
``tolerance``; ``causes`` prove why the stock cache is wrong, ``faults`` recognise what a wrong cache served.
``findings`` are saved failures, ``report`` is the results of a run.
"""
