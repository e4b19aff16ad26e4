"""What a model remembers of its sequences."""
