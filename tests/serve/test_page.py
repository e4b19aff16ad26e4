"""The chat page in a headless Chromium, and how it is reached."""

import base64
import re
import shutil
import time

import httpx
import pytest

from jaxllm.serve.http.config import ServerConfig
from jaxllm.serve.http.page import page
from tests.serve.test_engine import settled
from tests.serve.test_http import KEY, serving

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))),
    None,
)
OPEN = ServerConfig(port=0, max_tokens=64)


@pytest.fixture(scope="module")
def open_address(engine):
    """A server without a key."""
    with serving(engine, OPEN) as server:
        yield f"http://127.0.0.1:{server.port}"


@pytest.fixture(scope="module")
def address(engine):
    with serving(engine) as server:
        yield f"http://127.0.0.1:{server.port}"


def basic(password):
    return {"Authorization": "Basic " + base64.b64encode(f"me:{password}".encode()).decode()}


def test_the_key_covers_the_page(address):
    """A browser asks for it; what it then sends by itself opens the page and nothing else."""
    reply = httpx.get(address)
    assert reply.status_code == 401
    assert reply.headers["www-authenticate"].startswith("Basic ")
    assert httpx.get(address, headers=basic("wrong")).status_code == 401
    assert httpx.get(address, headers={"Authorization": "Basic =!"}).status_code == 401
    for good in (basic(KEY), {"Authorization": f"Bearer {KEY}"}):
        assert httpx.get(address, headers=good).status_code == 200
    reply = httpx.get(address + "/v1/models", headers=basic(KEY))
    assert (reply.status_code, reply.headers["www-authenticate"]) == (401, "Bearer")


def test_pages_of_others_are_refused_where_there_is_no_key(open_address, address):
    host = open_address.removeprefix("http://")
    own = [{}, {"Origin": open_address}, {"Host": "localhost:80"}, {"Host": "[::1]:8000"}]
    for headers in own:
        assert httpx.get(open_address + "/v1/models", headers=headers).status_code == 200
    foreign = [
        {"Origin": "https://example.org"}, {"Origin": "null"}, {"Origin": f"http://{host}0"},
        {"Host": "rebound.example:8000"}, {"Host": "192.168.0.3"}, {"Origin": "http://["},
    ]  # fmt: skip
    for headers in foreign:
        reply = httpx.get(open_address + "/v1/models", headers=headers)
        assert (reply.status_code, reply.json()["error"]["code"]) == (403, "foreign_origin")
        keyed = headers | {"Authorization": f"Bearer {KEY}"}
        assert httpx.get(address + "/v1/models", headers=keyed).status_code == 200


def test_the_page_asks_nobody_else():
    """No address but the server's own routes, and a policy that would stop any other."""
    reply = page()
    text = reply.body.decode()
    assert not re.findall(r"(?:https?:)?//[a-z]", text)
    assert "innerHTML" not in text and "document.write" not in text
    policy = reply.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        # Root needs --no-sandbox; the page is our own.
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def tab(browser):
    """A page that notes whatever goes wrong in it, and every address that it asks."""
    tab = browser.new_page()
    tab.set_default_timeout(20_000)
    tab.wrong, tab.asked = [], []
    tab.on("pageerror", lambda error: tab.wrong.append(str(error)))
    tab.on("console", lambda said: tab.wrong.append(said.text) if said.type == "error" else None)
    tab.on("request", lambda request: tab.asked.append(request))
    yield tab
    tab.close()


def said(tab, role="assistant"):
    return tab.locator(f"article.{role} p").all_text_contents()


def test_a_chat_in_a_browser(toy, open_address, tab, tmp_path):
    tab.goto(open_address)
    tab.get_by_role("heading", name="jaxllm toy").wait_for()
    tab.get_by_text("Settings").click()
    tab.get_by_label("Temperature").fill("0")
    tab.get_by_label("Most tokens").fill("12")
    tab.get_by_label("Message").fill("Hi")
    tab.keyboard.press("Enter")
    tab.get_by_role("status").get_by_text("tokens/s, cut off").wait_for()
    first = toy.generate([{"role": "user", "content": "Hi"}], max_tokens=12).text
    assert (said(tab, "user"), said(tab)) == (["Hi"], [first])
    messages = [
        {"role": "system", "content": "Be"},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "<b>x"},
    ]
    tab.get_by_label("System prompt").fill("Be")
    tab.get_by_label("Message").fill("<b>x")
    with tab.expect_request("**/v1/chat/completions") as request:
        tab.get_by_role("button", name="Send").click()
    assert request.value.post_data_json["messages"] == messages
    tab.locator("#send:enabled").wait_for()
    assert said(tab)[1] == toy.generate(messages, max_tokens=12).text
    assert tab.locator("article b").count() == 0  # text, not markup
    tab.get_by_role("button", name="New chat").click()
    assert said(tab) == []
    assert (tab.wrong, {r.url.removeprefix(open_address) for r in tab.asked}) == (
        [],
        {"/", "/v1/models", "/v1/chat/completions"},
    )
    assert tab.evaluate("localStorage.length + sessionStorage.length + document.cookie.length") == 0


def test_no_script_of_an_answer_would_run(open_address, tab):
    """The policy holds even where markup came into the page."""
    tab.goto(open_address)
    tab.get_by_role("heading", name="jaxllm toy").wait_for()
    tab.evaluate("""() => {
        const script = document.createElement('script');
        script.textContent = 'document.title = "run"';
        document.body.append(script);
        const picture = document.createElement('img');
        picture.src = 'https://example.org/x.png';
        document.body.append(picture);
    }""")
    assert "toy" in tab.title()
    assert len(tab.wrong) == 2
    assert all("Content Security Policy" in said for said in tab.wrong)


def test_stopping_frees_the_pages(engine, open_address, tab, monkeypatch):
    real = engine.runner.dispatch
    monkeypatch.setattr(engine.runner, "dispatch", lambda turns: (time.sleep(0.1), real(turns))[1])
    tab.goto(open_address)
    tab.get_by_label("Message").fill("Hi")
    tab.keyboard.press("Enter")
    tab.locator("article.assistant p", has_text=re.compile("...", re.DOTALL)).wait_for()
    tab.get_by_role("button", name="Stop").click()
    tab.get_by_role("status").get_by_text("Stopped.").wait_for()
    settled(engine)
    assert len(said(tab)[0]) > 2  # what came stays
    assert tab.get_by_role("button", name="Send").is_enabled()


def test_a_key_and_errors(address, browser, tab):
    context = browser.new_context(http_credentials={"username": "me", "password": KEY})
    tab = context.new_page()
    tab.set_default_timeout(20_000)
    tab.goto(address)
    tab.locator("#more[open]").wait_for()  # asks for the key
    tab.get_by_label("Message").fill("Hi")
    tab.keyboard.press("Enter")
    tab.get_by_role("alert").get_by_text("API key").wait_for()
    assert tab.get_by_label("Message").input_value() == "Hi"  # nothing is lost
    tab.get_by_label("API key").fill(KEY)
    tab.get_by_label("Most tokens").fill("9999")
    tab.get_by_role("button", name="Send").click()
    tab.get_by_role("alert").get_by_text("max_tokens is in 1..64").wait_for()
    tab.get_by_label("Most tokens").fill("3")
    tab.get_by_role("button", name="Send").click()
    tab.get_by_role("status").get_by_text("3 out").wait_for()
    assert tab.get_by_role("alert").count() == 0
    context.close()


def test_it_is_readable_in_the_dark_and_on_a_phone(open_address, browser):
    """Every field has a name, contrast is enough, nothing is wider than the screen."""
    for scheme in ("light", "dark"):
        context = browser.new_context(
            color_scheme=scheme, viewport={"width": 360, "height": 640}, has_touch=True
        )
        tab = context.new_page()
        tab.goto(open_address)
        tab.get_by_text("Settings").click()
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
        unnamed = (
            "[...document.querySelectorAll('input,textarea')].filter(x => !x.labels.length).length"
        )
        assert tab.evaluate(unnamed) == 0
        colours = "(s => [s.color, s.backgroundColor])(getComputedStyle(document.body))"
        ink, paper = (sum(map(int, re.findall(r"\d+", c)[:3])) for c in tab.evaluate(colours))
        assert (ink < paper - 400) if scheme == "light" else (ink > paper + 400)
        context.close()
