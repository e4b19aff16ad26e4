"""The house's error kinds: each message says what was given, what is allowed and what to do."""

from pallas_kernels.errors import CapacityError, ShapeError, UnsupportedError

__all__ = [
    "CapacityError",
    "ConfigError",
    "ShapeError",
    "UnsupportedError",
    "WeightsError",
    "user_errors",
]


class ConfigError(ValueError):
    """An option, a spec or a config file contradicts itself or names something unknown."""


class WeightsError(ValueError):
    """A checkpoint, tokenizer file or stored artifact is missing, damaged or of another model."""


user_errors = (ConfigError, WeightsError, ShapeError, CapacityError, UnsupportedError)
