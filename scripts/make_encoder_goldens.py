#!/usr/bin/env python3
"""Golden files of encoders: tiny random models, and all-MiniLM-L6-v2, through transformers.

    python scripts/make_encoder_goldens.py [--only NAME ...] [--minilm FOLDER]

As make_goldens.py does for decoders: parameters are drawn anew, and numbers are taken in float32
from a model that was read back from the files written. Rows are of unequal length and have token
types; hidden states are kept of real tokens, logits where the model has a head.
"""

import argparse
import json
import shutil
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from make_goldens import (
    FOLDER,
    MAX_BYTES,
    digest,
    pack,
    provenance,
    redraw,
    redraw_matrices,
    sha256,
)
from tiny_encoders import ENCODERS, Encoder

TEXTS = (
    "A man is eating food.",
    "The new movie is awesome, and so is its music!",
    "Ünïcödé — naïve café, 東京 and emoji \U0001f600, e\u0301clair",
    "",
    "def mean(xs):\n    return sum(xs) / len(xs)  # [MASK] [SEP]\t\u200b",
    "Attention is all that a sentence of more than 256 tokens needs to be cut. " * 30,
    "antidisestablishmentarianism " + "x" * 150,
)


def hub_dialect(config: dict[str, Any]) -> dict[str, Any]:
    """A config in the words of files on the hub, which name neither layer types nor ropes."""
    out = {k: v for k, v in config.items() if k not in ("dtype", "layer_types", "rope_parameters")}
    out |= {"torch_dtype": config["dtype"], "position_embedding_type": "absolute"}
    out["gradient_checkpointing"] = False
    if config["model_type"] == "modernbert":
        ropes = config["rope_parameters"]
        out["global_rope_theta"] = ropes["full_attention"]["rope_theta"]
        out["local_rope_theta"] = ropes["sliding_attention"]["rope_theta"]
        out["global_attn_every_n_layers"] = config["layer_types"][1:].index("full_attention") + 1
        out["layer_norm_eps"] = config["norm_eps"]
    if config["model_type"] == "longformer":
        out |= {"attention_mode": "longformer", "ignore_attention_mask": False}
        del out["architectures"]
    return dict(sorted(out.items()))


def write_model(folder: Path, tiny: Encoder, seed: int) -> Any:
    """Write a model's files, and give the model that transformers reads from them."""
    config = tiny.config(**tiny.changes)
    model = getattr(transformers, tiny.model)(config)
    redraw(model, seed)
    model.save_pretrained(folder)
    redraw_matrices(folder, seed)
    if tiny.hub:
        path = folder / "config.json"
        path.write_text(json.dumps(hub_dialect(json.loads(path.read_text())), indent=2) + "\n")
    again = getattr(transformers, tiny.model).from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    # In evaluation BigBird's random blocks all are block 0.
    return again.train() if tiny.train else again.eval()


def run(model: Any, tiny: Encoder, held: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Hidden states after the last layer, and logits where the model has them."""
    places = np.arange(held["ids"].shape[1])[None]
    given = {
        "input_ids": torch.from_numpy(held["ids"]).long(),
        "attention_mask": torch.from_numpy(places < held["lengths"][:, None]).long(),
    }
    if tiny.types:
        given["token_type_ids"] = torch.from_numpy(held["types"]).long()
    if tiny.marks:
        given["global_attention_mask"] = torch.from_numpy(held["marks"]).long()
    with torch.no_grad():
        out = model(**given, output_hidden_states=True)
    found = {"hidden": out.last_hidden_state if "last_hidden_state" in out else None}
    if found["hidden"] is None:
        body = getattr(model, model.base_model_prefix)
        with torch.no_grad():
            found["hidden"] = body(**given).last_hidden_state
        found["logits"] = getattr(out, "logits", getattr(out, "prediction_logits", None))
    real = (places < held["lengths"][:, None])[..., None]
    return {k: np.where(real, v.numpy(), 0) for k, v in found.items()}  # padding may be NaN


def make_tiny(name: str) -> str:
    """Write one golden directory."""
    tiny, seed = ENCODERS[name], zlib.crc32(name.encode())
    random = np.random.default_rng(seed)
    shape = (2, tiny.length)
    held = {
        "ids": random.integers(3, tiny.changes["vocab_size"], shape).astype(np.int32),
        "types": random.integers(0, max(tiny.types, 1), shape).astype(np.int32),
        "lengths": np.asarray([tiny.length, tiny.length - tiny.shorter], np.int32),
        "marks": np.isin(np.arange(tiny.length)[None] + np.asarray([[0], [1]]), tiny.marks),
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = write_model(folder, tiny, seed)
        found = run(model, tiny, held)
        # The row without padding: in float64 transformers' padding is NaN in windows, and spreads.
        wide = run(model.double(), tiny, {k: v[:1] for k, v in held.items()})
        errors = {k: np.abs(found[k][:1] - v).max() / np.abs(v).max() for k, v in wide.items()}
        noise = float(max(errors.values()))
        about = provenance(
            config_sha256=sha256(folder / "config.json"),
            weights_sha256=digest(folder),
            seed=seed,
            float32_noise=noise,
        )
        about["generator"] = "scripts/make_encoder_goldens.py"
        np.savez(folder / "encoder.npz", **held, **found, provenance=np.asarray(json.dumps(about)))
        pack(folder, seed)
        size = sum(p.stat().st_size for p in folder.iterdir())
        assert size <= MAX_BYTES, f"{name} takes {size} bytes"
        shutil.rmtree(FOLDER / name, ignore_errors=True)
        shutil.copytree(folder, FOLDER / name)
    return f"{size} bytes, float32 noise {noise:.1e}, {', '.join(found)}"


def make_minilm(source: Path) -> str:
    """Write minilm.npz: sentence-transformers by hand: cut, mean over tokens, length 1."""
    model = transformers.AutoModel.from_pretrained(source, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    most = json.loads((source / "sentence_bert_config.json").read_text())["max_seq_length"]
    vectors, counts = [], []
    for text in TEXTS:
        given = tokenizer(text, truncation=True, max_length=most, return_tensors="pt")
        with torch.no_grad():
            hidden = model(**given).last_hidden_state[0]
        vectors.append(torch.nn.functional.normalize(hidden.mean(0), dim=0).numpy())
        counts.append(len(given["input_ids"][0]))
    about = provenance(weights_sha256=sha256(source / "model.safetensors"))
    np.savez(
        FOLDER / "minilm.npz",
        texts=np.asarray(json.dumps(TEXTS)),
        counts=np.asarray(counts, np.int32),
        vectors=np.stack(vectors),
        provenance=np.asarray(json.dumps(about)),
    )
    return f"{len(TEXTS)} texts of {counts} tokens"


def main() -> None:
    """Make what is asked for, by default all tiny models."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=list(ENCODERS), choices=list(ENCODERS))
    parser.add_argument("--minilm", type=Path, help="folder of all-MiniLM-L6-v2")
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    for name in arguments.only:
        print(name, make_tiny(name), flush=True)
    if arguments.minilm:
        print("minilm.npz", make_minilm(arguments.minilm))


if __name__ == "__main__":
    main()
