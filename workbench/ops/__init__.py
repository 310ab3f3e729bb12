"""Pure tensor functions, one folder per operation: ``reference.py`` is the definition (plain, also in float64),
``torch.py`` or ``chunked.py`` run on any device, ``triton.py`` or ``kernels/`` are the fast form for GPUs;
:mod:`.dispatch` chooses."""
