"""Text on the host: tokenizers, chat templates, streaming detokenization. No jax here."""
