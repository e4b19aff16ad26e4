"""Rope scalings: tables of transformers, both dialects, ropes by layer type, mutations, bad files.

Whole models with each scaling stand beside the others in tests/oracle/test_llama.py.
"""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.errors import ConfigError
from jaxllm.ops.rope import frequencies, frequencies_at
from jaxllm.spec.rope import (
    DynamicScaling,
    LinearScaling,
    LongRopeScaling,
    NtkScaling,
    Rope,
    YarnScaling,
)
from jaxllm.zoo.rope import read_rope, read_ropes, usable_context, write_rope, write_ropes
from jaxllm.zoo.table import ConfigReader
from tests.oracle.golden import TOLERANCE, golden, relative
from tests.oracle.mutate import FACTOR, attn, logits

TABLES = json.loads(Path(__file__).with_name("ropes.json").read_text())["tables"]
LOCAL, GLOBAL = "sliding_attention", "full_attention"
THETAS = {LOCAL: 1e4, GLOBAL: 1e6}
LOCAL_KEY = (LOCAL, "rope_local_base_freq")


def read(config, context=64, **options):
    """The rope of a config's keys; every problem is raised."""
    reader = ConfigReader(config, "a/config.json")
    rope = read_rope(reader, context=context, **options)
    return reader.finish(lambda: rope)


def read_both(config, local=LOCAL_KEY, **options):
    reader = ConfigReader(config, "a/config.json")
    ropes = read_ropes(reader, THETAS, context=64, local=local, **options)
    return reader.finish(lambda: ropes)


@pytest.mark.parametrize("name", TABLES)
def test_the_tables_of_the_reference(name):
    config = dict(TABLES[name]["config"])
    head_dim, context = config.pop("head_dim"), config.pop("max_position_embeddings")
    rope = read(config, context)
    rope.check(head_dim)
    for row in TABLES[name]["rows"]:
        if rope.follows_length:
            lengths = jnp.array([[row["length"]]], jnp.int32)
            found = np.asarray(frequencies_at(rope, head_dim, lengths))[0, 0]
        else:
            found = frequencies(rope, head_dim)
        assert found.dtype == np.float32
        error = np.abs(found / np.array(row["frequencies"]) - 1).max()
        print(f"{name}, length {row['length']}: {error:.1e}")
        assert error < 1e-6
        assert abs(rope.magnitude / row["magnitude"] - 1) < 1e-6


def test_every_type_has_a_table():
    ropes = [
        t["config"].get("rope_parameters") or t["config"]["rope_scaling"] for t in TABLES.values()
    ]
    kinds = {rope.get("rope_type") or rope["type"] for rope in ropes}
    assert kinds == {"linear", "dynamic", "yarn", "longrope", "llama3"}


def scaling(**changes):
    """A mutation of the rope's scaling; a function gets the old value."""

    def new(rope):
        old = rope.scaling
        values = {k: v(getattr(old, k)) if callable(v) else v for k, v in changes.items()}
        return dataclasses.replace(rope, scaling=dataclasses.replace(old, **values))

    return attn(rope=new)


def other(new):
    """Another scaling, or none, in place of the rope's."""
    return attn(rope=lambda old: dataclasses.replace(old, scaling=new))


def more(values):
    return tuple(1.02 * v for v in values)


MUTATIONS = {
    "llama_yarn": {
        "no scaling": other(None),
        "linear in place of it": other(LinearScaling(factor=4.0)),
        "factor": scaling(factor=5.0),
        "original context": scaling(original_context=20),
        "beta_fast": scaling(beta_fast=1.0),
        "beta_slow": scaling(beta_slow=0.1),
        "attention_factor": scaling(attention_factor=1.12),
        "mscales": scaling(mscale=1.2, mscale_all_dim=0.6),
        "truncate": scaling(truncate=False),
    },
    "llama_yarn_hub": {
        "beta_fast": scaling(beta_fast=1.6),
        "beta_slow": scaling(beta_slow=0.2),
        "mscale": scaling(mscale=1.0),
        "mscale_all_dim": scaling(mscale_all_dim=0.8),
        "no mscales": scaling(mscale=None, mscale_all_dim=None),
        "truncate": scaling(truncate=True),
    },
    "llama_dynamic": {
        "no scaling": other(None),
        "a fixed base in place of it": other(NtkScaling(factor=4.5)),
        "factor": scaling(factor=4.5),
        "original context": scaling(original_context=17),
    },
    "llama_dynamic_hub": {
        "no scaling": other(None),
        "factor": scaling(factor=2.5),
    },
    "llama_longrope": {
        "no scaling": other(None),
        "long_factor": scaling(long_factor=more),
        "factor": scaling(factor=5.0),
        "original context": scaling(original_context=20),
        "attention_factor": scaling(attention_factor=1.0),
        "the short list": scaling(original_context=28),
    },
    "llama_longrope_hub": {
        "short_factor": scaling(short_factor=more),
        "factor": scaling(factor=2.5),
        "the long list": scaling(original_context=27),
    },
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_every_field_moves_the_logits(name, models):
    model, want = models(name), golden(name)
    assert relative(logits(model.spec, model.params, want.ids), want.logits) < TOLERANCE
    for what, mutate in MUTATIONS[name].items():
        spec = mutate(model.spec)
        assert spec != model.spec
        moved = relative(logits(spec, model.params, want.ids), want.logits)
        print(f"{name}, {what}: {moved:.1e}")
        assert moved > FACTOR * TOLERANCE, what


def test_a_fixed_base_is_what_dynamic_scaling_has_at_one_length(models):
    """1 + 4 (28 - 16) / 16 = 4 at the 28 tokens of the golden: a check of `ntk`, too."""
    model, want = models("llama_dynamic"), golden("llama_dynamic")
    spec = other(NtkScaling(factor=4.0))(model.spec)
    assert relative(logits(spec, model.params, want.ids), want.logits) < TOLERANCE


def test_a_list_that_is_not_chosen_moves_nothing(models):
    for name, field in {
        "llama_longrope": "short_factor",
        "llama_longrope_hub": "long_factor",
    }.items():
        model, want = models(name), golden(name)
        spec = scaling(**{field: more})(model.spec)
        assert relative(logits(spec, model.params, want.ids), want.logits) < TOLERANCE


LONG = {"short_factor": [1.0, 1.5], "long_factor": [2, 3.5]}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
READ = {
    "nothing": ({}, Rope()),
    "older": (
        {"rope_theta": 5e5, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        Rope(theta=5e5, scaling=DynamicScaling(factor=2.0, original_context=64)),
    ),
    "both words for the type": (
        {"rope_scaling": {"type": "ntk", "rope_type": "ntk", "factor": 2}},
        Rope(scaling=NtkScaling(factor=2.0)),
    ),
    "newer": (
        {"rope_parameters": YARN | {"rope_theta": 5e5, "truncate": False}},
        Rope(
            theta=5e5, scaling=YarnScaling(factor=4.0, original_context=16, truncate=False)
        ),
    ),
    "yarn of the ratio": (
        {"rope_parameters": YARN | {"factor": None}},
        Rope(scaling=YarnScaling(factor=4.0, original_context=16)),
    ),
    "yarn without an original context": (
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        Rope(scaling=YarnScaling(factor=4.0, original_context=64)),
    ),
    "nulls and zeros of yarn": (
        {"rope_parameters": YARN | {"beta_fast": 0, "mscale": 0, "attention_factor": None}},
        Rope(scaling=YarnScaling(factor=4.0, original_context=16)),
    ),
    "longrope of the ratio": (
        {"rope_scaling": LONG | {"type": "su"}, "original_max_position_embeddings": 16},
        Rope(
            scaling=LongRopeScaling(
                short_factor=(1.0, 1.5), long_factor=(2.0, 3.5), factor=4.0, original_context=16
            )
        ),
    ),
    "the file's own original context goes first": (
        {"rope_parameters": YARN, "original_max_position_embeddings": 32},
        Rope(scaling=YarnScaling(factor=4.0, original_context=32)),
    ),
    "an original context of no scaling": ({"original_max_position_embeddings": 32}, Rope()),
    "a whole head": ({"partial_rotary_factor": 1.0}, Rope()),
}  # fmt: skip


@pytest.mark.parametrize("what", READ)
def test_reading(what):
    config, wanted = READ[what]
    assert read(config) == wanted


@pytest.mark.parametrize("what", READ)
def test_what_is_written_is_read_again(what):
    wanted = READ[what][1]
    written = write_rope(wanted, context=usable_context(64, wanted))
    declared = written.pop("max_position_embeddings")
    assert declared == (64 if "yarn without" not in what else 256)
    assert read(written, declared) == wanted
    assert usable_context(declared, wanted) == usable_context(64, wanted)
    both = write_ropes({LOCAL: Rope(theta=7.0), GLOBAL: wanted}, context=64)
    del both["max_position_embeddings"]
    assert read_both(both) == {LOCAL: Rope(theta=7.0), GLOBAL: wanted}


def test_a_part_of_a_head():
    inside = {"rope_parameters": {"partial_rotary_factor": 0.25, "rope_theta": 5.0}}
    wanted = Rope(theta=5.0, fraction=0.25)
    assert read(inside, fraction=1.0) == wanted
    assert read({"rope_theta": 5, "partial_rotary_factor": 0.25}, fraction=0.5) == wanted
    assert read({"rope_theta": 5}, fraction=0.25) == wanted
    written = write_rope(wanted, context=64)
    assert written["partial_rotary_factor"] == 0.25
    del written["max_position_embeddings"]
    assert read(written, fraction=1.0) == wanted
    assert read({}, layout="interleaved") == Rope(layout="interleaved")
    for config in (inside, {"partial_rotary_factor": 0.25}):
        with pytest.raises(ConfigError, match=r"partial_rotary_factor 0.25 is not supported"):
            read(config)


def test_ropes_by_layer_type():
    linear = {"rope_type": "linear", "factor": 8.0}
    wanted = {LOCAL: Rope(theta=1e4), GLOBAL: Rope(theta=1e6, scaling=LinearScaling(factor=8.0))}
    newer = {"rope_parameters": {LOCAL: {"rope_type": "default"}, GLOBAL: linear}}
    assert read_both(newer) == wanted
    assert read_both({"rope_parameters": {GLOBAL: linear, LOCAL: None}}) == wanted
    assert read_both({"rope_scaling": linear}) == wanted
    older = {"rope_scaling": linear, "rope_theta": 5e5, "rope_local_base_freq": 2e4}
    assert read_both(older) == {
        LOCAL: Rope(theta=2e4),
        GLOBAL: Rope(theta=5e5, scaling=LinearScaling(factor=8.0)),
    }
    # Where no layer type has a key of its own, one object holds for all.
    shared = Rope(theta=5e5, scaling=LinearScaling(factor=8.0))
    config = {"rope_parameters": linear | {"rope_theta": 5e5}}
    assert read_both(config, local=None) == {LOCAL: shared, GLOBAL: shared}


def test_how_many_tokens_a_model_holds():
    yarn = Rope(scaling=YarnScaling(factor=4.0, original_context=16))
    dynamic = Rope(scaling=DynamicScaling(factor=2.5, original_context=64))
    assert usable_context(64, None, Rope(), Rope(scaling=LinearScaling(factor=4.0))) == 64
    assert usable_context(64, yarn) == 64  # the scaled context is declared
    assert usable_context(16, yarn) == 64
    assert usable_context(64, Rope(), dynamic) == 160
    assert write_rope(dynamic, context=160)["max_position_embeddings"] == 64


WRONG = {
    "unknown type": ({"rope_scaling": {"type": "yarm", "factor": 2.0}},
                     "rope_type 'yarm' is unknown; did you mean 'yarn'"),
    "no factor": ({"rope_scaling": {"type": "dynamic"}}, "factor is missing"),
    "no factor of yarn": ({"rope_scaling": {"type": "yarn"}}, "factor is missing"),
    "no factor of ntk": ({"rope_scaling": {"type": "ntk"}}, "factor is missing"),
    "factor below 1": ({"rope_parameters": YARN | {"factor": 0.5}}, "factor is ≥ 1"),
    "no lists": ({"rope_scaling": {"type": "longrope"}}, "long_factor is missing"),
    "a list of words": ({"rope_scaling": LONG | {"type": "longrope", "short_factor": ["1"]}},
                        "short_factor is ['1']"),
    "a factor of nought": ({"rope_scaling": LONG | {"type": "longrope", "short_factor": [0, 1]}},
                           "every short_factor is positive"),
    "betas": ({"rope_parameters": YARN | {"beta_fast": 1.0, "beta_slow": 2.0}}, "beta_fast ≥"),
    "a key of another type": ({"rope_parameters": YARN | {"low_freq_factor": 1.0}},
                              "'low_freq_factor'"),
    "dynamic counts from the context": (
        {"rope_scaling": {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 8}},
        "differs from max_position_embeddings"),
    "base of yarn": ({"rope_parameters": YARN | {"rope_theta": 1.0}}, "theta is over 1"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_wrong_files_are_errors_that_name_file_and_key(what):
    config, expected = WRONG[what]
    with pytest.raises(ConfigError) as caught:
        read(config)
    message = str(caught.value)
    assert message.startswith("a/config.json: rope_")
    assert expected in message


def test_wrong_ropes_by_layer_type():
    wrong = {
        "rope_parameters.full_attention: rope_type 'spiral'": {GLOBAL: {"rope_type": "spiral"}},
        "unknown layer type 'conv'": {GLOBAL: {}, "conv": {}},
        "full_attention is 3": {GLOBAL: 3},
        "names no layer type": {"rope_type": "linear", "factor": 2.0},
    }
    for expected, parameters in wrong.items():
        with pytest.raises(
            ConfigError, match=rf"^a/config.json: rope_parameters.*{expected[-12:]}"
        ):
            read_both({"rope_parameters": parameters})
