"""The live page as people see it: every board in a real browser, over an admin server and a filled ring."""

import re
import shutil
import time
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry

from mooncake.core.admin import AdminServer
from mooncake.live.boards import load_boards, names_read, panels
from mooncake.live.page import SERIES_MAX, LivePage
from mooncake.live.ring import Part, Ring
from tests.live import fake_cluster
from tests.live.browser import Page, browser

pytestmark = pytest.mark.skipif(
    shutil.which("chromium") is None, reason="no chromium: run scripts/chromium-parts"
)

END_S = float(int(time.time()) // 5 * 5)
"""The page goes by the clock of who serves it: here time stands still, so a slow machine sees the same."""
TALL = 9000
"""Every panel of a board is in sight: only those are drawn."""
TOKEN = "a-token-of-the-tests-1234"
EVIL = "<img src=x onerror=alert(1)>"
DRAWN = """
(() => {
  const panels = [...document.querySelectorAll('.panel')];
  return document.querySelector('#board')?.getAttribute('aria-busy') === 'false' && panels.length > 0
    && panels.every((one) => one.dataset.drawn);
})()
"""
STATES = """
[...document.querySelectorAll('.panel')].map((panel) => {
  const canvas = panel.querySelector('canvas');
  let pixels = 0;
  if (canvas) {
    const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
    for (let i = 3; i < data.length; i += 4) if (data[i]) pixels++;
  }
  return {
    title: panel.querySelector('h3').textContent,
    label: document.getElementById(panel.getAttribute('aria-labelledby'))?.textContent,
    error: panel.querySelector('.error')?.textContent ?? '',
    empty: Boolean(panel.querySelector('.none')),
    value: panel.querySelector('.stat b, .bars b, .legend td')?.textContent ?? '',
    pixels, chart: Boolean(canvas), about: panel.querySelector('.about')?.getAttribute('aria-label') ?? '',
  };
})
"""

CHOOSE = """
((selector, value) => {
  const select = document.querySelector(selector);
  select.value = value;
  select.dispatchEvent(new Event('change'));
})
"""
GATE = """
(() => {
  const real = window.fetch;
  window.asked = [];
  window.shut = () => { window.gate = new Promise((resolve) => { window.release = resolve; }); };
  window.fetch = async (url, options) => {
    window.asked.push(decodeURIComponent(String(url)));
    if (window.held.test(url)) await window.gate;
    return real(url, options);
  };
})()
"""
"""Requests whose address matches `held` wait for `release()` after `shut()`."""


@pytest.fixture(scope="module")
def ring() -> Ring:
    ring = Ring(names_read(load_boards().values()))
    fake_cluster.fill(ring, END_S)
    return ring


@pytest.fixture(scope="module")
def url(ring: Ring) -> Iterator[str]:
    admin = AdminServer(CollectorRegistry(), 0)
    LivePage(load_boards(), ring, now=lambda: END_S).register(admin)
    admin.start()
    yield f"{admin.url}/dashboard"
    admin.close()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory):
    with browser(tmp_path_factory.mktemp("chromium")) as socket:
        yield socket


@pytest.fixture
def page(chromium) -> Page:
    return Page(chromium)


@pytest.mark.parametrize("uid", list(load_boards()))
def test_every_panel_of_a_board_is_drawn_with_a_value_and_without_a_complaint(page, url, uid):
    page.open(f"{url}#board={uid}", height=TALL)
    page.wait(DRAWN)
    states = page.ask(STATES)
    wanted = [panel for panel in panels(load_boards()[uid]) if panel["type"] != "row"]
    assert [state["title"] for state in states] == [panel["title"] for panel in wanted]
    for state, panel in zip(states, wanted, strict=True):
        assert (state["error"], state["empty"]) == ("", False), state
        assert any(char.isdigit() for char in state["value"]), state
        assert state["chart"] == (panel["type"] == "timeseries"), state
        assert state["pixels"] > 500 or not state["chart"], state
        assert state["label"] == state["title"]
        assert state["about"] == f"About {state['title']}"
    assert page.complaints == []


def test_a_phone_shows_it_without_scrolling_sideways(page, url):
    page.open(url, width=390, height=844)
    page.wait("document.querySelectorAll('.panel[data-drawn]').length > 2")
    assert page.ask("document.scrollingElement.scrollWidth") <= 390
    assert page.ask("Math.max(...[...document.querySelectorAll('.panel')].map((one) => one.getBoundingClientRect().right))") <= 390  # noqa: E501 # fmt: skip
    assert page.complaints == []


def test_a_description_opens_for_keyboards_and_goes_with_escape(page, url):
    page.open(url)
    page.wait("Boolean(document.querySelector('.about'))")
    page.ask("document.querySelector('.about').focus()")
    first = next(panel for panel in panels(next(iter(load_boards().values()))) if panel.get("description"))
    words = first["description"].split("\n")[0].split()
    assert page.ask("document.getElementById('tip').textContent").split()[:4] == words[:4]
    page.ask("document.dispatchEvent(new KeyboardEvent('keydown', { key: 'Escape' }))")
    assert page.ask("document.getElementById('tip').hidden")


def test_what_is_chosen_is_asked_for_and_kept_in_the_address(page, url):
    page.open(url, height=TALL)
    page.wait(DRAWN)
    page.ask(f"{CHOOSE}('[data-variable=tenant]', 'tenant-1')")
    page.ask(f"{CHOOSE}('#span', '300')")
    query = page.wait(
        "performance.getEntriesByType('resource').map((one) => decodeURIComponent(one.name))"
        ".find((name) => name.includes('query_range') && name.includes('tenant-1'))"
    )
    assert 'tenant=~"tenant-1"' in query.replace("+", " ")
    address = page.ask("location.hash")
    assert "var-tenant=tenant-1" in address
    assert "span=300" in address
    before = page.ask("document.documentElement.dataset.theme")
    page.ask("document.getElementById('theme').click()")
    assert page.ask("document.documentElement.dataset.theme") != before
    assert page.complaints == []


def test_what_is_chosen_while_panels_wait_for_answers_is_asked_for_when_they_have_come(page, url):
    page.open(url, height=TALL)
    page.wait(DRAWN)
    page.ask("window.before = Math.max(...[...document.querySelectorAll('.panel')].map((one) => one.dataset.drawn))")  # noqa: E501 # fmt: skip
    page.ask(f"{CHOOSE}('#every', '0')")  # nothing comes by itself any more
    page.wait("[...document.querySelectorAll('.panel')].every((one) => one.dataset.drawn > window.before)")
    count = sum(len(panel.get("targets", ())) for panel in panels(next(iter(load_boards().values()))))
    page.ask(f"window.held = /query_range/; ({GATE}); window.shut()")
    page.ask(f"{CHOOSE}('[data-variable=tenant]', 'tenant-1')")
    page.wait(f"window.asked.filter((url) => url.includes('query_range')).length === {count}")
    page.ask(f"{CHOOSE}('#span', '300')")
    page.ask("new Promise((resolve) => setTimeout(resolve, 500))")  # the page has seen that all panels wait
    page.ask("window.release()")
    page.wait(f"window.asked.filter((url) => url.includes('query_range')).length >= 2 * {count}")
    queries = page.ask("window.asked.filter((url) => url.includes('query_range'))")
    spans = [round(float(re.search(r"&end=(\d+)", one)[1]) - float(re.search(r"&start=(\d+)", one)[1]))
             for one in queries]  # fmt: skip
    assert spans == [900] * count + [300] * count
    assert page.complaints == []


def test_a_hidden_tab_asks_for_nothing_more_though_it_was_hidden_while_it_asked(page, url):
    page.open(url, height=TALL)
    page.wait(DRAWN)
    page.ask(f"window.held = /status/; ({GATE}); window.shut()")
    page.ask("window.before = Number(document.querySelector('.panel').dataset.drawn)")
    page.ask(f"{CHOOSE}('#span', '300')")
    page.wait("window.asked.some((url) => url.includes('status'))")
    page.ask(
        "Object.defineProperty(document, 'hidden', { value: true });"
        "document.dispatchEvent(new Event('visibilitychange'));"
        "window.timers = []; window.setTimeout = (_, wait) => window.timers.push(wait); window.release()"
    )
    page.wait(
        "[...document.querySelectorAll('.panel')].every((one) => Number(one.dataset.drawn) > window.before)"
    )
    assert page.ask("window.timers") == []
    assert page.complaints == []


def test_a_panel_says_what_its_answer_leaves_out(page):
    ring = Ring(names_read(load_boards().values()))
    text = "".join(
        f'mooncake_instance_queue_seconds{{instance_id="prefill-{i}",role="prefill"}} 1\n'
        f'mooncake_engine_pulse_age_seconds{{instance_id="prefill-{i}",role="prefill"}} 0\n'
        for i in range(SERIES_MAX + 5)
    )
    for i in range(20):
        ring.add(END_S - 5 * (19 - i), {Part("core-0", "http://h:1/", "h:1"): text})
    admin = AdminServer(CollectorRegistry(), 0)
    LivePage(load_boards(), ring, now=lambda: END_S).register(admin)
    admin.start()
    try:
        page.open(f"{admin.url}/dashboard#board=mooncake-conductor", height=TALL)
        page.wait(DRAWN)
        told = page.ask("[...document.querySelectorAll('.warnings')].map((one) => one.textContent)")
        assert told == [f"{SERIES_MAX} of {SERIES_MAX + 5} series are shown"]
        page.ask(f"{CHOOSE}('[data-variable=instance]', 'prefill-7')")
        page.wait("!document.querySelector('.warnings')")
        assert page.complaints == []
    finally:
        admin.close()


def test_the_page_asks_for_the_token_and_keeps_it_for_this_tab(page):
    ring = Ring(names_read(load_boards().values()))
    fill = "".join(f'mooncake_requests_total{{outcome="{EVIL if i else "finished"}"}} %d\n' for i in range(2))
    for i in range(20):
        ring.add(END_S - 5 * (19 - i), {Part("gateway-0", "http://h:1/", "h:1"): fill % (i, 3 * i)})
    admin = AdminServer(CollectorRegistry(), 0, token=TOKEN)
    LivePage(load_boards(), ring, now=lambda: END_S).register(admin)
    admin.start()
    try:
        page.open(f"{admin.url}/dashboard", height=TALL)
        enter = "document.getElementById('token').value = %r; document.querySelector('#login button').click()"
        page.wait("document.getElementById('login').open")
        page.ask(enter % "wrong")
        page.wait("document.getElementById('login-error').textContent.includes('not the one')")
        assert page.ask("document.querySelectorAll('.panel').length") == 0
        page.ask(enter % TOKEN)
        page.wait(DRAWN)
        assert page.ask("sessionStorage.length") == 1
        assert TOKEN not in page.ask("location.href + JSON.stringify(localStorage) + document.cookie")
        # what others have named is text, whatever it looks like
        assert EVIL in page.ask("document.querySelector('main').textContent")
        assert page.ask("document.querySelectorAll('main img').length") == 0
        assert [one for one in page.complaints if "401" not in one] == []
    finally:
        admin.close()
