"""Policy of quantization: which leaves, in which format."""
