"""Hyper-parameter search: settings drawn before launch, and Optuna's samplers."""
