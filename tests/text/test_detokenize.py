"""Streaming: pieces join to the whole, no half characters, stop strings across any cut."""

import json
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxllm.errors import ConfigError
from jaxllm.text.detokenize import Detokenizer, StopMatcher
from jaxllm.text.tokenizer import Tokenizer
from tests.text.toys import byte_tokenizer, score_tokenizer


def with_decoder(decoder) -> Tokenizer:
    """The byte-level toy, its ids read by another decoder."""
    document = json.loads(byte_tokenizer().to_json())
    backend = json.loads(document["backend"]) | {"decoder": decoder}
    return Tokenizer.from_json(json.dumps(document | {"backend": json.dumps(backend)}))


TOKENIZERS = {
    "bytes": byte_tokenizer(),
    "scores": score_tokenizer(),
    "no prefix": score_tokenizer(add_space_prefix=False),
    "none": with_decoder(None),
    "nested": with_decoder(
        {
            "type": "Sequence",
            "decoders": [
                {
                    "type": "ByteLevel",
                    "add_prefix_space": True,
                    "trim_offsets": True,
                    "use_regex": True,
                },
                {"type": "Fuse"},
            ],
        }
    ),
    "metaspace": with_decoder(
        {"type": "Metaspace", "replacement": "h", "prepend_scheme": "always", "split": True}
    ),
    "words": with_decoder({"type": "WordPiece", "prefix": "h", "cleanup": True}),
}
ids_lists = st.lists(st.integers(0, 300), max_size=40)
byte_like = st.lists(st.integers(5, 262), max_size=40)  # mostly invalid UTF-8, in both toys


def pieces(tokenizer: Tokenizer, ids: list[int], **options: bool) -> list[str]:
    stream = Detokenizer(tokenizer, **options)
    return [*map(stream.push, ids), stream.flush()]


@pytest.mark.parametrize("name", TOKENIZERS)
@given(ids=ids_lists | byte_like, skip_special=st.booleans())
@settings(max_examples=250, deadline=None)
def test_pieces_join_to_the_whole(name, ids, skip_special):
    tokenizer = TOKENIZERS[name]
    out = pieces(tokenizer, ids, skip_special=skip_special)
    assert "".join(out) == tokenizer.decode(ids, skip_special=skip_special)


@pytest.mark.parametrize("name", ["bytes", "scores", "nested"])
@given(text=st.text(max_size=20))
@settings(max_examples=200, deadline=None)
def test_valid_text_never_shows_a_broken_character(name, text):
    tokenizer = TOKENIZERS[name]
    text = text.replace("\ufffd", "")
    ids = tokenizer.encode(text, add_special=False)
    assert not any("\ufffd" in piece for piece in pieces(tokenizer, ids))


@given(text=st.text(max_size=20))
@example("é👍🏽")
def test_bytes_come_out_as_soon_as_they_are_a_character(text):
    tokenizer = TOKENIZERS["bytes"]
    stream, sent = Detokenizer(tokenizer), ""
    ids = tokenizer.encode(text, parse_special=False)
    raw = b"".join(_bytes(tokenizer, i) for i in ids)
    seen = 0
    for i in ids:
        sent += stream.push(i)
        seen += len(_bytes(tokenizer, i))
        assert sent == raw[:seen].decode(errors="ignore")


def _bytes(tokenizer: Tokenizer, i: int) -> bytes:
    token = tokenizer.backend.id_to_token(i)
    letters = [tokenizer.backend.id_to_token(6 + b) for b in range(256)]
    if i in (4, 5):  # user-defined tokens are text, the last one outside the alphabet
        return token.encode()
    return bytes(letters.index(letter) for letter in token)


def test_a_broken_character_is_told_when_it_cannot_be_completed():
    stream = Detokenizer(TOKENIZERS["bytes"])
    first = [stream.push(6 + byte) for byte in (0xE2, 0x98, 0x41, 0xFF, 0xC3)]
    assert first == ["", "", "\ufffdA", "\ufffd", ""]
    assert stream.flush() == "\ufffd"
    assert stream.push(6 + 0x42) == "B"  # a new text


def test_a_stream_costs_the_same_at_every_place():
    stream = Detokenizer(TOKENIZERS["scores"])
    calls = []
    backend = stream._backend

    class Counted:
        def id_to_token(self, i):
            return backend.id_to_token(i)

        def decode(self, ids, **options):
            calls.append(len(ids))
            return backend.decode(ids, **options)

    stream._backend = Counted()
    for _ in range(500):
        stream.push(270)
    assert max(calls) <= 2


def reference(text: str, stops: list[str]) -> tuple[str, bool]:
    """The text before the stop string that ends first; of those, the longest."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


@given(
    text=st.text(alphabet="abc", max_size=30),
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=5), max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=8),
)
@settings(max_examples=500, deadline=None)
@example(text="aab", stops=["aab"], cuts=[1, 2])
@example(text="ababc", stops=["abac", "babc"], cuts=[3])
def test_stops_are_found_across_any_cut(text, stops, cuts):
    edges = [0, *sorted(cut for cut in cuts if cut <= len(text)), len(text)]
    matcher, sent, stopped = StopMatcher(stops), "", False
    for start, end in pairwise(edges):
        emitted, stopped = matcher.push(text[start:end])
        sent += emitted
        assert stopped == matcher.stopped
        if not stopped:  # held back is exactly what can still become a stop
            seen = text[:end]
            held = seen[len(sent) :]
            tails = [seen[i:] for i in range(len(seen))]
            longest = next((t for t in tails if any(s.startswith(t) for s in stops)), "")
            assert held == longest
    sent += matcher.flush()
    assert (sent, stopped) == reference(text, stops)


def test_nothing_comes_after_a_stop():
    matcher = StopMatcher(["END"])
    assert matcher.push("one E") == ("one ", False)
    assert matcher.push("NDtwo") == ("", True)
    assert matcher.push("three") == ("", True)
    assert matcher.flush() == ""


def test_without_stops_all_passes():
    matcher = StopMatcher([])
    assert matcher.push("text") == ("text", False)
    assert matcher.flush() == ""


@pytest.mark.parametrize("stops", ["END", ["a", ""]])
def test_stops_are_checked(stops):
    with pytest.raises(ConfigError, match="non-empty strings"):
        StopMatcher(stops)
