"""The page in a real browser, over two real servers of small random models."""

import re
import shutil
import socket
import threading
import time
from contextlib import ExitStack, contextmanager, suppress

import httpx
import pytest
import uvicorn
from factories import random_recommender

from llmrec.demo.app import build_page
from llmrec.demo.servers import Target
from llmrec.engine.launch import running_server

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytest.importorskip("gradio", reason="gradio is not installed")
pytestmark = pytest.mark.slow

CHROMIUM = shutil.which("chromium")
HOSTILE = {
    1: "<script>window.pwned=1</script>Soap",
    2: 'Balm"><img src=x onerror="window.pwned=1">',
    3: "${window.pwned=1} {{constructor.constructor('window.pwned=1')()}}",
    4: "</title></svg><svg onload=window.pwned=1>",
    5: "' onfocus='window.pwned=1' autofocus='",
}


PRESS_ADD = """name => {
    for (const row of document.querySelectorAll("ul.llmrec-list[aria-label='Items of the catalog'] li")) {
        if (row.querySelector(".id").innerText === name) {
            row.querySelector("button").click();
            return true;
        }
    }
    return false;
}"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def in_thread(app):
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.02)
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """The URLs of two servers of the same items and different models, the first with a history store."""
    folder = tmp_path_factory.mktemp("demo")
    with ExitStack() as stack:
        started = []
        for seed, store in ((1, "memory:"), (2, None)):
            recommender = random_recommender(seed)
            for row, item in enumerate(recommender.catalog.items):
                item["title"] = HOSTILE.get(row, item["title"])
                item |= {"price": float(row), "in_stock": row % 2 == 0, "tags": ["even" if row % 2 == 0 else "odd"]}
            recommender.save_pretrained(folder / f"model-{seed}")
            log = folder / f"server-{seed}.log"
            started.append(
                stack.enter_context(
                    running_server(
                        folder / f"model-{seed}", free_port(), log, backend="transformers", history_store=store
                    )
                )
            )
        for server in started:
            server.wait_until_ready(120)
        yield [server.url for server in started]


@pytest.fixture(scope="module")
def page_url(servers):
    with in_thread(build_page(*(Target(url) for url in servers))) as url:
        yield url


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def opened(browser, url, width=1280, height=800, scheme="light"):
    """A visitor's tab, which must fetch nothing from elsewhere, run nothing of an item's and log no error."""
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    tab = context.new_page()
    asked, errors = [], []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on("response", lambda answer: errors.append(answer.url) if answer.status >= 400 else None)
    tab.on("dialog", lambda dialog: errors.append(dialog.message))
    tab.set_default_timeout(60_000)
    tab.goto(url)
    tab.locator("h1").wait_for()
    yield tab
    assert tab.evaluate("window.pwned") is None
    assert [one for one in asked if not one.startswith((url, "data:", "blob:"))] == []
    assert len(asked) > 10
    assert errors == []
    context.close()


@pytest.fixture
def tab(browser, page_url):
    with opened(browser, page_url) as tab:
        tab.locator("ul.llmrec-list li").first.wait_for()
        yield tab


def search(tab, text, expected):
    tab.get_by_label("Search titles and ids").fill(text)
    tab.get_by_text(expected, exact=True).first.wait_for()


def add(tab, *names):
    """Finds items by id, one by one, and adds them."""
    for name in names:
        before = tab.locator("ol.llmrec-list li").count()
        tab.get_by_label("Search titles and ids").fill(name)
        row = tab.locator("ul.llmrec-list[aria-label='Items of the catalog'] li").filter(
            has=tab.get_by_text(name, exact=True)
        )
        row.wait_for()
        # Found and pressed at once, for the list may be drawn again between the two.
        assert tab.evaluate(PRESS_ADD, name)
        tab.locator("ol.llmrec-list li").nth(before).wait_for()


def history(tab):
    return tab.locator("ol.llmrec-list li .id").all_inner_texts()


def recommend(tab):
    """Presses the button and waits for an answer to what is set now."""
    new = (
        "document.querySelector('.llmrec-answer:not([data-old])') && !document.querySelector('.generating, .pending')"
    )
    # A press while the page is still busy with the one before is not heard.
    for _ in range(4):
        tab.evaluate("document.querySelectorAll('.llmrec-answer').forEach((one) => { one.dataset.old = 'yes'; })")
        tab.get_by_role("button", name="Recommend", exact=True).click()
        with suppress(sync_api.TimeoutError):
            tab.wait_for_function(new, timeout=12_000)
            break
    assert tab.evaluate(f"Boolean({new})")
    tab.get_by_text("have changed since").wait_for(state="hidden")
    tab.locator(".llmrec-items tbody tr, .llmrec-note.problem").first.wait_for()


def rows(tab, place=0):
    """Rank, id and log-probability of an answer's rows."""
    answer = tab.locator(".llmrec-answer").nth(place)
    found = []
    for row in answer.locator(".llmrec-items tbody tr").all():
        log = re.search(r"log p (−?[\d.]+)", row.inner_text()).group(1)
        found.append(
            (
                int(row.locator("td").first.inner_text()),
                row.locator("td .id").first.inner_text(),
                float(log.replace("−", "-")),
            )
        )
    return found


def asked(url, **body):
    answer = httpx.post(f"{url}/v1/recommend", json=body, timeout=20, trust_env=False)
    assert answer.status_code == 200, answer.text
    return answer.json()["items"]


def assert_shown(tab, items, place=0):
    assert items
    shown = rows(tab, place)
    assert [(rank, name) for rank, name, _ in shown] == [(item["rank"], item["id"]) for item in items]
    assert [log for *_, log in shown] == pytest.approx([item["log_probability"] for item in items], abs=6e-4)


def only_one_server(tab):
    tab.get_by_label("Also ask http").uncheck()


def test_what_is_clicked_together_is_what_the_server_answers(tab, servers):
    add(tab, "item-7", "item-12", "item-30")
    assert history(tab) == ["item-7", "item-12", "item-30"]
    tab.get_by_role("button", name="Move Title 30 up").click()
    tab.locator("ol.llmrec-list li").nth(1).get_by_text("Title 30").wait_for()
    tab.get_by_role("button", name="Remove Title 7 from the history").click()
    tab.locator("ol.llmrec-list li").nth(2).wait_for(state="detached")
    assert history(tab) == ["item-30", "item-12"]
    only_one_server(tab)
    tab.get_by_label("Items (k)").fill("6")
    recommend(tab)
    items = asked(servers[0], history=["item-30", "item-12"], k=6, explain=True)
    assert_shown(tab, items)
    assert tab.locator(".llmrec-answer").count() == 1
    assert re.search(r"\d+ ms there and back", tab.locator(".llmrec-answer").inner_text())
    # The path of one item: its codes and what each cost.
    name = items[2]["title"]
    tab.locator(".llmrec-items").get_by_role("button", name=f"Mark the path of {name}").click()
    table = tab.locator(".llmrec-path")
    table.wait_for()
    cells = [row.locator("td").all_inner_texts() for row in table.locator("tbody tr").all()]
    assert [int(code) for _, code, *_ in cells] == items[2]["semantic_id"]
    costs = [float(cost.replace("−", "-")) for _, _, cost, _ in cells]
    assert costs == pytest.approx(items[2]["level_log_probabilities"], abs=6e-4)
    assert tab.locator(".llmrec-tree g.node.chosen").count() == len(cells)
    assert tab.locator(".llmrec-tree text.title").count() == 6
    version = httpx.get(f"{servers[0]}/v1/catalog", trust_env=False).json()["catalogs"][0]["version"]
    assert version in tab.locator(".llmrec-answer").inner_text()


def choose_attribute(tab, name):
    tab.get_by_label("Attribute").click()
    tab.get_by_role("option", name=name).click()


def test_filters_and_unwanted_items_are_kept_and_asked_for(tab, servers):
    only_one_server(tab)
    add(tab, "item-20")
    tab.get_by_role("button", name="Filters").click()
    choose_attribute(tab, "price")
    tab.get_by_label("At least").fill("10")
    tab.get_by_label("At most").fill("29.5")
    tab.get_by_role("button", name="Set filter").click()
    chip = tab.get_by_text("price is from 10 to 29.5")
    chip.wait_for()
    choose_attribute(tab, "in_stock")
    tab.get_by_label("It is").get_by_label("no", exact=True).or_(tab.get_by_role("radio", name="no")).first.check()
    tab.get_by_role("button", name="Set filter").click()
    tab.get_by_text("in_stock is no").wait_for()
    choose_attribute(tab, "brand")
    tab.get_by_label("Values, with commas").fill("Brand 0, Brand 1")
    tab.get_by_role("button", name="Set filter").click()
    tab.get_by_text("brand is Brand 0 or Brand 1").wait_for()
    recommend(tab)
    filters = {
        "price": {"min": 10, "max": 29.5},
        "in_stock": {"any_of": [False]},
        "brand": {"any_of": ["Brand 0", "Brand 1"]},
    }
    items = asked(servers[0], history=["item-20"], filters=filters)
    assert_shown(tab, items)
    assert all(10 <= int(item["id"][5:]) <= 29 and int(item["id"][5:]) % 6 in (1, 3) for item in items)
    search(tab, "item-33", "item-33")
    assert chip.is_visible()
    # Not this one: struck out at once, and gone from the next answer.
    worst = items[0]
    tab.get_by_role("button", name=f"Do not recommend {worst['title']}", exact=True).click()
    tab.locator("tr.denied").wait_for()
    assert tab.get_by_text("have changed since").is_visible()
    recommend(tab)
    again = asked(servers[0], history=["item-20"], filters=filters, deny=[worst["id"]])
    assert_shown(tab, again)
    assert worst["id"] not in {name for _, name, _ in rows(tab)}
    tab.get_by_role("button", name="Remove the filter price is from 10 to 29.5").click()
    chip.wait_for(state="detached")
    recommend(tab)
    del filters["price"]
    assert_shown(tab, asked(servers[0], history=["item-20"], filters=filters, deny=[worst["id"]]))


def test_settings_reach_the_server(tab, servers):
    only_one_server(tab)
    add(tab, "item-9")
    tab.get_by_label("Items (k)").fill("5")
    tab.get_by_label("Beams").fill("40")
    tab.get_by_label("Leave out items of the history").uncheck()
    tab.get_by_role("button", name="More settings").click()
    tab.get_by_label("Probabilities over the legal codes alone").check()
    tab.get_by_label("Items that share so many levels").fill("1")
    tab.get_by_label("… come so often").fill("1")
    recommend(tab)
    body = {"history": ["item-9"], "k": 5, "num_beams": 40, "exclude_seen": False, "normalize": "legal"}
    items = asked(servers[0], **body, prefix_cap={"levels": 1, "most": 1}, explain=True)
    assert_shown(tab, items)
    assert len({item["semantic_id"][0] for item in items}) == len(items)
    tab.get_by_label("Items that share so many levels").fill("0")
    tab.get_by_label("… come so often").fill("0")
    tab.get_by_label("Draw items instead of the best").check()
    tab.get_by_label("Temperature of the draw").fill("2")
    tab.get_by_label("Seed of the draw").fill("11")
    recommend(tab)
    assert_shown(tab, asked(servers[0], **body, sampling={"temperature": 2.0, "seed": 11}))


def test_two_models_stand_side_by_side(tab, servers):
    add(tab, "item-7", "item-8")
    recommend(tab)
    both = [asked(url, history=["item-7", "item-8"]) for url in servers]
    for place, items in enumerate(both):
        assert_shown(tab, items, place)
    names = [[item["id"] for item in items] for items in both]
    said = tab.locator(".llmrec-agreement").inner_text()
    for depth in (1, 3, 5, 10):
        common = len(set(names[0][:depth]) & set(names[1][:depth]))
        assert f"first {depth}: {common} of {depth}" in said
    moves = tab.locator(".llmrec-answer").nth(1).locator("tbody tr > td:nth-child(4)").all_inner_texts()
    for place, (name, move) in enumerate(zip(names[1], moves, strict=True)):
        if name not in names[0]:
            assert move == "new"
        else:
            by = names[0].index(name) - place
            assert move == ("same place" if by == 0 else f"{'up' if by > 0 else 'down'} {abs(by)}")


def test_hostile_titles_are_read_and_not_run(tab):
    only_one_server(tab)
    for row, title in HOSTILE.items():
        search(tab, f"item-{row}", title)
        add(tab, f"item-{row}")
    assert history(tab) == [f"item-{row}" for row in HOSTILE]
    for title in HOSTILE.values():
        assert tab.locator("ol.llmrec-list").get_by_text(title, exact=True).is_visible()
    tab.get_by_label("Leave out items of the history").uncheck()
    tab.get_by_label("Items (k)").fill("40")
    tab.get_by_label("Beams").fill("40")
    recommend(tab)
    for title in HOSTILE.values():
        assert tab.locator(".llmrec-items").get_by_text(title, exact=True).is_visible()
        tab.locator(".llmrec-items").get_by_role("button", name=f"Mark the path of {title}", exact=True).click()
        tab.locator(".llmrec-path caption").get_by_text(title, exact=True).wait_for()
    search(tab, "<script>", HOSTILE[1])
    tab.get_by_label("Search titles and ids").fill("<img src=y onerror=window.pwned=1>")
    tab.get_by_text("No item has “<img src=y onerror=window.pwned=1>”").wait_for()
    assert tab.locator("img[src=x], img[src=y], .gradio-container script").count() == 0


def test_errors_are_words_and_the_page_goes_on(tab):
    only_one_server(tab)
    tab.get_by_label("Items (k)").fill("0")
    tab.get_by_role("button", name="Recommend", exact=True).click()
    tab.get_by_role("alert").get_by_text("greater than or equal to 1").wait_for()
    tab.get_by_label("Items (k)").fill("3")
    tab.get_by_role("button", name="More settings").click()
    adapter = tab.get_by_label("Adapter (empty: the model itself)")
    adapter.wait_for()
    # On a busy machine gradio may still be filling the part that has just been opened: what is typed then is lost.
    for _ in range(3):
        adapter.fill("nowhere")
        recommend(tab)
        with suppress(sync_api.TimeoutError):
            tab.get_by_role("alert").get_by_text("no adapter 'nowhere'").wait_for(timeout=8000)
            break
    assert tab.get_by_role("alert").get_by_text("no adapter 'nowhere'").is_visible()
    assert "Traceback" not in tab.content()
    adapter.fill("")
    recommend(tab)
    tab.locator(".llmrec-items tbody tr").nth(2).wait_for()
    assert tab.get_by_role("alert").count() == 0


def test_stored_histories_are_used_and_copied(tab, servers):
    only_one_server(tab)
    events = {"events": [{"item": "item-15"}, {"item": "item-7"}]}
    httpx.post(f"{servers[0]}/v1/users/ann/events", json=events, trust_env=False).raise_for_status()
    add(tab, "item-30")
    tab.get_by_label("A user of the server").fill("ann")
    recommend(tab)
    assert_shown(tab, asked(servers[0], user_id="ann"))
    tab.get_by_role("button", name="Copy the user's last items").click()
    tab.locator("ol.llmrec-list").get_by_text("Title 15").wait_for()
    assert history(tab) == ["item-15", "item-7"]


def test_a_server_without_histories_shows_no_field_for_users(browser, servers):
    with in_thread(build_page(Target(servers[1]))) as url, opened(browser, url) as tab:
        tab.locator("ul.llmrec-list li").first.wait_for()
        assert tab.get_by_label("A user of the server").count() == 0
        assert tab.get_by_label("Also ask for another adapter").count() == 0  # in a closed part
        assert tab.get_by_role("button", name="Compare side by side").is_visible()


def test_the_keyboard_is_enough(tab):
    tab.get_by_label("Search titles and ids").focus()
    tab.keyboard.type("item-39")
    tab.get_by_text("1–1 of 1").wait_for()
    tab.keyboard.press("Tab")
    for count in (1, 2):
        tab.keyboard.press("Enter")
        tab.locator("ol.llmrec-list li").nth(count - 1).wait_for()
    assert history(tab) == ["item-39", "item-39"]


def test_visitors_do_not_share_a_history(tab, browser, page_url):
    add(tab, "item-7")
    with opened(browser, page_url) as other:
        other.locator("ul.llmrec-list li").first.wait_for()
        assert history(other) == []
        add(other, "item-8")
        assert history(other) == ["item-8"]
    add(tab, "item-9")
    assert history(tab) == ["item-7", "item-9"]


def test_a_server_that_is_away_can_be_tried_again(browser, servers):
    target = Target(f"http://127.0.0.1:{free_port()}")
    with in_thread(build_page(target)) as url, opened(browser, url) as tab:
        tab.get_by_role("alert").get_by_text("does not answer").wait_for()
        target.client = Target(servers[0]).client  # the server has come up
        tab.get_by_role("button", name="Ask the server again").click()
        tab.locator("ul.llmrec-list li").first.wait_for()
        assert tab.get_by_role("alert").count() == 0
        tab.get_by_label("A user of the server").wait_for()


CONTRAST = """() => {
  const parts = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
  const luminance = (rgb) => {
    const [r, g, b] = rgb.slice(0, 3).map((v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const paper = (element) => {
    for (let one = element; one; one = one.parentElement) {
      const rgb = parts(getComputedStyle(one).backgroundColor);
      if (rgb.length && (rgb.length < 4 || rgb[3] > 0.99)) return rgb;
    }
    return [255, 255, 255];
  };
  const poor = [];
  for (const one of document.querySelectorAll('.gradio-container *')) {
    const own = [...one.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!own || !one.getClientRects().length || one.closest('title')) continue;
    const style = getComputedStyle(one);
    const ink = parts(one.closest('svg') && one.tagName === 'text' ? style.fill : style.color);
    const pair = [luminance(ink), luminance(paper(one))].sort((a, b) => b - a);
    const ratio = (pair[0] + 0.05) / (pair[1] + 0.05);
    if (ratio < 4.5) poor.push([one.tagName, one.textContent.trim().slice(0, 40), ratio]);
  }
  return poor;
}"""
NAMELESS = """() => [...document.querySelectorAll('input, textarea, select, button')].filter((one) =>
  one.getClientRects().length && !(one.labels && one.labels.length && [...one.labels].some((l) => l.innerText.trim()))
  && !one.getAttribute('aria-label') && !one.innerText.trim()).map((one) => one.outerHTML.slice(0, 120))"""


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light")])
def test_everything_is_labelled_readable_and_within_the_screen(browser, page_url, width, scheme):
    with opened(browser, page_url, width=width, scheme=scheme) as tab:
        add(tab, "item-7", "item-1")
        for name in ("Filters", "More settings"):
            tab.get_by_role("button", name=name).click()
        choose_attribute(tab, "brand")
        tab.get_by_label("Values, with commas").fill("Brand 0")
        tab.get_by_role("button", name="Set filter").click()
        tab.get_by_text("brand is Brand 0").wait_for()
        recommend(tab)
        tab.locator(".llmrec-answer").first.get_by_role("button", name="Mark the path").first.click()
        tab.locator(".llmrec-path").first.wait_for()
        tab.get_by_role("button", name="Do not recommend").first.click()
        tab.locator("tr.denied").first.wait_for()
        assert tab.evaluate(NAMELESS) == []
        assert tab.evaluate(CONTRAST) == []
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert tab.locator("h1").count() == 1
        assert tab.title() == "llmrec demo"
