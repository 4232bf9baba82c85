"""The parts of `make demo`: watching a training, and showing it."""
