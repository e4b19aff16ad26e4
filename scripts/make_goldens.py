#!/usr/bin/env python3
"""Golden files of tests/oracle: tiny random models, and SmolLM2, through transformers on the CPU.

    python scripts/make_goldens.py [--only NAME ...] [--smollm2 FOLDER_WITH_THE_GGUF]

Needs torch, transformers, safetensors and gguf, and imports nothing of jaxllm: the two sides share
no mistake. All parameters are drawn anew: matrices with std 1/sqrt(fan_in), every vector with
N(0, 0.3^2) added, for a library's own init (norms 1, biases 0) hides mistakes. Running it twice
writes the same bytes. Numbers are taken from a model that was read back from the files written.
"""

import argparse
import hashlib
import json
import platform
import shutil
import sys
import tempfile
import zlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from gguf_files import write_gguf
from smollm2_prompts import CHATS, PARAGRAPH
from tiny_dense import ROWS
from tiny_experts import EXPERTS
from tiny_hybrids import hub_hybrid
from tiny_linear import LINEAR
from tiny_models import BASE, Tiny
from tiny_models import TINY as DENSE
from tiny_more import MORE
from tiny_vision import VISION, hub_text, hub_vision
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.oracle.draws import KEPT, digest, pack, redraw_matrices

FOLDER = Path(__file__).resolve().parents[1] / "tests/oracle/goldens"
PROMPTS = (17, 28)  # tokens of the two rows' prompts; logits are of 28 tokens in both rows
LENGTH, ANSWER = max(PROMPTS), 12
LEAST_MARGIN = 2e-3  # of the largest logit, between the two best tokens of every greedy step
MOST_NOISE = 2e-6  # float32 against float64 in transformers, of the largest logit
TINY = DENSE | EXPERTS | LINEAR | MORE | ROWS | VISION
# The grouped products of experts take no float64.
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}
MAX_BYTES, MAX_TOTAL_BYTES = 200_000, 8_000_000


def redraw(model: Any, seed: int) -> None:
    """Draw every parameter and every stored buffer anew; the rope's table is not stored."""
    generator, stored = torch.Generator().manual_seed(seed), model.state_dict()
    parameters = dict(model.named_parameters())
    names = [n for n, _ in (*model.named_parameters(), *model.named_buffers()) if n in stored]
    names = [n for n in names if not n.endswith(KEPT)]
    for name in names:
        value = parameters.get(name, stored[name])
        noise = torch.randn(value.shape, generator=generator)
        fresh = noise / value.shape[-1] ** 0.5 if value.ndim > 1 else value + 0.3 * noise
        if name.endswith(("dt_bias", "dt_proj.bias")):  # the library's own steps are near 0
            fresh = noise
        with torch.no_grad():
            value.copy_(fresh)


def hub_dialect(config: dict[str, Any]) -> dict[str, Any]:
    """A config of transformers 5 in the words that files on the hub have."""
    if "text_config" in config:
        return hub_vision(config) | {"text_config": hub_text(hub_dialect(config["text_config"]))}
    config = hub_hybrid(config)
    out = {k: v for k, v in config.items() if k not in ("rope_parameters", "dtype", "layer_types")}
    if "dtype" in config:
        out["torch_dtype"] = config["dtype"]
    if "rope_parameters" not in config:
        return dict(sorted(out.items()))
    rope = dict(config["rope_parameters"])
    if "sliding_attention" in rope:  # one rope a kind of layer: the local one is never scaled
        if config["model_type"] != "olmo3":
            out["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = dict(rope["full_attention"])
    if "partial_rotary_factor" in rope:
        out["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    out["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    # Early files say `type`; those with llama3 scaling or two ropes say `rope_type`.
    later = kind == "llama3" or "rope_local_base_freq" in out or out["model_type"] == "olmo3"
    key = "rope_type" if later else "type"
    if kind == "longrope":  # as published, beside the scaling
        out["original_max_position_embeddings"] = rope.pop("original_max_position_embeddings")
    out["rope_scaling"] = None if kind == "default" else {key: kind, **rope}
    if out["model_type"] == "gpt_neox":
        out["rotary_pct"] = out.pop("partial_rotary_factor")
        out["rotary_emb_base"] = out.pop("rope_theta")
    if out["model_type"] == "qwen2":  # as published: a window is named and not used
        out |= {"sliding_window": 16, "max_window_layers": 2, "use_sliding_window": False}
    if out["model_type"] == "minimax_m2":
        out["rotary_dim"] = int(out.pop("partial_rotary_factor") * out["head_dim"])
        out |= {"qk_norm_type": "per_layer", "use_qk_norm": True, "use_routing_bias": True}
    if out["model_type"] == "qwen3_moe":
        out["num_experts"] = out.pop("num_local_experts")
    out |= hub_layers(config)
    if out.get("head_dim") == out["hidden_size"] // out["num_attention_heads"]:
        del out["head_dim"]
    return dict(sorted(out.items()))


def hub_layers(config: dict[str, Any]) -> dict[str, Any]:
    """How older files say which layers slide: by a period, or as here where there is none."""
    kind, out = config["model_type"], {}
    if kind == "gemma3_text":
        out["sliding_window_pattern"] = 1 + config["layer_types"].index("full_attention")
    if kind == "cohere2":
        out |= {"sliding_window_pattern": 4, "use_qk_norm": False, "rotary_pct": 1.0}
    if kind in ("exaone4", "smollm3", "gpt_oss", "olmo3"):
        out["layer_types"] = config["layer_types"]
    return out


def write_model(folder: Path, tiny: Tiny, seed: int) -> Any:
    """Write a model's files and give the model that transformers reads from them, in float32."""
    config = tiny.config(**{k: v for k, v in (BASE | tiny.changes).items() if v is not ...})
    sees = hasattr(config, "vision_config")
    auto = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    model = auto.from_config(config, **EAGER)
    redraw(model, seed)
    if tiny.gguf:
        write_gguf(folder / "model.gguf", model, tiny.gguf)
        return model.eval()
    more = {"max_shard_size": tiny.shard} if tiny.shard else {}
    model.to(getattr(torch, tiny.dtype)).save_pretrained(folder, **more)
    (folder / "generation_config.json").unlink(missing_ok=True)
    redraw_matrices(folder, seed)
    if tiny.hub:
        path = folder / "config.json"
        path.write_text(json.dumps(hub_dialect(json.loads(path.read_text())), indent=2) + "\n")
    model = auto.from_pretrained(folder, dtype=torch.float32, **EAGER).eval()
    # Llama 4's own forward pass fails in transformers 5.24 where there is no picture.
    inner = getattr(model, "language_model", None)
    return inner if hasattr(inner, "lm_head") else model


def forget(model: Any) -> None:
    """Make the rope's table anew: dynamic scaling keeps that of the longest sequence so far."""
    for module in list(model.modules()):
        if getattr(rope := getattr(module, "rotary_emb", None), "rope_type", None) == "dynamic":
            module.rotary_emb = type(rope)(model.config)


def greedy(
    model: Any, prompt: list[int], count: int, eos: Any = None, *, cache: bool = True
) -> tuple[list[int], float]:
    """The model's own greedy answer, and the least relative margin of a step."""
    forget(model)
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=count,
        do_sample=False,
        use_cache=cache,
        eos_token_id=eos,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    best = torch.cat(out.logits).topk(2).values
    margin = ((best[:, 0] - best[:, 1]) / torch.cat(out.logits).abs().amax(-1)).min()
    return out.sequences[0, len(prompt) :].tolist(), float(margin)


def sha256(*paths: Path) -> str:
    """One hash of several files."""
    return hashlib.sha256(b"".join(p.read_bytes() for p in paths)).hexdigest()


def provenance(**more: Any) -> dict[str, Any]:
    """Who made a golden file, with what."""
    packages = ("torch", "transformers", "safetensors", "gguf", "numpy")
    versions = {"python": platform.python_version()} | {name: version(name) for name in packages}
    return {"generator": "scripts/make_goldens.py", "versions": versions, **more}


def make_tiny(name: str) -> str:
    """Write one golden directory; draws anew where a greedy step is near a tie."""
    for attempt in range(50):
        seed = zlib.crc32(name.encode()) + attempt
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            model = write_model(folder, TINY[name], seed)
            vocab = model.config.get_text_config().vocab_size
            ids = np.random.default_rng(seed).integers(3, vocab, (2, LENGTH)).astype(np.int32)
            rows = [
                greedy(model, r[:n].tolist(), ANSWER, cache=TINY[name].cache)
                for r, n in zip(ids, PROMPTS, strict=True)
            ]
            margin = min(m for _, m in rows)
            if margin < LEAST_MARGIN:
                continue
            forget(model)
            with torch.no_grad():
                logits = model(torch.from_numpy(ids).long()).logits.numpy()
                wide = model.double()(torch.from_numpy(ids).long()).logits.numpy()
            noise = float(np.abs(logits - wide).max() / np.abs(wide).max())
            if noise > MOST_NOISE:
                continue
            single = folder / "model.gguf"
            about = provenance(
                config_sha256=None if TINY[name].gguf else sha256(folder / "config.json"),
                weights_sha256=sha256(single) if TINY[name].gguf else digest(folder),
                seed=seed,
                float32_noise=noise,
                least_margin=margin,
            )
            np.savez(
                folder / "golden.npz",
                ids=ids,
                logits=logits,
                prompt_lengths=np.asarray(PROMPTS, np.int32),
                greedy=np.asarray([r for r, _ in rows], np.int32),
                provenance=np.asarray(json.dumps(about)),
            )
            if not TINY[name].gguf:
                pack(folder, seed)
            size = sum(p.stat().st_size for p in folder.iterdir())
            assert size <= MAX_BYTES, f"{name} takes {size} bytes"
            shutil.rmtree(FOLDER / name, ignore_errors=True)
            shutil.copytree(folder, FOLDER / name)
            return f"{size} bytes, float32 noise {noise:.1e}, least margin {margin:.1e}"
    raise SystemExit(f"{name}: every draw has a greedy step near a tie, or is too noisy")


def make_smollm2(source: Path) -> str:
    """Write smollm2.json: greedy answers, logits and likelihood of the real model."""
    (path,) = source.glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=path.name)
    eos = tokenizer.convert_tokens_to_ids("<|im_end|>")
    chats, margins = [], []
    for messages in CHATS:
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False, tokenize=True
        )
        answer, margin = greedy(model, list(ids), 24, eos)
        margins.append(margin)
        chats.append({"messages": messages, "prompt_ids": list(ids), "greedy": answer})
    ids = tokenizer(PARAGRAPH)["input_ids"][:64]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    best = logits.max(-1)
    nll = torch.nn.functional.cross_entropy(logits[:-1].double(), torch.tensor(ids[1:]))
    about = provenance(gguf=path.name, gguf_sha256=sha256(path), least_margin=min(margins))
    golden = {
        "provenance": about,
        "chats": chats,
        "paragraph": {
            "text": PARAGRAPH,
            "ids": ids,
            "top_ids": best.indices.tolist(),
            "top_logits": [float(f"{x:.9g}") for x in best.values.tolist()],
            "largest_logit": float(logits.abs().max()),
            "nll": float(nll),
        },
    }
    (FOLDER / "smollm2.json").write_text(json.dumps(golden, indent=1) + "\n")
    return f"{len(ids)} tokens with nll {float(nll):.4f}; least margins {margins}"


def main() -> None:
    """Make what is asked for, by default all tiny models."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=list(TINY), choices=list(TINY))
    parser.add_argument("--smollm2", type=Path, help="folder that holds the GGUF file")
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in arguments.only:
        print(name, make_tiny(name), flush=True)
    if arguments.smollm2:
        print("smollm2.json", make_smollm2(arguments.smollm2))
    total = sum(p.stat().st_size for p in FOLDER.rglob("*") if p.is_file())
    print(f"{total} bytes in all")
    assert total <= MAX_TOTAL_BYTES


if __name__ == "__main__":
    main()
