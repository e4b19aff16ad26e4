"""`jaxllm pull data:NAME`: what comes is what was promised, or nothing is kept."""

import dataclasses
import hashlib
import http.server
import socket
import threading

import pytest

from jaxllm.cli.main import main
from jaxllm.data import download
from jaxllm.data.download import CATALOGUE, local_path, pull_data
from jaxllm.errors import ConfigError, WeightsError

CONTENT = b"words of a poet\n" * 50


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A catalogue with one file on a server of this machine, and a cache of its own."""
    (tmp_path / "poet.txt").write_bytes(CONTENT)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(tmp_path))

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    entry = download.DataFile(
        address=f"http://127.0.0.1:{server.server_port}/poet.txt",
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        size_bytes=len(CONTENT),
        name="poet.txt",
    )
    monkeypatch.setattr(download, "CATALOGUE", {"poet": entry})
    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path / "cache"))
    yield entry
    server.shutdown()
    thread.join()
    server.server_close()


def change(monkeypatch, entry, **fields):
    monkeypatch.setattr(download, "CATALOGUE", {"poet": dataclasses.replace(entry, **fields)})


def kept(tmp_path):
    return [p.name for p in (tmp_path / "cache" / "data").glob("*")]


def test_it_is_fetched_once(served, tmp_path, capsys, monkeypatch):
    with pytest.raises(ConfigError, match="jaxllm pull data:poet"):
        local_path("data:poet")
    assert main(["pull", "data:poet"]) == 0
    out = capsys.readouterr().out.strip()
    assert local_path("data:poet").read_bytes() == CONTENT and out == str(local_path("data:poet"))
    change(monkeypatch, served, address="http://127.0.0.1:1/gone")
    assert pull_data("data:poet") == local_path("data:poet")


def test_a_damaged_copy_is_fetched_again(served):
    pull_data("data:poet").write_bytes(b"bad")
    assert pull_data("data:poet").read_bytes() == CONTENT


@pytest.mark.parametrize("content", [CONTENT[:-1], CONTENT + b"x", b"", CONTENT[:-1] + b"x"])
def test_something_else_is_refused(served, tmp_path, content):
    (tmp_path / "poet.txt").write_bytes(content)
    with pytest.raises(WeightsError, match="refused: what http"):
        pull_data("data:poet")
    assert kept(tmp_path) == []


def test_no_network_and_no_file(served, tmp_path, monkeypatch, capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    change(monkeypatch, served, address=f"http://127.0.0.1:{port}/poet.txt")
    assert main(["pull", "data:poet"]) == 2
    assert "no network?" in capsys.readouterr().err
    change(monkeypatch, served, address=served.address + ".absent")
    with pytest.raises(WeightsError, match="answered 404"):
        pull_data("data:poet")
    assert kept(tmp_path) == []


def test_an_unknown_name(capsys):
    assert main(["pull", "data:tinyshakespear"]) == 2
    assert "did you mean 'tinyshakespeare'" in capsys.readouterr().err


def test_the_catalogue():
    poet = CATALOGUE["tinyshakespeare"]
    assert poet.sha256.startswith("86c4e6aa") and poet.sha256.endswith("565ed")
    assert all(len(file.sha256) == 64 for file in CATALOGUE.values())
