"""Training: one compiled step, data by (seed, step), checkpoints, a run directory."""
