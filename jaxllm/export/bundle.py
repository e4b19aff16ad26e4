"""Writing a bundle: weights, tokenizer, spec and programs beside a manifest that names them all.

`runtime.py` reads it, and knows the format from the manifest alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jaxlib import version as jaxlib

from jaxllm.aot.fingerprint import environment, package_hash
from jaxllm.aot.program import Program
from jaxllm.aot.store import Store, atomic_write
from jaxllm.core.choices import taken
from jaxllm.core.config import check_new, to_dict
from jaxllm.core.logging import log
from jaxllm.core.mesh import AXES
from jaxllm.errors import CapacityError, ConfigError
from jaxllm.export.adapters import read_apart, write_adapters
from jaxllm.export.portable import KERNEL_CALLS, PLATFORMS, portable
from jaxllm.export.runtime import FORMAT, BundleError
from jaxllm.export.stored import StoredBundle
from jaxllm.export.table import Row, table
from jaxllm.export.ways import Options, Way, check_kernels, ways
from jaxllm.export.weights import Placed, abstract, parameters, placed, write_weights
from jaxllm.infer.open import Opened, open_merged, run_segments
from jaxllm.infer.programs import Setup, check_decodes
from jaxllm.infer.ready import COMPILER_OPTIONS, tokens_per_call
from jaxllm.infer.sampling import Sampling

__all__ = ["export_bundle", "folder_beside"]


def export_bundle(source: str, dest: str | Path, options: Options | None = None) -> Path:
    """Write a bundle of a model, whole or not at all.

    Args:
      source: what `jaxllm.load` takes.
      dest: a new directory, or a new file whose name ends in `.tar`.
      options: platforms, meshes, shapes and kernels.

    Returns:
      `dest`.

    Raises:
      ConfigError: `dest` exists, or options that contradict the model or each other.
      UnsupportedError: an encoder, or a program that cannot be made from here.
      CapacityError: no space.
    """
    dest = Path(dest)
    check_new(dest, "a new directory or a new .tar file")
    with folder_beside(dest) as folder:
        _write(folder, source, options or Options())
        if dest.suffix == ".tar":
            _pack(folder, folder.with_suffix(".tar"))
            folder.with_suffix(".tar").rename(dest)
        else:
            if dest.exists():
                dest.rmdir()
            folder.rename(dest)
    return dest


@contextlib.contextmanager
def folder_beside(dest: Path) -> Iterator[Path]:
    """A new folder on the disk of `dest`, gone afterwards unless it was renamed."""
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=dest.parent, prefix=f".{dest.stem}."))
        folder.chmod(0o755)
    except OSError as error:
        raise CapacityError(f"{dest}: cannot be written: {error.strerror}") from None
    try:
        yield folder
    except OSError as error:
        raise CapacityError(f"{dest}: cannot be written: {error.strerror}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        folder.with_suffix(".tar").unlink(missing_ok=True)


def _pack(folder: Path, file: Path) -> None:
    """A .tar with the manifest first and nothing of this machine in it."""

    def plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.uid = info.gid = info.mtime = 0
        info.uname = info.gname = ""
        return info

    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    with tarfile.open(file, "w") as tar:
        for name in sorted(names, key=lambda n: (n != "manifest.json", n)):
            tar.add(folder / name, name, filter=plain)


def _write(folder: Path, source: str, options: Options) -> None:
    variants, layouts = [], {}
    head: Opened | None = None
    apart = read_apart(source, options.apart)
    for way in ways(options):
        opened = open_merged(source, options.adapter, policy=way.policy, mesh=way.mesh, put=Placed)
        check_decodes(opened.spec)
        params = placed(opened.params)
        head = opened = dataclasses.replace(opened, params=None)
        if way.layout not in layouts:
            layouts[way.layout] = write_weights(folder / "weights" / way.layout, params)
        adapters, files = write_adapters(folder, way, opened.spec, apart)
        variants.append(
            _parameters(folder, params, layouts[way.layout])
            | _variant(folder, opened, way, params, options)
            | {"adapters": adapters}
        )
        variants[-1]["weights"] |= {f.relative_to(folder).as_posix(): _sha256(f) for f in files}
        del params  # or two models would be in memory at once
    assert head is not None
    context, _, _ = options.sizes.fit(head.spec)
    (folder / "spec.json").write_text(head.spec.to_json())
    manifest = {
        "format": FORMAT,
        "source": Path(source).name,
        "merged": None if options.adapter is None else options.adapter.name,
        "jaxllm": package_hash()[:16],
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "vocab": head.spec.vocab,
        "context": context,
        "eos_ids": list(head.eos_ids),
        "template": _template_facts(head),
        "sampling": _sampling(),
        "tokenizer": _tokenizer(folder, head),
        "variants": variants,
        "native": None,
    }
    _seal(folder, manifest)
    if options.native:
        manifest["native"] = _compile_here(folder)
        _seal(folder, manifest)


def _compile_here(folder: Path) -> dict[str, Any]:
    """Add this machine's executables to a bundle, and to the user's own store.

    Returns:
      the stack that they are for.
    """
    (folder / "native").mkdir()
    try:
        StoredBundle(folder, Store(folder / "native")).compile_all()
    except BundleError as error:
        raise ConfigError(f"--native: {str(error).removeprefix(f'{folder}: ')}") from None
    own = Store.default().folder
    for file in (folder / "native").iterdir():
        atomic_write(own / file.name, [file.read_bytes()])
    return {name: value for name, value in environment(jax.devices()).items() if value}


def _seal(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest with the hashes of all files, and its own beside it."""
    (folder / "manifest.json").unlink(missing_ok=True)
    (folder / "manifest.sha256").unlink(missing_ok=True)
    manifest["files"] = {
        path.relative_to(folder).as_posix(): _sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".safetensors"
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
    hashed = _sha256(folder / "manifest.json")
    (folder / "manifest.sha256").write_text(f"{hashed}  manifest.json\n")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _parameters(folder: Path, params: Any, where: dict[str, tuple[Path, int]]) -> dict[str, Any]:
    """Files of weights with their hashes, and where in them each array of the programs lies."""
    names = {file: file.relative_to(folder).as_posix() for file, _ in where.values()}
    rows = []
    for name, leaf in parameters(params):
        file, offset = where[name]
        rows.append([name, names[file], offset, leaf.array.dtype.name, list(leaf.array.shape)])
    weights = {name: _sha256(file) for file, name in names.items()}
    return {"weights": weights, "parameters": rows}


def _sampling() -> list[list[Any]]:
    """[option, dtype, default, whether another value wants more than the greedy program]."""
    deciding = ("temperature", "repetition_penalty", "presence_penalty", "frequency_penalty")
    defaults = Sampling()
    rows = jax.tree.leaves(defaults.rows(1))
    fields = dataclasses.fields(Sampling)
    return [
        [field.name, row.dtype.name, getattr(defaults, field.name), field.name in deciding]
        for field, row in zip(fields, rows, strict=True)
    ]


def _template_facts(opened: Opened) -> dict[str, Any]:
    """What the chat template sees besides the messages."""
    special = {} if opened.tokenizer is None else dict(opened.tokenizer.special_tokens)
    return special | {"tools": None, "documents": None, "add_generation_prompt": True}


def _tokenizer(folder: Path, opened: Opened) -> dict[str, Any] | None:
    """Write tokenizer.json and the chat template; what else belongs to them."""
    tokenizer = opened.tokenizer
    if tokenizer is None:
        return None
    (folder / "tokenizer.json").write_text(tokenizer.backend.to_str())
    templates = {"chat_template": tokenizer.chat_template, "tool_template": tokenizer.tool_template}
    for name, text in templates.items():
        if text is not None:
            (folder / f"{name}.jinja").write_text(text)
    return {
        "vocab_size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id,
        "eos_ids": list(tokenizer.eos_ids),
        "adds_bos": tokenizer.adds_bos,
        "special_tokens": dict(tokenizer.special_tokens),
    }


def _variant(
    folder: Path, opened: Opened, way: Way, params: Any, options: Options
) -> dict[str, Any]:
    """Write the programs of one way; its part of the manifest."""
    device = PLATFORMS[way.platform]
    setup = Setup(
        spec=opened.spec,
        policy=way.policy,
        params=abstract(params),
        segments=run_segments(opened.spec, way.policy),
        mesh=way.mesh,
        name=way.name,
    )
    calls_of: dict[str, tuple[str, ...]] = {}
    programs, convention = {}, 0
    place = folder / "programs" / way.name
    place.mkdir(parents=True)
    for row in table(setup, options.sizes, tokens_per_call=tokens_per_call(device)):
        log.info("export: program %s for %s", row.name, way.name)
        with taken() as took:
            made = portable(row.program, way.platform)
        (place / f"{row.name}.jaxexport").write_bytes(made.data)
        calls_of[row.name], convention = made.custom_calls, made.convention
        file = f"programs/{way.name}/{row.name}.jaxexport"
        programs[row.name] = _entry(row, file, made.custom_calls, took)
    takes_prompt = {n: c for n, c in calls_of.items() if n.startswith(("prefill", "extend"))}
    check_kernels(way.policy, way.platform, takes_prompt)
    _, _, capacities = options.sizes.fit(opened.spec)
    hopper = any(KERNEL_CALLS["mosaic_gpu"] in calls for calls in calls_of.values())
    policy = way.policy
    fresh = {(r["tokens"], r["capacity"]) for r in programs.values() if r["kind"] == "prefill"}
    chosen: dict[str, set[str]] = {}
    for entry in programs.values():
        for op, names in entry["implementations"].items():
            chosen.setdefault(op, set()).update(names)
    return {
        "folder": way.name,
        "name": way.said + (", compute capability 9.0" if hopper else ""),
        "platform": way.platform,
        "axes": list(AXES),
        "sizes": [1 if way.mesh is None else way.mesh.shape[axis] for axis in AXES],
        "devices": 1 if way.mesh is None else way.mesh.size,
        "chip": "9.0" if hopper else None,
        "convention": convention,
        "param_dtype": policy.param_dtype,
        "compute_dtype": policy.compute_dtype,
        "implementations": {op: sorted(names) for op, names in sorted(chosen.items())},
        "policy": to_dict(dataclasses.replace(policy, taps=frozenset())),
        "prefill": sorted(fresh),
        "capacities": list(capacities),
        "tokens_per_call": tokens_per_call(device),
        "compiler_options": dict(COMPILER_OPTIONS.get(device, ())),
        "programs": programs,
    }


def _entry(
    row: Row, file: str, calls: tuple[str, ...], took: dict[str, set[str]]
) -> dict[str, Any]:
    program: Program = row.program
    return {
        "name": row.name,
        "kind": row.kind,
        "mode": row.mode,
        "tokens": row.tokens,
        "capacity": row.capacity,
        "to": row.to,
        "file": file,
        "donate": list(program.donate),
        "custom_calls": list(calls),
        "implementations": {op: sorted(names) for op, names in sorted(took.items())},
    }
