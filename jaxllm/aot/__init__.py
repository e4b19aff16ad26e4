"""Programs compiled ahead of time: lower, compile, inspect, store, load."""
