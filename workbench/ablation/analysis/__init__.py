"""Analyses of finished ablations: noise, power, savings, scaling, comparison, diagnostics, archives."""
