"""`org/name` against a small hub on the loopback address, and against none at all."""

import contextlib
import hashlib
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import huggingface_hub.constants
import pytest

from jaxllm.errors import CapacityError, WeightsError
from jaxllm.zoo import hub
from jaxllm.zoo import pull as zoo_pull

SHA = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = bytes(range(251)) * 997
GOOD = {
    "config.json": b"{}",
    "tokenizer.json": b"{}",
    "model.safetensors": WEIGHTS,
    "pytorch_model.bin": b"pickle",
    "README.md": b"words",
    "original/consolidated.safetensors": b"again",
}


class Hub(BaseHTTPRequestHandler):
    """The few answers that huggingface_hub asks for; its server carries `files` and the like."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Quiet."""

    def do_HEAD(self):
        self.respond(body=False)

    def do_GET(self):
        self.respond(body=True)

    def respond(self, *, body: bool) -> None:
        state = self.server.state
        state.requests.append((self.command, self.path, self.headers.get("Range")))
        path = self.path.partition("?")[0]
        if state.status != 200:
            self.send(state.status, b"{}", {"X-Error-Code": state.error_code}, body=body)
        elif path.startswith("/api/models/org/name/tree/"):
            entries = [{"type": "file", "path": n, **describe(d)} for n, d in state.files.items()]
            self.send(200, json.dumps(entries).encode(), {}, body=body)
        elif path.startswith("/api/models/org/name"):
            siblings = [{"rfilename": n, **describe(d)} for n, d in state.files.items()]
            info = {"id": "org/name", "sha": SHA, "siblings": siblings}
            self.send(200, json.dumps(info).encode(), {}, body=body)
        else:
            self.send_file(path.rpartition(f"/resolve/{SHA}/")[2], body=body)

    def send_file(self, name: str, *, body: bool) -> None:
        state = self.server.state
        data = state.files[name]
        if name in state.withheld:
            self.send(418, b"", {}, body=False)
            return
        etag = hashlib.sha256(data).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
        sent = state.swapped.get(name, data)
        status = 200
        if asked := self.headers.get("Range"):
            start = int(asked.removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(sent) - 1}/{len(sent)}"
            sent, status = sent[start:], 206
        cut = body and name in state.cut
        if cut:
            state.cut.remove(name)
        self.send(status, sent, headers, body=body, keep=len(sent) // 2 if cut else None)

    def send(self, status, data, headers, *, body: bool, keep: int | None = None) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data[:keep])
        if keep is not None:
            self.close_connection = True


def describe(data: bytes) -> dict:
    entry: dict = {"size": len(data), "oid": hashlib.sha1(data).hexdigest()}
    entry["blobId"] = entry["oid"]
    if len(data) > 1000:
        entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
        entry["lfs"] |= {"oid": entry["lfs"]["sha256"], "pointerSize": 134}
    return entry


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    folder = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return folder


@pytest.fixture
def server(monkeypatch, hub_cache):
    state = SimpleNamespace(
        files=dict(GOOD),
        swapped={},
        cut=set(),
        withheld=set(),
        status=200,
        error_code="",
        requests=[],
    )
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as httpd:
        httpd.daemon_threads = True
        httpd.block_on_close = False
        httpd.state = state  # pyright: ignore[reportAttributeAccessIssue]
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{httpd.server_port}")
        yield state
        httpd.shutdown()
        thread.join()
    with contextlib.suppress(Exception):
        huggingface_hub.close_session()


def test_only_safe_files_of_the_top_are_taken(server, hub_cache):
    notes = []
    folder = zoo_pull.pull("org/name", progress=notes.append)
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert hub_cache in folder.parents
    assert zoo_pull.resolve("org/name") == folder
    assert "3 files" in notes[0]


def test_a_second_pull_downloads_nothing(server):
    folder = zoo_pull.pull("org/name")
    server.requests.clear()
    assert zoo_pull.pull("org/name") == folder
    assert [path for _, path, _ in server.requests if "/resolve/" in path] == []


def test_an_interrupted_file_is_resumed(server, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 4096)
    server.cut = {"model.safetensors"}
    folder = zoo_pull.pull("org/name")
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    ranges = [asked for _, path, asked in server.requests if path.endswith("model.safetensors")]
    assert any(asked and not asked.startswith("bytes=0-") for asked in ranges)


def test_a_later_pull_fetches_only_what_is_missing(server):
    server.withheld = {"model.safetensors"}
    with pytest.raises(WeightsError, match="could not be fetched"):
        zoo_pull.pull("org/name")
    assert hub.cached("org/name") is None
    server.withheld = set()
    server.requests.clear()
    zoo_pull.pull("org/name")
    fetched = [path for command, path, _ in server.requests if command == "GET"]
    files = [path.rpartition("/")[2] for path in fetched if "/resolve/" in path]
    assert files == ["model.safetensors"]


def test_wrong_bytes_are_refused_and_removed(server, hub_cache):
    server.swapped = {"model.safetensors": WEIGHTS[:-1] + b"x"}
    with pytest.raises(WeightsError, match="refused"):
        zoo_pull.pull("org/name")
    assert list(hub_cache.rglob("*.safetensors")) == []
    assert hub.cached("org/name") is None
    server.swapped = {}
    assert (zoo_pull.pull("org/name") / "model.safetensors").read_bytes() == WEIGHTS


def test_no_safetensors_is_said_before_the_download(server):
    del server.files["model.safetensors"]
    with pytest.raises(WeightsError, match=r"no safetensors.*pytorch_model\.bin"):
        zoo_pull.pull("org/name")
    assert not any("/resolve/" in path for _, path, _ in server.requests)


def test_no_room_is_said_before_the_download(server, monkeypatch):
    usage = hub.shutil.disk_usage("/")
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(CapacityError, match="HF_HOME"):
        zoo_pull.pull("org/name")
    assert not any("/resolve/" in path for _, path, _ in server.requests)


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (404, "RepoNotFound", "not found"),
        (403, "GatedRepo", "gated"),
        (401, "", "HF_TOKEN"),
        (418, "", "answered 418"),
    ],
)
def test_the_hubs_refusals_are_one_line(server, status, code, words):
    server.status, server.error_code = status, code
    with pytest.raises(WeightsError, match=words) as caught:
        zoo_pull.pull("org/name")
    assert len(str(caught.value).splitlines()) == 1


def test_without_a_network(hub_cache, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        start = time.monotonic()
        with pytest.raises(WeightsError, match="no network") as caught:
            zoo_pull.pull("org/name")
    assert len(str(caught.value).splitlines()) == 1
    assert time.monotonic() - start < 10
    assert not hub_cache.exists()


def test_a_whole_copy_serves_when_the_hub_does_not(server, monkeypatch):
    folder = zoo_pull.pull("org/name")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notes = []
    assert zoo_pull.pull("org/name", progress=notes.append) == folder
    assert "HF_HUB_OFFLINE" in notes[0]
    (folder / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="HF_HUB_OFFLINE"):
        zoo_pull.pull("org/name")
    with pytest.raises(WeightsError, match="jaxllm pull org/name"):
        zoo_pull.resolve("org/name")


def test_a_sharded_copy_is_whole_only_with_every_shard(server):
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    del server.files["model.safetensors"]
    index = {"weight_map": {"a": shards[0], "b": shards[1]}}
    server.files |= dict.fromkeys(shards, WEIGHTS)
    server.files["model.safetensors.index.json"] = json.dumps(index).encode()
    folder = zoo_pull.pull("org/name")
    assert hub.cached("org/name") == folder
    (folder / shards[1]).unlink()
    assert hub.cached("org/name") is None


@pytest.mark.parametrize("name", ["a", "a/b/c", "/a", "a/", "../b", "a/..", "a b/c", ".a/b"])
def test_what_is_no_repository_name(name):
    assert not hub.is_repository(name)


def test_one_copy_of_the_weights_is_enough():
    names = ["consolidated.safetensors", "model-00001-of-00001.safetensors", "a/b.json", "x.py"]
    assert hub._wanted("a/b", names) == ["model-00001-of-00001.safetensors"]
    assert hub._wanted("a/b", names[:1]) == names[:1]
