"""jaxllm: one JAX codebase to import, train, adapt, quantize, compile, export and serve LLMs."""
