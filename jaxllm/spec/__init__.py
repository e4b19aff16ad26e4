"""What a model is: specs, masks, ropes, patterns, the parameter table, counts."""
