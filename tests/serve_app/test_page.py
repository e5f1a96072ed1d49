"""The page at `/` in a real browser: what a person types, sees, hears and can reach by keyboard."""

from __future__ import annotations

import itertools
import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtl_core.predictor import Predictor
from tests.browser import HOLD, Browser, Intercept, Reply, find_browser
from tests.servers import call, local_server

pytestmark = pytest.mark.slow

SENTENCE = "Maria Lopez had the food at the table in Berlin wonderful"
LINES = [SENTENCE, "Zoë had a new phone in São Paulo cold", "had the song on a playlist in Lisbon"]
RUN = "#ask button[type=submit]"
DONE = """document.querySelector("#results").ariaBusy === "false"
  && document.querySelector("#results h2")"""
REFUSED = "document.querySelector('#error').textContent"
# The lowest contrast of any text with what is painted behind it, by the formula of WCAG 2.
CONTRAST = """(() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return Array.from(canvas.getImageData(0, 0, 1, 1).data);
  };
  const light = ([r, g, b]) => [r, g, b]
    .map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (node) => {
    for (let n = node; n; n = n.parentElement) {
      const back = rgba(getComputedStyle(n).backgroundColor);
      if (back[3] === 255) return back;
    }
    return [255, 255, 255];
  };
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const found = [];
  while (walk.nextNode()) {
    const node = walk.currentNode.parentElement;
    if (!walk.currentNode.data.trim() || !node.checkVisibility()) continue;
    const pair = [light(rgba(getComputedStyle(node).color)), light(behind(node))];
    const ratio = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
    found.push([ratio, walk.currentNode.data]);
  }
  return found.sort((a, b) => a[0] - b[0])[0];
})()"""


@pytest.fixture(scope="module")
def page_url(artifact: Path) -> Iterator[str]:
    """Where a server shows its page, under a prefix."""
    with local_server(artifact, runtime="torch-fp32", prefix="/some/prefix") as (url, _):
        yield f"{url}/"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    binary = find_browser()
    if binary is None:
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium-headless-shell)")
    with Browser(binary, tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def browser(chromium: Browser, page_url: str) -> Iterator[Browser]:
    """The browser with the page open; the page must not have stepped out of line at the end."""
    chromium.open(page_url)
    chromium.wait("document.querySelector('#model').textContent")
    yield chromium
    assert chromium.complaints() == []
    origin = page_url.removesuffix("some/prefix/")
    assert {u for u in chromium.requests() if not u.startswith((origin, "data:"))} == set()


def ask(browser: Browser, *lines: str) -> None:
    """Run these lines instead of what stands there and wait for answers."""
    fill(browser, *lines)
    browser.click(RUN)
    browser.wait(DONE)


def fill(browser: Browser, *lines: str) -> None:
    """Put these lines into the box and take old answers off the page."""
    browser.js(f"document.querySelector('#text').value = {json.dumps(chr(10).join(lines))}")
    browser.js("document.querySelector('#results').replaceChildren()")


def percent(share: float) -> str:
    """12.3%, as the page writes it."""
    return f"{np.floor(share * 1000 + 0.5) / 10:.1f}%"


def marks(browser: Browser) -> list[tuple[str, str, int]]:
    """(word, type, code points before it) of each highlight, read from the drawn sentence."""
    found = browser.js("""Array.from(document.querySelectorAll("mark"), (mark) => {
      let before = "";
      for (let node = mark.previousSibling; node; node = node.previousSibling) {
        before = (node.querySelector?.(".word") ?? node).textContent + before;
      }
      const type = mark.querySelector(".type").textContent.match(/\\((\\S+)/)[1];
      return [mark.querySelector(".word").textContent, type, Array.from(before).length];
    })""")
    return [tuple(item) for item in found]


def test_labels_come_with_a_bar_for_each_probability(
    browser: Browser, predictor: Predictor
) -> None:
    ask(browser, SENTENCE)
    answers: Any = predictor.predict([SENTENCE])[0]
    for task in ("topic", "mood"):
        scores = sorted(answers[task]["scores"].items(), key=lambda pair: -pair[1])
        rows = f".bars[aria-label={task}] li"
        numbers = browser.texts(f"{rows} .number")
        names = [name.split(" ")[0] for name in browser.texts(f"{rows} .name")]
        assert list(zip(names, numbers, strict=True)) == [(n, percent(p)) for n, p in scores]
        widths = browser.js(
            f"Array.from(document.querySelectorAll('{rows} .bar'),"
            " (bar) => bar.firstChild.getBoundingClientRect().width / bar.clientWidth)"
        )
        assert widths == pytest.approx([p for _, p in scores], abs=0.02)
    chosen = [name.split(" ")[0] for name in browser.texts(".chosen .name")]
    assert chosen[0] == answers["topic"]["label"]
    assert sorted(chosen[1:]) == sorted(answers["mood"]["labels"])
    assert answers["topic"]["label"] in browser.text("#status")


@pytest.mark.parametrize("before", ["", "🙂👍🏽 ", "👩‍👩‍👧 cafe\u0301 "])
def test_entities_are_highlighted_at_their_characters(
    browser: Browser, predictor: Predictor, before: str
) -> None:
    text = before + SENTENCE
    ask(browser, text)
    entities: Any = predictor.predict([text])[0]["entities"]
    assert any(entity["start"] > len(before) for entity in entities)
    assert marks(browser) == [(e["word"], e["entity_group"], e["start"]) for e in entities]


def test_several_lines_are_answered_and_compared(browser: Browser, predictor: Predictor) -> None:
    ask(browser, LINES[0], "", *LINES[1:], "  ")
    assert len(browser.texts("article")) == 3
    cosines = predictor.similarity(LINES)
    cells = browser.js(
        "Array.from(document.querySelectorAll('.heat tbody tr'),"
        " (row) => Array.from(row.querySelectorAll('td'), (cell) => cell.textContent))"
    )
    assert np.array(cells, float) == pytest.approx(cosines, abs=0.0051)
    assert all(len(cell.split(".")[1]) == 2 for row in cells for cell in row)
    rows = browser.texts(".heat th[scope=row]")
    assert rows == [f"{i} {line}" for i, line in enumerate(LINES, 1)]
    assert browser.texts(".heat th[scope=col]") == ["1", "2", "3"]
    # Of two requests at once a busy server would refuse the second.
    assert sum("/v1/" in url for url in browser.requests()) == 1


def test_names_of_a_wide_heatmap_stay_while_it_is_scrolled(browser: Browser) -> None:
    browser.size(320, 640)
    ask(browser, *LINES * 4)
    left = """(() => {
      const scroll = document.querySelector(".heat").parentElement;
      scroll.scrollLeft = 200;
      const name = document.querySelector(".heat th[scope=row]").getBoundingClientRect();
      return [scroll.scrollLeft, name.left - scroll.getBoundingClientRect().left];
    })()"""
    assert browser.js(left) == [200, 0]


def test_a_long_text_is_answered_and_said_to_be_cut(browser: Browser, predictor: Predictor) -> None:
    long = " and ".join([SENTENCE] * 20)
    ask(browser, SENTENCE, long)
    first, second = browser.texts("article")
    notice = "Longer than the 48 sub-words the model reads at once: labels and similarity are those"
    assert notice not in first
    assert notice in second
    offline: Any = predictor.predict([long])[0]
    topics = browser.texts("article:last-of-type .bars[aria-label=topic] .chosen .name")
    assert topics[0].split(" ")[0] == offline["topic"]["label"]
    assert len(marks(browser)) >= 20
    assert '"truncate":true' in browser.text("details")
    ask(browser, SENTENCE)
    assert "Longer" not in browser.text("#results")
    assert "truncate" not in browser.text("details")


def test_a_model_of_entities_alone_says_whose_beginning_is_compared(
    browser: Browser, page_url: str
) -> None:
    vectors = {"embeddings": [[1.0, 0.0]] * 2, "truncated": [1]}
    body = {"results": [{"entities": []}] * 2, "model": "m", **vectors}
    browser.open(page_url, answering("/v1/predict", 200, body))
    ask(browser, SENTENCE, " and ".join([SENTENCE] * 20))
    first, second = browser.texts("article")
    assert "Longer" not in first
    assert "reads at once: similarity is that of its beginning" in second


def curl_and_json(browser: Browser) -> tuple[list[str], Any]:
    """The words of the command that the page shows, and what it says comes of it."""
    command, _, shown = browser.js("document.querySelector('details pre').textContent").partition(
        "\n\n"
    )
    return shlex.split(command), json.loads(shown)


def answered(command: list[str]) -> Any:
    """What the server says to such a command."""
    curl, url, *options = command
    assert (curl, options[:-1]) == ("curl", ["-H", "Content-Type: application/json", "-d"])
    return call(url, options[-1].encode()).body


@pytest.mark.parametrize(
    "lines", [[f"{SENTENCE}, isn't it?"], [" and ".join([SENTENCE] * 20)], LINES]
)
def test_the_command_shown_gives_the_json_below_it(lines: list[str], browser: Browser) -> None:
    ask(browser, *lines)
    command, shown = curl_and_json(browser)
    assert answered(command) == shown
    assert "scores" in shown["results"][0]["topic"]


def test_one_line_is_not_compared(browser: Browser) -> None:
    ask(browser, *LINES)
    ask(browser, SENTENCE)
    assert browser.texts(".heat") == []


def test_timings_show_what_the_server_says_and_the_round_trip(
    chromium: Browser, page_url: str
) -> None:
    times = {"tokenization": "0.5", "queue": "1.25", "inference": "7", "total": "9.0"}
    headers = {f"x-{name}-time": milliseconds for name, milliseconds in times.items()}
    body = {"results": [{"topic": {"label": "a", "score": 0.5}}], "model": "m"}
    chromium.open(page_url, answering("/v1/predict", 200, body, **headers))
    ask(chromium, SENTENCE)
    assert chromium.texts(".times th[scope=col]") == [
        "tokenization",
        "queue",
        "inference",
        "server total",
        "round trip",
    ]
    *server, round_trip = chromium.texts(".times td.number")
    assert server == ["0.5", "1.3", "7.0", "9.0"]
    assert 0 < float(round_trip) < 30_000


def test_everything_can_be_reached_and_run_by_keyboard(browser: Browser) -> None:
    def tab_to(selector: str) -> None:
        for _ in range(12):
            browser.press("Tab")
            if browser.js(f"document.activeElement.matches('{selector}')"):
                break
        assert browser.js(f"document.activeElement.matches('{selector}:focus-visible')")
        assert browser.js("getComputedStyle(document.activeElement).outlineStyle") == "solid"

    tab_to("#text")
    browser.type(SENTENCE)
    browser.press("Enter", control=True)
    browser.wait(DONE)
    assert browser.js("document.querySelector('#text').value") == SENTENCE
    assert browser.js("document.activeElement.id") == "text"
    browser.js("document.querySelector('#results').replaceChildren()")
    tab_to(RUN)
    browser.press("Enter")
    browser.wait(DONE)
    browser.js("document.querySelector('#results').replaceChildren()")
    tab_to("#examples button")
    browser.press(" ")
    browser.wait(DONE)
    tab_to("[role=region]")
    tab_to("summary")
    browser.press("Enter")
    assert browser.js("document.querySelector('details').open")


def test_assistive_technology_finds_names_and_roles(browser: Browser) -> None:
    ask(browser, *LINES)
    tree = browser.accessibility()
    assert ("textbox", "Text, one sentence a line") in tree
    assert ("button", "Run") in tree
    assert ("heading", "One encoder, many tasks") in tree
    assert ("article", "Sentence 2") in tree
    assert ("list", "topic") in tree
    assert {"status", "alert", "main"} <= {role for role, _ in tree}
    assert ("rowheader", f"1 {LINES[0]}") in tree
    assert ("columnheader", "3") in tree
    assert ("cell", "1.00") in tree
    interactive = {"button", "link", "textbox", "region", "DisclosureTriangle"}
    assert [pair for pair in tree if pair[0] in interactive and not pair[1].strip()] == []
    assert browser.js("document.querySelector('#status').role") == "status"
    assert "3 sentences" in browser.text("#status")


def test_markup_in_a_sentence_stays_text(browser: Browser) -> None:
    hostile = "<img src=x onerror=alert(1)> & Maria"
    script = "<b>Berlin</b> <script>alert(2)</script>"
    ask(browser, hostile, script)
    assert browser.js("document.querySelectorAll('#results :is(img, b, script)').length") == 0
    assert browser.texts(".heat th[scope=row]")[0] == f"1 {hostile}"
    sentences = browser.js(
        "Array.from(document.querySelectorAll('.sentence'), (line) => {"
        " const copy = line.cloneNode(true);"
        " copy.querySelectorAll('.type').forEach((type) => type.remove());"
        " return copy.textContent; })"
    )
    assert sentences == [hostile, script]


def answering(path: str, status: int, body: Any, **headers: str) -> Intercept:
    """Answers requests for this path so, lets others pass."""

    def intercept(request: dict[str, Any]) -> Reply | None:
        if not request["url"].endswith(path):
            return None
        return status, {"Content-Type": "application/json", **headers}, json.dumps(body).encode()

    return intercept


def entity(text: str, word: str, group: str) -> dict[str, Any]:
    """An entity as the server says it, at the word's first place in the text."""
    start = text.index(word)
    found = {"word": word, "start": start, "end": start + len(word)}
    return {"entity_group": group, "score": 0.99, **found}


def test_a_server_with_a_key_gets_it_asked_for(chromium: Browser, page_url: str) -> None:
    seen: list[str | None] = []

    def locked(request: dict[str, Any]) -> Reply | None:
        if not request["url"].endswith(("/info", "/v1/predict")):
            return None
        seen.append(request["headers"].get("Authorization"))
        if seen[-1] == "Bearer open-sesame":
            return None
        body = {"error": "the key is wrong: ask the operator", "error_type": "unauthorized"}
        return 401, {"Content-Type": "application/json"}, json.dumps(body).encode()

    chromium.open(page_url, locked)
    chromium.wait(REFUSED)
    assert "key" in chromium.text("#error")
    assert chromium.js("document.activeElement.id") == "key"
    assert ("textbox", "API key") in chromium.accessibility()
    chromium.type("guess")
    chromium.press("Enter")
    chromium.wait(f"{REFUSED}.includes('wrong')")
    chromium.type("open-sesame")
    chromium.press("Enter")
    chromium.wait("document.querySelector('#model').textContent")
    assert chromium.js("document.querySelector('#unlock').hidden")
    assert chromium.js("document.activeElement.id") == "text"
    chromium.type(SENTENCE)
    chromium.press("Enter", control=True)
    chromium.wait(DONE)
    assert seen == [None, "Bearer guess", *["Bearer open-sesame"] * 3]
    command, _ = curl_and_json(chromium)
    assert "Authorization: Bearer KEY" in command
    assert "open-sesame" not in chromium.text("details")
    assert chromium.js("[localStorage.length, document.cookie, location.search]") == [0, "", ""]
    chromium.reload()
    chromium.wait("document.querySelector('#model').textContent")
    chromium.click("#forget")
    assert chromium.js("[sessionStorage.length, document.querySelector('#forget').hidden]") == [
        0,
        True,
    ]
    assert chromium.complaints() == []


@pytest.mark.parametrize(
    ("status", "message", "told"),
    [
        (413, "at most 32 inputs a request", None),
        (422, "input 1 is too long: 99 tokens, at most 48", None),
        (429, "9 texts are waiting; try again later", "9 texts are waiting; try again in 2 s."),
        (503, "no replica answered; try again", "no replica answered; try again in 2 s."),
        (503, "the model is still loading", "the model is still loading; try again in 2 s."),
        (502, None, "The server answered 502; try again in 2 s."),
    ],
)
def test_a_refusal_says_what_to_change(
    chromium: Browser, page_url: str, status: int, message: str | None, told: str | None
) -> None:
    body = {"error": message, "error_type": "some_type"}
    headers = {"Retry-After": "2"} if told else {}
    chromium.open(page_url, answering("/v1/predict", status, body, **headers))
    fill(chromium, "Zoë")
    chromium.click(RUN)
    chromium.wait(REFUSED)
    assert chromium.text("#error") == (told or message)
    assert chromium.js("document.querySelector('#results').ariaBusy") == "false"
    assert chromium.complaints() == []


def test_a_task_that_failed_is_named_beside_the_answers(chromium: Browser, page_url: str) -> None:
    error = "the head of task 'entities' is not available: it died; try again"
    errors = {"entities": {"error": error, "error_type": "Unhealthy"}}
    body = {"results": [{"topic": {"label": "travel", "score": 0.5}}], "model": "m"}
    replies = iter([{**body, "errors": errors}, body])

    def failing_once(request: dict[str, Any]) -> Reply | None:
        if not request["url"].endswith("/v1/predict"):
            return None
        return 200, {}, json.dumps(next(replies)).encode()

    chromium.open(page_url, failing_once)
    ask(chromium, SENTENCE)
    assert error in chromium.text("#error")
    assert "topic: travel" in chromium.text("#status")
    ask(chromium, SENTENCE)
    assert chromium.text("#error") == ""
    assert chromium.complaints() == []


def test_answers_stay_where_the_model_is_not_described(browser: Browser, page_url: str) -> None:
    body = {"error": "no replica answered", "error_type": "Unhealthy"}
    browser.open(page_url, answering("/info", 503, body))
    browser.wait(REFUSED)
    ask(browser, *LINES)
    assert len(browser.texts("article")) == len(LINES)
    assert browser.text("#error") == ""


def test_a_key_that_only_the_description_misses_is_asked_for(
    chromium: Browser, page_url: str
) -> None:
    body = {"error": "an API key is needed", "error_type": "Unauthorized"}
    refused, asked = answering("/info", 401, body), itertools.count()
    chromium.open(page_url, lambda r: refused(r) if "/info" in r["url"] and next(asked) else None)
    chromium.wait("document.querySelector('#model').textContent")
    fill(chromium, *LINES)
    chromium.click(RUN)
    chromium.wait(REFUSED)
    assert not chromium.js("document.querySelector('#unlock').hidden")


def test_a_model_without_heads_tells_tokens_and_time(browser: Browser, page_url: str) -> None:
    body = {"results": [{}], "model": "m", "usage": {"tokens": 9}}
    browser.open(page_url, answering("/v1/predict", 200, body))
    ask(browser, SENTENCE)
    assert browser.text("#status").startswith("9 tokens, ")


def test_a_wrong_key_is_said_to_be_wrong_after_a_run_too(chromium: Browser, page_url: str) -> None:
    def locked(request: dict[str, Any]) -> Reply | None:
        if not request["url"].endswith(("/info", "/v1/predict")):
            return None
        return 401, {}, json.dumps({"error": "the API key is not valid"}).encode()

    chromium.open(page_url, locked)
    chromium.wait(REFUSED)
    fill(chromium, SENTENCE)
    chromium.click(RUN)
    chromium.wait("document.querySelector('#results').ariaBusy === 'false'")
    fill(chromium, "")
    chromium.js("document.querySelector('#key').value = 'guess'")
    chromium.click("#unlock button")
    chromium.wait(f"{REFUSED}.includes('not valid')")
    assert not chromium.js("document.querySelector('#unlock').hidden")


def test_the_header_is_of_the_model_that_answers(browser: Browser, page_url: str) -> None:
    lengths = iter([64, 128])

    def changing(request: dict[str, Any]) -> Reply | None:
        if not request["url"].endswith("/info"):
            return None
        told = {"model_id": "demo", "tasks": {}, "max_input_length": next(lengths)}
        return 200, {}, json.dumps(told).encode()

    browser.open(page_url, changing)
    browser.wait("document.querySelector('#model').textContent.includes('64 sub-words')")
    ask(browser, SENTENCE)
    assert "128 sub-words" in browser.text("#model")


def test_an_empty_box_takes_back_what_was_asked_before(browser: Browser, page_url: str) -> None:
    browser.open(page_url, lambda r: HOLD if "v1/predict" in r["url"] else None)
    fill(browser, SENTENCE)
    browser.click(RUN)
    assert browser.js("document.querySelector('#results').ariaBusy") == "true"
    fill(browser, "")
    browser.click(RUN)
    assert browser.js("document.querySelector('#results').ariaBusy") == "false"
    assert browser.text("#status") == ""
    assert browser.text("#error") == "Type a sentence first."


def test_an_empty_box_is_not_sent(browser: Browser) -> None:
    fill(browser, "  ", "")
    browser.click(RUN)
    assert "sentence" in browser.text("#error")
    assert browser.js("document.activeElement.id") == "text"
    assert not any(url.endswith("/v1/predict") for url in browser.requests())
    ask(browser, SENTENCE)
    assert browser.text("#error") == ""


def test_an_answer_that_is_no_json_does_not_break_the_page(
    chromium: Browser, page_url: str
) -> None:
    chromium.open(page_url, lambda r: (502, {}, b"<h1>") if "predict" in r["url"] else None)
    fill(chromium, "Zoë")
    chromium.click(RUN)
    chromium.wait(REFUSED)
    assert "502" in chromium.text("#error")
    assert chromium.complaints() == []


def test_only_the_newest_request_is_shown(
    chromium: Browser, page_url: str, predictor: Predictor
) -> None:
    held: list[dict[str, Any]] = []

    def hold_the_first(request: dict[str, Any]) -> Reply | None:
        if not request["url"].endswith("/v1/predict") or held:
            return None
        held.append(request)
        return HOLD

    chromium.open(page_url, hold_the_first)
    fill(chromium, SENTENCE)
    chromium.click(RUN)
    while not held:
        chromium.js("1")
    assert chromium.js("document.querySelector('#results').ariaBusy") == "true"
    newer = "Zoë had a new phone in Lisbon"
    ask(chromium, newer)
    expected: Any = predictor.predict([newer])[0]["entities"]
    assert marks(chromium) == [(e["word"], e["entity_group"], e["start"]) for e in expected]
    told = [(e["method"], e["params"]) for e in chromium.events]
    failed = [params for method, params in told if method == "Network.loadingFailed"]
    assert all(params["canceled"] for params in failed)
    stale = next(
        params["requestId"]
        for method, params in told
        if method == "Network.requestWillBeSent" and params["request"]["url"].endswith("/predict")
    )
    assert stale in [params["requestId"] for params in failed]
    assert chromium.text("#error") == ""


def test_many_labels_show_the_likeliest_until_asked(chromium: Browser, page_url: str) -> None:
    scores = {f"intent_{i:02}": (i + 1) / 3003 for i in range(77)}
    answer = {"intent": {"label": "intent_76", "score": scores["intent_76"], "scores": scores}}
    body = {"results": [answer], "model": "many", "usage": {"tokens": 3}}
    chromium.open(page_url, answering("/v1/predict", 200, body))
    ask(chromium, "Where is my card?")
    names = [name.split(" ")[0] for name in chromium.texts(".bars .name")]
    assert names == [f"intent_{i}" for i in (76, 75, 74, 73, 72)]
    assert ("button", "Show all 77 of intent") in chromium.accessibility()
    chromium.click(".bars ~ button")
    assert len(chromium.texts(".bars li")) == 77
    assert chromium.js("document.querySelector('.bars ~ button').ariaExpanded") == "true"
    chromium.click(".bars ~ button")
    assert len(chromium.texts(".bars li")) == 5
    assert chromium.texts(".sentence") == ["Where is my card?"]


@pytest.mark.parametrize("num_chosen", [2, 8])
def test_every_chosen_label_is_shown(browser: Browser, page_url: str, num_chosen: int) -> None:
    scores = {f"mood_{i:02}": 0.99 - i / 20 for i in range(12)}
    answer = {"mood": {"labels": list(scores)[:num_chosen], "scores": scores}}
    browser.open(page_url, answering("/v1/predict", 200, {"results": [answer], "model": "m"}))
    ask(browser, SENTENCE)
    assert len(browser.texts(".chosen")) == num_chosen
    assert len(browser.texts(".bars li")) == max(num_chosen, 5)
    browser.click(".bars ~ button")
    assert len(browser.texts(".bars li")) == 12
    assert browser.text(".bars ~ button") == f"Show {max(num_chosen, 5)} of mood"


@pytest.mark.parametrize(
    ("count", "said"), [(2, "places: Rome0 (place), Rome1 (place)"), (300, "places: 300 found")]
)
def test_the_status_names_few_entities_and_counts_many(
    browser: Browser, page_url: str, count: int, said: str
) -> None:
    words = [f"Rome{i}" for i in range(count)]
    text = " ".join(words)
    places = [entity(text, word, "place") for word in words]
    body = {"results": [{"places": places}], "model": "m"}
    browser.open(page_url, answering("/v1/predict", 200, body))
    ask(browser, text)
    assert browser.text("#status").startswith(f"{said}, ")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_contrast_in_both_schemes(
    browser: Browser, page_url: str, scheme: str
) -> None:
    words = [f"word{i}" for i in range(9)]
    starts = [sum(len(w) + 1 for w in words[:i]) for i in range(9)]
    entities = [
        {"entity_group": f"type{i}", "score": 0.9, "word": w, "start": s, "end": s + len(w)}
        for i, (w, s) in enumerate(zip(words, starts, strict=True))
    ]
    results = [{"names": entities, "mood": {"labels": ["a"], "scores": {"a": 0.9, "b": 0.1}}}] * 4
    angles = np.arccos(np.linspace(-0.2, 1, 4))
    steps = np.stack([np.cos(angles), np.sin(angles)], axis=1).tolist()
    body = {"results": results, "embeddings": steps, "model": "m", "usage": {"tokens": 3}}
    browser.open(page_url, answering("/v1/predict", 200, body), prefers_color_scheme=scheme)
    ask(browser, *[" ".join(words)] * 4)
    browser.js("document.querySelector('#error').textContent = 'as if refused'")
    browser.js("document.querySelector('#unlock').hidden = false")
    browser.js("document.querySelector('details').open = true")
    backgrounds = browser.js(
        "[document.body, ...document.querySelectorAll('article:first-of-type mark')].map("
        "(node) => getComputedStyle(node).backgroundColor)"
    )
    assert len(set(backgrounds)) == 9  # the page and eight types; the ninth repeats a colour
    ratio, text = browser.js(CONTRAST)
    assert ratio >= 4.5, text


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_scheme_is_the_one_that_the_system_prefers(browser: Browser, scheme: str) -> None:
    browser.media(prefers_color_scheme=scheme)
    red = int(browser.js("getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0]"))
    assert (red > 128) == (scheme == "light")
    ask(browser, *LINES)
    picture = browser.screenshot()
    assert picture.startswith(b"\x89PNG")
    height = int.from_bytes(picture[20:24], "big")
    assert height == browser.js("document.documentElement.scrollHeight") > 900


def test_a_phone_needs_no_sideways_scrolling(browser: Browser) -> None:
    browser.size(320, 640)
    ask(browser, *LINES, "W" * 44)
    assert browser.js("document.documentElement.scrollWidth") == 320


@pytest.mark.parametrize(
    ("word", "group"), [("W" * 44, "place"), ("Rush", "number_of_people_in_the_whole_party")]
)
def test_long_names_need_no_sideways_scrolling(
    browser: Browser, page_url: str, word: str, group: str
) -> None:
    body = {"results": [{"entities": [entity(word, word, group)]}], "model": "m"}
    browser.open(page_url, answering("/v1/predict", 200, body))
    browser.size(320, 640)
    ask(browser, word)
    browser.js("document.querySelector('#model').textContent = 'Model ' + 'm'.repeat(64)")
    assert marks(browser) == [(word, group, 0)]
    assert browser.js("document.documentElement.scrollWidth") == 320


@pytest.mark.parametrize("text", ["Maria in Berlin", "מריה נסעה ל Berlin אתמול", "משה in Rome"])
def test_a_space_parts_each_word_from_its_type(browser: Browser, page_url: str, text: str) -> None:
    entities = [entity(text, word, "place") for word in text.split()]
    body = {"results": [{"entities": entities}], "model": "m"}
    browser.open(page_url, answering("/v1/predict", 200, body))
    ask(browser, text)
    gaps = browser.js("""Array.from(document.querySelectorAll("mark"), (mark) => {
      const parts = mark.querySelectorAll(".word, bdi");
      const [word, type] = Array.from(parts, (part) => part.getBoundingClientRect());
      return Math.max(type.left - word.right, word.left - type.right);
    })""")
    assert len(gaps) == len(entities)
    assert min(gaps) > 3


def test_old_answers_stay_readable_while_new_ones_are_awaited(
    browser: Browser, page_url: str
) -> None:
    body = {"results": [{"topic": {"label": "a", "score": 0.5}}], "model": "m"}
    replies = iter([(200, {}, json.dumps(body).encode()), HOLD])
    browser.open(page_url, lambda r: next(replies) if "v1/predict" in r["url"] else None)
    ask(browser, SENTENCE)
    browser.click(RUN)
    assert browser.js("document.querySelector('#results').ariaBusy") == "true"
    assert "Running" in browser.text("#status")
    browser.js("document.getAnimations().forEach((fade) => fade.finish())")
    assert browser.js("getComputedStyle(document.querySelector('#results')).opacity") == "1"
