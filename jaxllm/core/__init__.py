"""Config, trees, leaves, sharding and the run's policy."""
