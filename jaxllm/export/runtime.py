"""Runs bundles of `jaxllm export`; stands alone on jax, numpy, flatbuffers, tokenizers, jinja2."""

import hashlib
import json
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import jax
import numpy as np
from jax import export

FORMAT = 1


class BundleError(ValueError):
    """The bundle is damaged, of another format or for another machine; or it is used wrongly."""


def need(fine, message):
    """Raise `BundleError` unless `fine`."""
    if not fine:
        raise BundleError(message)


def files_of(path):
    """name -> (file, offset, bytes); a .tar is read where it lies, never unpacked."""
    if path.is_dir():
        files = [p for p in path.rglob("*") if p.is_file()]
        return {p.relative_to(path).as_posix(): (p, 0, p.stat().st_size) for p in files}
    try:
        with tarfile.open(path, "r:") as tar:
            items = [(PurePosixPath(x.name), x) for x in tar if not x.isdir()]
    except (OSError, tarfile.TarError) as error:
        raise BundleError(f"{path}: neither a directory nor a whole .tar: {error}") from None
    for name, x in items:
        inside = x.isreg() and not name.is_absolute() and ".." not in name.parts
        need(inside, f"{path}: {x.name!r} is a link or leads out of the bundle: refused")
    return {name.as_posix(): (path, x.offset_data, x.size) for name, x in items}


class Bundle:
    """A bundle, checked before anything of it runs: `Bundle("model.tar").answer(messages)`."""

    def __init__(self, path):
        self.path, self.ready, self.files = path, {}, files_of(Path(path))
        try:
            self.manifest = dict(json.loads(bytes(self.read("manifest.json"))))
        except (ValueError, TypeError) as error:
            raise BundleError(f"{path}: no bundle or a damaged one: {error}") from None
        found = self.manifest.get("format")
        need(found == FORMAT, f"{path}: has format {found}, this reads {FORMAT}: update jaxllm")
        self._check("manifest.json", bytes(self.read("manifest.sha256")[:64]).decode())
        devices, ways = jax.devices(), self.manifest["variants"]
        here = devices[0].platform.replace("gpu", "cuda")
        fit = [w for w in ways if w["platform"] == here and w["devices"] in (1, len(devices))]
        fit = [w for w in fit if w["chip"] in (None, getattr(devices[0], "compute_capability", 0))]
        need(fit, f"{path}: is for {[w['name'] for w in ways]}; here is {here} x {len(devices)}")
        way = self.way = max(fit, key=lambda w: w["devices"])
        hashes = self.manifest["files"] | way["weights"]
        with ThreadPoolExecutor() as pool:
            list(pool.map(self._check, hashes.keys(), hashes.values()))
        self.mesh = jax.sharding.Mesh(np.resize(devices, way["sizes"]), way["axes"])
        places = self.exported(next(iter(way["programs"].values()))).in_shardings_jax(self.mesh)
        self.weights = [*map(jax.device_put, map(self.array, way["parameters"]), places)]

    def read(self, name):
        """The bytes of a file, mapped into memory."""
        need(name in self.files, f"{self.path}: {name} is missing: copy the bundle anew")
        file, offset, size = self.files[name]
        return np.memmap(file, np.uint8, "r", offset, (size,)) if size else np.zeros(0, np.uint8)

    def _check(self, name, wanted):
        same = hashlib.sha256(self.read(name)).hexdigest() == wanted
        need(same, f"{self.path}: {name} was changed after the export: nothing of it was run")

    def array(self, parameter):
        """One of the manifest's arrays, on the host."""
        _, file, offset, kind, shape = parameter
        data, dtype, count = self.read(file)[offset:], jax.numpy.dtype(kind), int(np.prod(shape))
        if kind in ("int4", "uint4"):
            half = data[: -(-count // 2)]
            data = np.stack([half & 15, half >> 4], -1).reshape(-1).astype(dtype)
        return data[: count * dtype.itemsize].view(dtype).reshape(shape)

    def exported(self, entry):
        """A portable program as jax reads it."""
        if self.way["chip"]:  # it calls kernels, whose handlers come with this import
            __import__("jax.experimental.mosaic.gpu")
        least = export.minimum_supported_calling_convention_version
        most = export.maximum_supported_calling_convention_version
        try:
            need(least <= self.way["convention"] <= most, "another calling convention")
            return export.deserialize(bytearray(self.read(entry["file"])))
        except ValueError as error:
            why = f"made by jax {self.manifest['jax']}, out of the window of jax {jax.__version__}"
            raise BundleError(f"{self.path}: {why}: export it anew ({error})") from None

    def build(self, entry, *args):
        """The executable of a program for its first arguments."""
        run = jax.jit(self.exported(entry).call, donate_argnums=tuple(entry["donate"]))
        return run.lower(*args).compile(self.way["compiler_options"])

    def run(self, name, *args):
        """Run a program, built at its first use."""
        if name not in self.ready:
            self.ready[name] = self.build(self.way["programs"][name], *args)
        return self.ready[name](*args)

    def stream(self, prompt, max_tokens=256, **options):
        """Yield lists of new ids; options as temperature, top_k, top_p, min_p, seed."""
        way, length, context = self.way, len(prompt), self.manifest["context"]
        need(0 < length < context, f"the bundle takes prompts of 1 to {context - 1} tokens")
        table, count = self.manifest["sampling"], way["tokens_per_call"]
        rows = [np.array([options.get(n, usual)], kind) for n, kind, usual, _ in table]
        drawn = any(options.get(n, usual) != usual for n, _, usual, decides in table if decides)
        mode, limit = "penalize" if drawn else "greedy", min(max_tokens, context - length)
        size, slots = next((x for x in way["prefill"] if x[0] >= length), way["prefill"][-1])
        ids = np.pad(np.asarray(prompt, np.int32), (0, size))[None]
        new = lambda i: ([ids[:, i : i + size]], [np.full(1, min(size, length - i), np.int32)])  # noqa: E731
        held = self.run(f"prefill-{mode}-{size}", self.weights, *new(0), rows)
        for start in range(size, length, size):
            held, slots = self._grown(held, slots, start + size)
            held = self.run(f"extend-{mode}-{size}-{slots}", self.weights, *held, *new(start), rows)
        yield np.asarray(held[1][0]).tolist()
        for done in range(1, limit, count):
            held, slots = self._grown(held, slots, length + done + count - 1)
            *held, (tokens,) = self.run(f"decode-{mode}-{slots}", self.weights, *held, rows)
            yield np.asarray(tokens)[0, : limit - done].tolist()

    def _grown(self, held, slots, tokens):
        while slots < min(tokens, self.way["capacities"][-1]):
            held, slots = [self.run(f"grow-{slots}", held[0])[0], held[1]], 2 * slots
        return held, slots

    def answer(self, messages, **options):
        """The text that follows messages of a chat; takes what `stream` takes."""
        from jinja2.sandbox import ImmutableSandboxedEnvironment
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_str(bytes(self.read("tokenizer.json")).decode())
        template = bytes(self.read("chat_template.jinja")).decode()
        room = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        text = room.from_string(template).render(self.manifest["template"], messages=messages)
        found, ids = [], tokenizer.encode(text, add_special_tokens=False).ids
        for new in (i for ids in self.stream(ids, **options) for i in ids):
            if new in self.manifest["eos_ids"]:
                break
            found.append(new)
        return tokenizer.decode(found)
