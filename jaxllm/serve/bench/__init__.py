"""Measures a server or an engine under load: `workload` asks, `load` times, `report` sums up."""
