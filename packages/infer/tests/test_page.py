# SPDX-License-Identifier: Apache-2.0
"""The chat page in a headless Chromium, if installed: streaming, markdown, stop, history, light and dark, a
phone.

If MODELLINK_SCREENSHOTS is set to a folder, screenshots are saved there.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sync_api = pytest.importorskip("playwright.sync_api")
fastapi = pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync"]
ANSWER = ("# Foxes\n\nA **quick** fox, with `code`, a <b>tag</b> and [a link](https://example.com):\n\n- "
          "one\n- two\n\n```python\nprint('<hi>')\n```\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\nThe end 🦊.")
HOSTILE = ("<img src=x onerror=\"document.title='taken'\"> [x](javascript:alert(1)) "
           "<script>document.title='taken'</script>")


@pytest.fixture(scope="module")
def site() -> Iterator[SimpleNamespace]:
    """The page, with a model that streams the text `answer`, a few characters at a time; `asked` holds the
    request bodies."""
    from modellink.core import engine
    from modellink.core.launch import free_port
    from modellink.kernels.device import find
    engine.start(find("cpu"))  # before the server's modules import megatron
    from modellink.infer.server import app as real
    found = SimpleNamespace(answer=ANSWER, pause=0.0, before=0.0, asked=[], left=0)
    app = fastapi.FastAPI()

    async def say(answer: str) -> AsyncIterator[str]:
        done = False
        try:
            await asyncio.sleep(found.before)
            for start in range(0, len(answer), 7):
                delta = {"content": answer[start:start + 7]}
                yield f"data: {json.dumps({'choices': [{'index': 0, 'delta': delta}]})}\n\n"
                await asyncio.sleep(found.pause)
            yield "data: [DONE]\n\n"
            done = True
        finally:
            found.left += not done

    @app.get("/")
    async def page() -> Any:
        text = (Path(real.__file__).parent / "page.html").read_text(encoding="utf-8")
        return fastapi.responses.HTMLResponse(text, headers={"Content-Security-Policy": real.POLICY})

    @app.get("/v1/models")
    async def models() -> Any:
        return {"data": [{"id": "tiny"}]}

    @app.post("/v1/chat/completions")
    async def chat(body: dict[str, Any]) -> Any:
        found.asked.append(body)
        if found.answer is None:
            return fastapi.responses.JSONResponse({"error": {"message": "too many answers wait"}}, 429)
        return fastapi.responses.StreamingResponse(say(found.answer), media_type="text/event-stream")

    server = uvicorn.Server(uvicorn.Config(app, port=(port := free_port()), log_level="warning",
                                           timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run)
    thread.start()
    found.url = f"http://127.0.0.1:{port}"
    yield found
    server.should_exit = True
    thread.join(10)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, site) -> Iterator[Callable[..., Any]]:
    """`visit(width=, dark=)`: the page of a new visitor. Afterwards checks for errors and for requests to
    other sites."""
    site.answer, site.pause, site.before, site.asked, site.left = ANSWER, 0.0, 0.0, [], 0
    contexts, problems = [], []

    def visit(width: int = 1000, height: int = 800, *, dark: bool = False) -> Any:
        context = browser.new_context(viewport={"width": width, "height": height},
                                      color_scheme="dark" if dark else "light")
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: request.url.startswith((site.url, "data:"))
                or problems.append(request.url))
        page.goto(site.url)
        return page
    yield visit
    for context in contexts:
        context.close()
    assert problems == []


def say(page: Any, text: str) -> None:
    page.fill("#text", text)
    page.press("#text", "Enter")


def finished(page: Any) -> None:
    sync_api.expect(page.locator("#send")).to_have_text("Send", timeout=30_000)


def picture(page: Any, name: str) -> None:
    if folder := os.environ.get("MODELLINK_SCREENSHOTS"):
        page.screenshot(path=str(Path(folder) / f"{name}.png"))


def test_an_answer_is_shown_as_markdown(visit, site):
    page = visit()
    say(page, "Tell me of <b>foxes</b>")
    finished(page)
    answer = page.locator(".assistant").last
    assert answer.locator("h1").inner_text() == "Foxes" and answer.locator("strong").inner_text() == "quick"
    assert answer.locator("li").all_inner_texts() == ["one", "two"]
    assert answer.locator("pre code").inner_text() == "print('<hi>')\n"
    assert answer.locator("td").all_inner_texts() == ["1", "2"]
    assert answer.locator("a").get_attribute("href") == "https://example.com"
    assert "<b>tag</b>" in answer.inner_text()
    assert page.locator(".user").inner_text() == "Tell me of <b>foxes</b>"
    assert page.locator("#model").inner_text() == "tiny"
    picture(page, "light")


def test_an_answer_grows_and_the_button_stops_it(visit, site):
    site.pause, site.answer = 0.1, "word " * 400
    page = visit()
    say(page, "Count")
    sync_api.expect(page.locator(".assistant")).to_contain_text("word word", timeout=30_000)
    first = page.locator(".assistant").inner_text().rsplit(" ", 1)[0]  # the last word may be incomplete
    sync_api.expect(page.locator(".assistant")).to_contain_text(first + " word word word", timeout=30_000)
    assert page.locator("#send").inner_text() == "Stop"
    picture(page, "streaming")
    page.click("#send")
    finished(page)
    assert page.locator(".note").inner_text() == "Stopped."
    deadline = time.monotonic() + 10
    while not site.left and time.monotonic() < deadline:
        time.sleep(0.05)
    assert site.left == 1  # the server noticed


def test_the_conversation_survives_a_reload_until_a_new_chat(visit, site):
    page = visit()
    for text in ("one", "two"):
        say(page, text)
        finished(page)
    assert [message["role"] for message in site.asked[-1]["messages"]] == ["user", "assistant", "user"]
    page.reload()
    assert page.locator(".user").all_inner_texts() == ["one",
                                                       "two"] and page.locator(".assistant").count() == 2
    page.click("#new")
    page.reload()
    assert page.locator(".user").count() == 0


def test_settings_reach_the_model(visit, site):
    page = visit()
    page.click("#open")
    page.fill("#system", "Be kind.")
    page.fill("#temperature", "0.2")
    page.click("dialog button")
    say(page, "Hi")
    finished(page)
    assert site.asked[-1]["messages"][0] == {"role": "system",
                                             "content": "Be kind."} and site.asked[-1]["temperature"] == 0.2


def test_a_hostile_answer_is_text(visit, site):
    site.answer = HOSTILE
    page = visit()
    say(page, "Hi")
    finished(page)
    assert page.title() == "ModelLink"
    assert page.locator(".assistant img, .assistant script, .assistant a").count() == 0


def test_an_error_is_shown(visit, site):
    site.answer = None
    page = visit()
    say(page, "Hi")
    finished(page)
    assert page.locator(".note").inner_text() == "Error: too many answers wait"
    assert page.locator(".user").count() == 0 and page.input_value("#text") == "Hi"  # it can be sent again
    site.answer = "Hello"
    page.press("#text", "Enter")
    finished(page)
    assert site.asked[-1]["messages"] == [{"role": "user", "content": "Hi"}]


def test_an_answer_stopped_before_its_first_piece_leaves_no_turn(visit, site):
    site.before = 60.0
    page = visit()
    say(page, "one")
    sync_api.expect(page.locator("#send")).to_have_text("Stop")
    page.type("#text", "two")
    page.click("#send")
    finished(page)
    assert page.input_value("#text") == "one\ntwo" and page.locator(".user, .assistant").count() == 0
    site.before = 0.0
    page.press("#text", "Enter")
    finished(page)
    assert [message["role"] for message in site.asked[-1]["messages"]] == ["user"]
    page.reload()
    assert page.locator(".user").all_inner_texts() == ["one\ntwo"]


def test_a_new_chat_contains_nothing_of_the_stopped_answer(visit, site):
    site.pause, site.answer = 0.1, "word " * 400
    page = visit()
    say(page, "old")
    sync_api.expect(page.locator(".assistant")).to_contain_text("word word", timeout=30_000)
    page.click("#new")
    finished(page)
    site.pause, site.answer = 0.0, "Hello"
    say(page, "new")
    finished(page)
    page.wait_for_timeout(300)
    assert [message["content"] for message in site.asked[-1]["messages"]] == ["new"]
    assert page.locator("#talk").inner_text().split() == ["new",
                                                          "Hello"] and page.locator(".note").count() == 0
    page.reload()
    assert page.locator(".user, .assistant").all_inner_texts() == ["new", "Hello"]


def test_light_and_dark(visit, site):
    colors = []
    for dark in (False, True):
        page = visit(dark=dark)
        say(page, "Hi")
        finished(page)
        colors.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        picture(page, "dark" if dark else "light")
    assert colors == ["rgb(255, 255, 255)", "rgb(21, 24, 29)"]


def test_a_phone_does_not_scroll_sideways(visit, site):
    site.answer = ANSWER + "\n\n```\n" + "long " * 60 + "\n```\n\n" + "unbreakable" * 20
    page = visit(360, 640)
    say(page, "A question that is somewhat longer than the screen is wide, " * 3)
    finished(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    box = page.locator("#send").bounding_box()
    assert box["x"] + box["width"] <= 360 and box["y"] + box["height"] <= 640 and box["height"] >= 32
    picture(page, "phone")
