"""Evaluation: perplexity."""
