"""Public families: config to spec, weight names, files in and out."""
