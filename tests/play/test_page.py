"""The page itself, served by `bake play`: its answers, and (marked) what a visitor sees in Chromium.

It is served by a process of its own, as users have it.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from urllib.request import Request, urlopen

import pytest
import yaml

from bake.pipeline.recipe import make_recipe
from bake.play import app

PLAY = ["play", "bake-demo", "--direction", "bake-demo", "--multiplier", "1", "--new-tokens", "8"]


@contextmanager
def served(command, folder=None, environment=None):
    """Start a page; yield its address."""
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    watch = threading.Timer(120, process.kill)
    watch.start()
    try:
        said = []
        for line in process.stderr:
            said.append(line)
            if found := re.search(r"the page is at (http\S+?)/?;", line):
                yield found[1]
                break
        else:
            pytest.fail("".join(said))
    finally:
        watch.cancel()
        process.terminate()  # A shell may have started the tests with SIGINT ignored.
        process.communicate(timeout=60)


@pytest.fixture(scope="module")
def address():
    with served([sys.executable, "-m", "bake", *PLAY]) as found:
        yield found


def call(address, name, *data):
    """Ask a named endpoint of a Gradio page; return the last data that it sends."""
    body = json.dumps({"data": data}).encode()
    start = f"{address}/gradio_api/call/{name}"
    with urlopen(Request(start, body, {"Content-Type": "application/json"})) as reply:
        event = json.load(reply)["event_id"]
    last = None
    with urlopen(f"{start}/{event}", timeout=60) as lines:
        kind = ""
        for line in map(bytes.decode, lines):
            kind = line.removeprefix("event: ").strip() if line.startswith("event: ") else kind
            if line.startswith("data: "):
                if kind == "error":
                    raise RuntimeError(line)
                last = json.loads(line.removeprefix("data: ")) or last
    return last


def texts(column):
    """Return what a column of the page holds, message by message."""
    return [app._plain([message])[0]["content"] for message in column["value"]]


def ask(address, text, knobs=(1.0, 40, 90, "")):
    _, left, right = call(address, "answer", text, [], [], 8, 0.0, 0, *knobs)
    return texts(left), texts(right)


def test_it_answers_in_both_columns_at_the_knobs_strength(address):
    left, right = ask(address, "Today was")
    assert left[0] == right[0] == "Today was"
    assert left[1] != right[1]
    same = ask(address, "Today was", (0.0, 40, 90, ""))
    assert same[0] == same[1] == left
    other = ask(address, "Today was", (3.0, 40, 90, "4"))
    assert other[0] == left
    assert other[1] != right


def test_the_knobs_say_what_they_cost_and_how_to_bake_them(address):
    cost, command, recipe = call(address, "describe", -0.5, 20, 60, "")
    assert "KL on neutral text" in cost
    assert command == "bake export bake-demo --direction bake-demo --multiplier -0.5 --band 20:60"
    with urlopen(recipe["value"]["url"]) as file:
        values = yaml.safe_load(file.read())
    assert make_recipe(values, without_output=True).multiplier == -0.5
    cost, command, _ = call(address, "describe", 1, 40, 90, "70")
    assert "layer 70" in cost.replace("&#45;", "-")
    assert command == ""


def test_a_mistake_is_told_in_its_own_words(address):
    with pytest.raises(Exception, match="nothing was typed"):
        ask(address, "  ")


def test_it_listens_on_this_machine_alone(address):
    port = int(address.rstrip("/").rpartition(":")[2])
    host = socket.gethostbyname(socket.gethostname())
    assert address.startswith("http://127.0.0.1:")
    if not host.startswith("127."):
        with pytest.raises(OSError, match="refused"):
            socket.create_connection((host, port), timeout=2)


def test_a_port_that_is_taken_is_one_line(address):
    port = address.rpartition(":")[2]
    command = [sys.executable, "-m", "bake", *PLAY, "--port", port, "-q"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert found.returncode == 1
    assert found.stderr.startswith("bake: error: the page cannot be served: ")
    assert found.stderr.count("\n") == 1


def test_titles_are_shown_as_they_are():
    assert "<" not in app._escape("<b>x</b> [a](b)")


# ------------------------------------------------------------------ in a browser


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.fail(
            "make test-browser needs Chromium on the path, such as Debian's package chromium"
        )
    with playwright.sync_playwright() as tool:
        running = tool.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def visit(browser, address):
    """Return a function: (width, height, colour scheme) → a page that has loaded."""
    opened = []

    def go(width=1280, height=1000, scheme="light"):
        page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        page.problems, page.hosts = [], set()
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.on("request", lambda request: page.hosts.add(request.url.split("/")[2]))
        page.goto(address)
        page.wait_for_selector("#cost strong", timeout=30_000)
        opened.append(page)
        return page

    yield go
    for page in opened:
        assert page.problems == []
        assert all(host.startswith("127.0.0.1") for host in page.hosts if host)
        page.close()


def say(page, text):
    page.fill("#text textarea, #text input", text)
    page.click("#send")


def replies(page, column):
    return page.locator(f"#{column} .bot.message").all_inner_texts()


def wait_for_quiet(page, column="steered"):
    """Wait until a column holds a reply that grows no more; return it."""
    seen, since = "", time.monotonic()
    while time.monotonic() - since < 60:
        now = (replies(page, column) or [""])[-1]
        if now and now == seen:
            return now
        seen = now
        page.wait_for_timeout(700)
    raise AssertionError("no reply came to rest")


@pytest.mark.browser
def test_a_visitor_asks_moves_the_slider_and_gets_another_text(visit):
    page = visit()
    say(page, "Today was")
    first = wait_for_quiet(page)
    base = replies(page, "base")[-1]
    page.click("#new")
    page.wait_for_function("document.querySelectorAll('#steered .bot.message').length === 0")
    slider = page.locator("#multiplier input[type=number]")
    slider.fill("-3.5")
    slider.press("Enter")
    page.wait_for_function(
        "document.querySelector('#command').innerText.includes('-3.5')", timeout=30_000
    )
    say(page, "Today was")
    second = wait_for_quiet(page)
    assert second != first
    assert replies(page, "base")[-1] == base
    assert "m = -3.5" in page.locator("#steered").inner_text()


@pytest.mark.browser
def test_the_downloaded_recipe_says_what_the_sliders_say(visit, tmp_path):
    page = visit()
    slider = page.locator("#multiplier input[type=number]")
    slider.fill("0.75")
    slider.press("Enter")
    page.fill("#layers textarea, #layers input", "3-5")
    page.keyboard.press("Tab")
    page.wait_for_function(
        "document.querySelector('#command').innerText.includes('--layers 3-5')", timeout=30_000
    )
    page.wait_for_function(
        "document.querySelector('#command').innerText.includes('0.75')", timeout=30_000
    )
    with page.expect_download() as waiting:
        page.click("#recipe")
    path = tmp_path / "recipe.yaml"
    waiting.value.save_as(path)
    values = yaml.safe_load(path.read_text())
    assert values == {
        "model": "bake-demo",
        "direction": "bake-demo",
        "multiplier": 0.75,
        "layers": "3-5",
    }


@pytest.mark.browser
def test_stop_ends_an_answer_and_the_next_one_comes(visit):
    page = visit()
    page.get_by_text("How it is sampled").click()
    tokens = page.locator("#tokens input[type=number]")
    tokens.fill("400")
    tokens.press("Enter")
    say(page, "Today was")
    page.wait_for_function("document.querySelectorAll('#steered .bot.message').length > 0")
    page.click("#stop")
    stopped = wait_for_quiet(page)
    page.wait_for_timeout(1500)
    assert replies(page, "steered")[-1] == stopped
    assert len(stopped.split()) < 300
    tokens.fill("5")
    tokens.press("Enter")
    page.click("#new")
    page.wait_for_function("document.querySelectorAll('#steered .bot.message').length === 0")
    say(page, "Now")
    assert wait_for_quiet(page)


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone(visit, scheme):
    page = visit(400, 900, scheme)
    say(page, "Today was")
    wait_for_quiet(page)
    wide = page.evaluate("document.documentElement.scrollWidth")
    assert wide <= 400
    base, steered = page.locator("#base").bounding_box(), page.locator("#steered").bounding_box()
    assert steered["y"] > base["y"] + base["height"] - 1  # Below each other, the base first.
    assert base["width"] > 300
