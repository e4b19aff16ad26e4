"""Bundles: a model compiled into files that run without the model's code."""
