"""The model as Linen modules; the only room that imports flax."""
