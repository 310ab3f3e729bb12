"""Pure tensor functions, one folder an operation: ``reference.py`` is the mathematics (fp64 capable, plain),
``torch.py`` runs anywhere, ``triton.py`` (where there is one) is the fast form for GPUs."""
