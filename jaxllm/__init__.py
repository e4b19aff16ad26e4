"""jaxllm: one JAX codebase to import, train, adapt, quantize, compile, export and serve LLMs.

`import jaxllm` is quick and imports neither jax nor flax; the names below bring what they need.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Generation", "Model", "ModelSpec", "Policy", "Sampling", "load", "pull", "train"]

if TYPE_CHECKING:
    from jaxllm.core.policy import Policy
    from jaxllm.infer.sampling import Sampling
    from jaxllm.model import Generation, Model, load
    from jaxllm.spec.model import ModelSpec
    from jaxllm.train.loop import train
    from jaxllm.zoo.pull import pull

_HOMES = {
    "Generation": "jaxllm.model",
    "Model": "jaxllm.model",
    "ModelSpec": "jaxllm.spec.model",
    "Policy": "jaxllm.core.policy",
    "Sampling": "jaxllm.infer.sampling",
    "load": "jaxllm.model",
    "pull": "jaxllm.zoo.pull",
}


def __getattr__(name: str) -> Any:
    import importlib

    if name == "train":  # the package itself, which can be called
        return importlib.import_module("jaxllm.train")
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxllm' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
