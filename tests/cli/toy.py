"""A toy checkpoint on disk: random weights, a byte-level tokenizer, a chat template."""

import json
from pathlib import Path

import numpy as np

from jaxllm.spec.model import Block, Head, ModelSpec, sub
from jaxllm.spec.ops import MLP, Attention, Norm
from jaxllm.spec.table import layer_paths
from jaxllm.zoo.load import save_checkpoint
from tests.text.toys import byte_tokenizer

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"


def toy_spec(vocab: int, context: int = 256, *, width: int = 16, ffn: int = 24) -> ModelSpec:
    """One layer of width 16."""
    norm = Norm()
    block = Block(
        name="G",
        subs=(
            sub("attn", Attention(heads=2, kv_heads=1, head_dim=width // 2), norm_in=norm),
            sub("mlp", MLP(width=ffn), norm_in=norm),
        ),
    )
    return ModelSpec(
        vocab=vocab,
        width=width,
        blocks=(block,),
        layers="G*1",
        context=context,
        final_norm=norm,
        head=Head(tied=True),
    )


def write_toy(directory: Path, *, template: str | None = TEMPLATE, **sizes: int) -> Path:
    """Write the toy and return its directory."""
    tokenizer = byte_tokenizer()
    spec = toy_spec(tokenizer.vocab_size, **sizes)
    random = np.random.default_rng(0)
    arrays = {p: random.standard_normal(d.shape) * 0.3 for p, d in layer_paths(spec).items()}
    save_checkpoint(directory, spec, lambda p: arrays[p].astype(np.float32), dtype="float32")
    tokenizer.save(directory)
    config = directory / "tokenizer_config.json"
    data = json.loads(config.read_text())
    data.pop("chat_template", None)
    (directory / "chat_template.jinja").unlink(missing_ok=True)
    if template is not None:
        data["chat_template"] = template
    config.write_text(json.dumps(data))
    return directory
