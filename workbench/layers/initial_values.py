"""Scale of initial values.

Every module with parameters defines ``init_parameter(name, parameter, generator)``. The model calls it with a generator
keyed by the parameter's full name, so that a tensor starts the same whatever else the model contains.
"""

INIT_SCALE = 0.5
"""Matrices start as N(0, (INIT_SCALE / sqrt(fan_in))²): 0.0156 at width 1024. Our choice, shared by all variants."""
