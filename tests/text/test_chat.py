"""Chat templates: checked messages, the usual conventions, and strangers' code that is bounded."""

import os
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from jaxllm.errors import ConfigError, WeightsError
from jaxllm.text import chat
from jaxllm.text.chat import ChatLimits, check_messages, check_tools, render_template

USER = {"role": "user", "content": "hi"}
SHORT = ChatLimits(time_s=0.4)


def test_good_messages_pass():
    parts = [{"type": "text", "text": "hi"}, {"type": "image", "url": "x"}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    messages = [USER, {"role": "user", "content": parts, "name": None}, call]
    checked = check_messages(tuple(messages))
    assert checked[0] == USER
    assert checked[1] == {"role": "user", "content": parts}
    assert checked[2] == {"role": "assistant", "tool_calls": [{"name": "f"}]}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hi", r"messages must be a list of dicts .*, not 'hi'"),
        (None, r"not nothing"),
        ([], r"messages is empty"),
        (["hi"], r"messages\[0\] must be a dict"),
        ([USER, {"content": "x"}], r"messages\[1\].role must be a string"),
        ([{"role": 1, "content": "x"}], r"messages\[0\].role must be a string .*, not int"),
        ([{"role": "user"}], r"messages\[0\] has no content"),
        ([{"role": "user", "content": 5}], r"messages\[0\].content must be .*, not int"),
        ([{"role": "user", "content": ["x"]}], r"messages\[0\].content\[0\] must be a dict"),
        (
            [{"role": "user", "content": [{"text": "x"}]}],
            r"content\[0\] must be a dict with a type",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], r"content\[0\].text must be a string"),
        ([{**USER, 3: "x"}], r"messages\[0\] has the key 3"),
    ],
)
def test_bad_messages_are_named(messages, message):
    with pytest.raises(ConfigError, match=message):
        check_messages(messages)


def test_tools_are_checked():
    assert check_tools(None) is None
    assert check_tools(({"name": "f"},)) == [{"name": "f"}]
    for tools in ("f", ["f"], {"name": "f"}):
        with pytest.raises(ConfigError, match="tools must be a list of dicts"):
            check_tools(tools)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("  {% if true %}\n  a\n  {% endif %}\nb", "  a\nb"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% for i in [1, 2] %}{% continue %}x{% endfor %}", ""),
        ("{{ {'a': '<é>'} | tojson }}", '{"a": "<é>"}'),
        ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
        ("{{ 'é' | tojson(ensure_ascii=true) }}", '"\\u00e9"'),
        ("a{% generation %}{{ x }}{% endgeneration %}c", "a\ud83dc"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{% set ns = namespace(n=1) %}{% set ns.n = 2 %}{{ ns.n }}", "2"),
        ("{{ '-' * 3 }}{{ 3 * [1] }}{{ 2 ** 3 }}{{ 2 * 3.5 }}", "---[1, 1, 1]87.0"),
        ("{{ ' a '.strip() }}{{ messages[0].role }}{{ absent }}", "auser"),
    ],
)
def test_conventions(template, text):
    assert render_template(template, {"messages": [USER], "x": "\ud83d"}) == text


DEEP = "{% set ns = namespace(x=['a']) %}{% for i in range(60) %}%s{% endfor %}{{ ns.x }}"
BOMBS = {
    "range": "{% for i in range(10**9) %}{% endfor %}",
    "text": "{{ 'a' * 10**10 }}",
    "list": "{{ 10**10 * [1] }}",
    "power": "{{ 10 ** 10 ** 10 ** 10 ** 10 }}",
    "product": "{% set ns = namespace(x=9) %}{% for i in range(99) %}"
    "{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "pad": "{{ 'a' | center(10**10) }}",
    "format": "{{ '{:>9999999999}'.format(1) }}",
    "output": "{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
    "class": "{{ ''.__class__.__mro__ }}",
    "globals": "{{ cycler.__init__.__globals__ }}",
    "change": "{{ messages.append(1) }}",
    "include": "{% include 'x' %}",
    "syntax": "{% for %}",
    "undefined": "{{ a.b }}",
    "types": "{{ 'a' + 1 }}",
}
SLOW = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "branches": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}",
    "nested": DEEP.replace("%s", "{% set ns.x = [ns.x, ns.x] %}"),
    "doubling": DEEP.replace("%s", "{% set ns.x = ns.x ~ ns.x %}"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_wrong_templates_fail_at_once(name):
    render_template("", {})  # the worker's start does not count
    start = time.monotonic()
    with pytest.raises(WeightsError, match="chat template failed"):
        render_template(BOMBS[name], {"messages": [USER]})
    assert time.monotonic() - start < 60  # no hang


@pytest.mark.parametrize("name", SLOW)
def test_slow_templates_are_ended_in_any_thread(name):
    caught = []

    def run():
        start = time.monotonic()
        try:
            render_template(SLOW[name], {}, limits=SHORT)
        except WeightsError as error:
            caught.append((str(error), time.monotonic() - start))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(timeout=60)
    ((message, seconds),) = caught
    assert "longer than 0.4 s" in message or "memory" in message
    assert seconds < 30
    assert render_template("{{ x }}", {"x": 1}) == "1"  # the next one has a new worker


def test_a_refusal_is_the_callers_mistake():
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ConfigError, match="refuses these messages: roles must alternate"):
        render_template(template, {})


@pytest.mark.parametrize("value", [{1, 2}, object(), b"x"])
def test_variables_are_json(value):
    with pytest.raises(ConfigError, match="plain JSON values"):
        render_template("{{ x }}", {"x": value})


@pytest.mark.parametrize(
    "change", [{"time_s": 0.0}, {"time_s": 1e9}, {"memory_bytes": 1}, {"output_chars": 0}]
)
def test_limits_are_checked(change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        ChatLimits(**change)


def test_long_texts_pass_and_the_output_is_bounded():
    long = "x\u00e9" * 500_000
    assert render_template("{{ x }}", {"x": long}) == long
    with pytest.raises(WeightsError, match="more than 10 characters"):
        render_template("{{ x }}", {"x": "x" * 11}, limits=ChatLimits(output_chars=10))


def test_one_worker_serves_all_threads():
    render_template("", {})
    process = chat._worker.process
    out = {}

    def run(i):
        out[i] = render_template("{{ i }}", {"i": i})

    threads = [threading.Thread(target=run, args=(i,)) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert out == {i: str(i) for i in range(20)}
    assert chat._worker.process is process


def test_a_dead_worker_is_replaced():
    render_template("", {})
    process = chat._worker.process
    process.kill()
    process.wait()
    assert render_template("{{ x }}", {"x": 1}) == "1"
    assert chat._worker.process is not process


def run_program(code: str) -> list[str]:
    """Run code in an interpreter of its own, with leaks as errors; its lines."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


@pytest.mark.parametrize("ending", ["", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_the_worker_ends_with_its_parent(ending):
    code = f"""
    import os, signal
    from jaxllm.text import chat
    chat.render_template("", {{}})
    print(chat._worker.process.pid, flush=True)
    {ending}
    """
    if ending:
        command = [sys.executable, "-c", textwrap.dedent(code)]
        lines = subprocess.run(command, capture_output=True, text=True).stdout.split()
    else:
        lines = run_program(code)
    for _ in range(200):
        if not _alive(int(lines[0])):
            return
        time.sleep(0.05)
    pytest.fail("the worker outlived its parent")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # In a container without an init the dead stay listed.
    done = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return not done.stdout.strip().startswith("Z") and bool(done.stdout.strip())


def test_forks_do_not_share_a_worker():
    code = """
    import os, warnings
    from jaxllm.text import chat
    chat.render_template("", {})
    warnings.simplefilter("ignore")  # a timer's thread may still be ending
    pid = os.fork()
    if pid == 0:
        ok = chat.render_template("{{ x }}", {"x": 1}) == "1"
        chat._worker.stop()
        os._exit(0 if ok else 1)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    print(chat.render_template("{{ x }}", {"x": 2}))
    """
    assert run_program(code) == ["0", "2"]


def test_an_interrupt_leaves_no_stale_answer():
    code = """
    import signal, threading
    from jaxllm.text.chat import render_template
    slow = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    render_template("", {})
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main = threading.main_thread().ident
    threading.Timer(0.3, signal.pthread_kill, (main, signal.SIGINT)).start()
    try:
        render_template(slow, {})
    except KeyboardInterrupt:
        print("interrupted")
    print(render_template("{{ x }}", {"x": 3}))
    """
    assert run_program(code) == ["interrupted", "3"]
