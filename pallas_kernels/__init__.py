"""Pallas kernels for GPU and TPU; depends on jax and numpy only, never on jaxllm."""
