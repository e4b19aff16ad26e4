"""Generation: prefill and decode programs, sampling."""
