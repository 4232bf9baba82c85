"""Validation: the host's own cache and model beside the manager's, and a recomputation that says who is
right.

``validator`` is told of every inference; ``old_system`` asks the host's model over the same weights
(``twin``); ``histories`` and ``recompute`` give the truth; ``enactment`` repeats the old system's step with
one mistake at a time; ``evidence`` names causes and ``diagnosis`` faults; ``replay`` computes a saved truth
again.
"""
