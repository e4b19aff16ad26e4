"""Data: text to rows of tokens."""
