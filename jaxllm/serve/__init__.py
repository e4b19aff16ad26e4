"""Serving: an engine of pages, a scheduler and closed programs, and HTTP in front of it."""
