"""Budget matching: the solver that makes arms equal."""
