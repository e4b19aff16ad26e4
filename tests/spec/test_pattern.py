"""Layer patterns against a tiny expander of our own, and texts that are none."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.errors import ConfigError
from jaxllm.spec.pattern import compress, parse

names = st.sampled_from(["G", "L", "moe", "attn_1", "_x"])
blank = st.sampled_from([" ", "  ", "\t", "\n"])


@st.composite
def items(draw, depth=2):
    """(text, names) of one item: a name or a group, perhaps repeated."""
    if depth and draw(st.booleans()):
        inner = draw(st.lists(items(depth - 1), min_size=1, max_size=3))
        text = "(" + draw(blank).join(t for t, _ in inner) + ")"
        out = [name for _, part in inner for name in part]
    else:
        text = draw(names)
        out = [text]
    if draw(st.booleans()):
        times = draw(st.integers(1, 3))
        text += draw(st.sampled_from(["*", " * ", "* "])) + str(times)
        out = out * times
    return text, out


@settings(max_examples=200, deadline=None)
@given(st.lists(items(), min_size=1, max_size=4), blank)
def test_patterns_expand(parts, separator):
    text = separator.join(t for t, _ in parts)
    wanted = [name for _, out in parts for name in out]
    pattern = parse(text)
    assert list(pattern.names) == wanted
    place = 0
    for segment in pattern.segments:
        assert segment.start == place
        place = segment.stop
        for layer in range(segment.start + segment.unit, segment.stop):
            assert wanted[layer] == wanted[layer - segment.unit]
    assert place == len(wanted)


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("G*12", "0:12"),
        ("G", "0"),
        ("G G", "0 1"),
        ("(L*5 G)*5 L*4", "0:30:6 30:34"),
        ("A (L G)*2 Z", "0 1:5:2 5"),
        ("(L G)", "0 1"),
        ("((L*2 G)*2 M)*2", "0:14:7"),
        ("G*1 L", "0 1"),
    ],
)
def test_every_repeat_at_the_top_is_one_stack(text, keys):
    assert " ".join(s.key for s in parse(text).segments) == keys


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "empty"),
        ("  ", "empty"),
        ("()", "1 to 10000"),
        ("G*0", "1 to 10000"),
        ("G*10001", "1 to 10000"),
        ("(G*1000)*11", "1 to 10000"),
        ("(G*6000) (G*6000)", "10000"),
        ("G*" + "9" * 5000, "1 to 10000"),
        ("(" * 5000 + "G" + ")" * 5000, "nested"),
        ("(G", "without ')'"),
        ("G)", "without '('"),
        ("*3", "follows no block"),
        ("G*2*3", "follows no block"),
        ("(*3)", "follows no block"),
        ("G*", "unexpected '*'"),
        ("G*x", "unexpected '*'"),
        ("G*-1", "unexpected '*'"),
        ("G,L", "unexpected ','"),
        ("3G", "unexpected '3'"),
        ("G*²", "unexpected '*'"),
    ],
)
def test_texts_that_are_no_pattern(text, said):
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert said in str(caught.value)
    assert len(str(caught.value)) < 300


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="GL*() 019_²x\n\t", max_size=30))
def test_any_text_parses_or_is_a_config_error(text):
    try:
        pattern = parse(text)
    except ConfigError:
        return
    assert 1 <= len(pattern.names) <= 10_000
    assert pattern.segments[-1].stop == len(pattern.names)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["G", "L", "N"]), min_size=1, max_size=30))
def test_a_compressed_list_expands_to_itself(wanted):
    assert list(parse(compress(wanted)).names) == wanted


@pytest.mark.parametrize(
    "text",
    [
        "G*32",
        "G",
        "(L G)*13",
        "(L*5 G)*5 L*4",
        "(R*3 N)*9",
        "(L G)*2 L",
        "D*3 E*58",
        "G L*2",
        "L G L",
        "(M*4 A M*3)*4",
        "A (L G)*3",
    ],
)
def test_the_shortest_pattern_of_known_models(text):
    assert compress(parse(text).names) == text


def test_as_many_layers_as_a_pattern_has():
    assert compress(["G"] * 300) == "G*300"
    for layers in (0, 10_001):
        with pytest.raises(ConfigError, match="1 to 10000 layers"):
            compress(["G"] * layers)
