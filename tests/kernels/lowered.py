"""What a lowered program does with our kernels."""

import re

KERNEL = "mosaic_gpu_v2"


def kernel_calls(text: str) -> int:
    """How many calls of kernels stand in a lowered program, by whatever function they go."""
    functions = {}
    for body in re.split(r"\n  func\.func ", text)[1:]:
        functions[re.search(r"@([\w.$-]+)\(", body).group(1)] = body

    def count(name: str, seen: tuple[str, ...] = ()) -> int:
        inner = re.findall(r"call @([\w.$-]+)\(", functions[name])
        known = [other for other in inner if other in functions and other not in seen]
        return functions[name].count(KERNEL) + sum(count(o, (*seen, name)) for o in known)

    return count("main")
