"""The limits of the house plan that a machine can see, one test a limit."""

import ast
import re
import subprocess
import sys

import pytest

from tests.house.tree import PACKAGES, ROOT, dotted, imports, parsed, python_files, text

SOURCES = python_files(*PACKAGES)
EVERYTHING = python_files(*PACKAGES, "tests", "scripts", "configs")
FILE_LINES = 400
KERNEL_FILE_LINES = 700
FUNCTION_LINES = 80

# Words that name a public model family. Op kinds (mamba, retnet …) are no families.
FAMILIES = re.compile(
    r"llama|smollm|qwen|mistral|mixtral|gemma|deepseek|falcon|granite|olmo|starcoder|internlm"
    r"|baichuan|chatglm|gpt_?2|gpt_?j|gpt_?neox|gpt_?oss|pythia|bloom|roberta|kimi"
    r"|(?<![a-z])(phi[0-9]|bert|t5|glm[0-9])"
)
# Where such a word is the published name of something else than a model.
OTHER_MEANINGS = {
    "jaxllm/spec/rope.py": "llama3 is a kind of rope scaling",
    "jaxllm/ops/rope.py": "llama3 is a kind of rope scaling",
    "jaxllm/text/pretokens.py": "values of the GGUF key tokenizer.ggml.pre",
}
ROPE_KIND = "Llama3Scaling"


def functions(path: str):
    """Every function of a file, with its length in lines."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node, (node.end_lineno or node.lineno) - node.lineno + 1


def test_there_is_something_to_check():
    assert len(SOURCES) > 20


def test_files_are_short():
    def limit(path):
        return KERNEL_FILE_LINES if path.startswith("pallas_kernels/") else FILE_LINES

    counts = {path: text(path).count("\n") for path in EVERYTHING}
    assert {path: n for path, n in counts.items() if n > limit(path)} == {}


def test_functions_are_short():
    long = [
        f"{path}:{node.lineno} {node.name}: {lines} lines"
        for path in EVERYTHING
        if not path.startswith("pallas_kernels/")
        for node, lines in functions(path)
        if lines > FUNCTION_LINES
    ]
    assert long == []


def test_only_nn_imports_flax():
    wrong = [
        f"{path}:{line}"
        for path in SOURCES
        if not path.startswith("jaxllm/nn/")
        for line, name in imports(path)
        if name.split(".")[0] == "flax"
    ]
    assert wrong == []


def test_quant_knows_no_modules():
    wrong = [
        f"{path}:{line} {name}"
        for path in SOURCES
        if path.startswith("jaxllm/quant/")
        for line, name in imports(path)
        if name.startswith("jaxllm.nn")
    ]
    assert wrong == []


def test_only_runtime_reads_the_environment():
    readers = {"os.environ", "os.getenv", "os.environb", "os.putenv", "os.unsetenv"}
    wrong = []
    for path in SOURCES:
        if path == "jaxllm/core/runtime.py":
            continue
        wrong += [f"{path}:{line} {name}" for line, name in imports(path) if name in readers]
        wrong += [
            f"{path}:{node.lineno} {dotted(node)}"
            for node in ast.walk(parsed(path))
            if isinstance(node, ast.Attribute) and dotted(node) in readers
        ]
    assert wrong == []


def test_nothing_is_left_to_do():
    words = re.compile(r"\b(TO" + r"DO|FIX" + r"ME)\b")
    wrong = [
        f"{path}:{number}"
        for path in EVERYTHING
        for number, line in enumerate(text(path).splitlines(), 1)
        if words.search(line)
    ]
    assert wrong == []


def test_no_drawer_for_odds_and_ends():
    drawers = {"utils", "util", "helpers", "helper", "misc", "common"}
    wrong = [path for path in EVERYTHING if drawers & set(path.removesuffix(".py").split("/"))]
    assert wrong == []
    managers = [
        f"{path}:{node.lineno} {node.name}"
        for path in SOURCES
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.ClassDef) and node.name.endswith("Manager")
    ]
    assert managers == []


def identifiers(path: str):
    """Line and text of every name that a file gives or uses (no strings, no comments)."""
    for node in ast.walk(parsed(path)):
        for field in ("id", "attr", "name", "arg", "asname"):
            value = getattr(node, field, None)
            if isinstance(value, str):
                yield getattr(node, "lineno", 0), value


def test_model_names_stay_in_the_zoo():
    wrong = []
    for path in SOURCES:
        if path.startswith("jaxllm/zoo/") or path in OTHER_MEANINGS:
            continue
        for line, name in identifiers(path):
            # The last part only: jaxllm.zoo.<family> is a module's address, not a name of ours.
            word = name.rpartition(".")[2]
            if word != ROPE_KIND and FAMILIES.search(word.lower()):
                wrong.append(f"{path}:{line} {name}")
    assert wrong == []


def test_public_things_have_docstrings():
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    wrong = [
        f"{path}:{node.lineno} {node.name}"
        for path in SOURCES
        for node in parsed(path).body
        if isinstance(node, kinds)
        and not node.name.startswith("_")
        and ast.get_docstring(node) is None
        and not any(dotted(mark).endswith("overload") for mark in node.decorator_list)
    ]
    assert wrong == []


def test_modules_have_docstrings():
    wrong = [path for path in SOURCES if text(path).strip() and not ast.get_docstring(parsed(path))]
    assert wrong == []


@pytest.mark.parametrize("module", ["jaxllm", "jaxllm.core.runtime", "jaxllm.zoo.pull"])
def test_import_is_light(module):
    heavy = ("jax", "jaxlib", "flax", "huggingface_hub", "gguf", "tokenizers")
    assert imported(module, heavy) == []


def test_kernels_are_imported_when_one_is_asked_for():
    """Pallas takes a third of a second, which a start without a kernel need not wait for."""
    kernels = ("jax.experimental.pallas", "jax.experimental.mosaic", "jax.experimental.mosaic.gpu")
    assert imported("jaxllm.model", kernels) == []


def imported(module, names):
    """Which of the names a fresh process has after importing a module."""
    code = f"import sys, {module}; print(*[name for name in {names} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()
