"""The parts of `make soak`: taking samples of a long training, judging and showing them."""
