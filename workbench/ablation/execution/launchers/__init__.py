"""Launchers, one file each: a class with a nested ``Config``, registered in
:data:`workbench.ablation.spec.launch.launchers`."""
