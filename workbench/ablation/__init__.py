"""Ablations: arms under one budget, their trials, and the verdict."""
