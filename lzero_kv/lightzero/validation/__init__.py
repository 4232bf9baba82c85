"""Validation: the host's own cache and model beside the manager's, and a recomputation that says who is
right.

``validator`` is told of every inference. The truth comes from ``histories`` and ``recompute``; the old
system's opinion from ``old_store`` or ``old_model``, which ask the host's own world model over the same
weights (``twin``). ``judge`` gives each row its verdict. Why the old system is off is proven by ``evidence``
and ``enactment``, which repeats its step with one mistake at a time; what a manager that is off has served is
found by ``lineup`` and ``diagnosis``. ``failures`` are saved, and ``replay`` computes their truth again.
"""
