"""The HTML report in a real browser: Debian's Chromium, headless, driven by Playwright."""

import csv
import io
import re
import shutil
from contextlib import contextmanager
from dataclasses import replace

import pytest

from archscan.report.html import render_html
from archscan.report.page import packed_plotly
from tests.page_reports import alarming_report, dense_report, finding, scanned_report, slim_report

CHROMIUM = shutil.which("chromium")
if CHROMIUM is None:
    pytest.skip(
        "NOT ONE TEST OF THE REPORT PAGE RAN: chromium is not installed; apt-get install chromium",
        allow_module_level=True,
    )

from axe_playwright_python.sync_playwright import Axe  # noqa: E402
from playwright.sync_api import expect, sync_playwright  # noqa: E402

DESK, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
LARGEST_PAGE = 6_000_000
REPORTS = {"slim": slim_report, "alarming": alarming_report, "dense": dense_report, "scan": scanned_report}


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    written = {}

    def file_of(name, report=None):
        if name not in written:
            written[name] = folder / f"{name}.html"
            written[name].write_text(render_html(report or REPORTS[name]()), encoding="utf-8")
        return written[name]

    return file_of


@contextmanager
def opened(browser, file, *, dark=False):
    """A page whose charts are drawn; whatever it says on the console or asks of a network fails the test."""
    context = browser.new_context(viewport=DESK, color_scheme="dark" if dark else "light", reduced_motion="reduce")
    page, wrong = context.new_page(), []
    page.on("console", lambda message: wrong.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
    page.on(
        "request", lambda request: wrong.append(f"request: {request.url}") if request.url != file.as_uri() else None
    )
    page.goto(file.as_uri())
    page.wait_for_selector("#treemap .main-svg")
    yield page
    context.close()
    assert wrong == []


@pytest.fixture(scope="module")
def page(browser, files):
    """A slimming's page, for all tests that leave it as they found it: opening one takes seconds."""
    with opened(browser, files("slim")) as page:
        yield page


@pytest.fixture(scope="module")
def alarming_page(browser, files):
    with opened(browser, files("alarming"), dark=True) as page:
        yield page


@pytest.fixture(scope="module")
def dense_page(browser, files):
    with opened(browser, files("dense")) as page:
        yield page


def until(page, condition):
    """Wait for a condition; Playwright's own waiting evaluates text, which the page's policy forbids."""
    for _ in range(100):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(50)
    pytest.fail(f"never came true: {condition}")


def names_in(page, table, column):
    return page.eval_on_selector_all(
        f"{table} tbody tr:not([hidden])", f"rows => rows.map(row => row.cells[{column}].textContent.trim())"
    )


# ---------------------------------------------------------------- what is drawn


def test_every_chart_is_drawn(page):
    report = slim_report()
    assert page.locator("#kept a").count() == len(report.groups)
    assert page.locator("#graph .node").count() == len(report.groups)
    assert page.locator("#graph .lines path").count() >= len(report.groups) - 2
    assert page.locator("#treemap .slice").count() > 50
    assert page.locator("#boxes .trace.boxes .box").count() == len([row for row in report.groups if not row.frozen])
    assert page.locator("#curve .scatterlayer .trace").count() == 3
    assert page.locator(".matrix tbody td").count() == 16
    assert page.locator(".found").count() == len(report.findings)


def test_learning_is_drawn_and_told(page):
    report = slim_report()
    assert page.locator("#learning .scatterlayer .trace").count() == 4
    assert page.locator("#learning .annotation").all_text_contents() == ["round 1", "round 2", "fine-tuning"]
    points = page.locator("#learning .scatterlayer .trace .points path").count()
    assert points == (3 + 7) + 7 + 7  # evaluated, which begins before the first step; in training; loss
    assert page.locator("#training tbody tr").count() == sum(len(run.epochs) for run in report.history)
    expect(page.locator("#training")).to_contain_text("2 rounds of 2 epochs on 5,000 images, sgd")
    expect(page.locator("#training")).to_contain_text("accuracy 71.0% to 73.0%, then 69.0% to 71.0%")


def test_exported_files_are_listed(page):
    rows = page.locator("#exports tbody tr")
    assert [name.split("\t")[:3] for name in rows.all_inner_texts()] == [
        ["model.onnx", "61.23 MB", "15,300,000"],
        ["model.ts.pt", "61.50 MB", "15,300,000"],
    ]


def test_a_scan_is_drawn_too(browser, files):
    with opened(browser, files("scan")) as page:
        assert page.locator("#kept").count() == 0
        assert page.locator("#colour option").all_inner_texts() == ["share of the MACs", "share of the time"]
        assert page.locator("#graph .node").count() == len(scanned_report().groups)
        assert page.locator("#saliency").count() == 0
        assert page.locator("#training, #exports").count() == 0


def test_warnings_that_change_the_meaning_stand_first(alarming_page):
    banners = alarming_page.locator(".banner")
    assert [text[:14] for text in banners.all_inner_texts()] == ["RANDOM WEIGHTS", "SYNTHETIC DATA"]
    assert banners.last.bounding_box()["y"] < alarming_page.locator(".card").first.bounding_box()["y"]


def test_bars_point_at_members_widths_and_cost(page):
    group = slim_report().groups[4]
    page.locator("#kept a").nth(4).hover()
    tip = page.locator("#tip")
    expect(tip).to_be_visible()
    for part in (group.name, f"{group.units} → {group.kept}", f"{len(group.members)} layers", "of the MACs"):
        expect(tip).to_contain_text(part)
    page.mouse.move(5, 5)
    expect(tip).to_be_hidden()


def test_the_treemap_switches_between_costs(page):
    labels = []
    for kind in ("macs", "params", "bytes", "time"):
        page.locator(f"input[name=cost][value={kind}]").check()
        labels.append(page.locator("#treemap .slicetext").all_text_contents())
    assert labels[0] != labels[1]
    assert labels[0] == labels[3]  # made up in proportion


# ---------------------------------------------------------------- tables


def test_tables_sort_both_ways(page):
    units = [f"{group.units:,}" for group in sorted(slim_report().groups, key=lambda group: -group.units)]
    header = page.locator("#table-groups th", has_text="channels")
    header.locator("button").click()
    assert names_in(page, "#table-groups", 2) == units
    assert header.get_attribute("aria-sort") == "descending"
    header.locator("button").click()
    assert names_in(page, "#table-groups", 2)[0] == units[-1]
    page.locator("#table-groups th", has_text="group").locator("button").click()
    assert names_in(page, "#table-groups", 1)[:2] == ["conv1", "fc"]
    page.locator("#table-groups th", has_text="no.").locator("button").click()
    page.locator("#table-groups th", has_text="no.").locator("button").click()
    assert names_in(page, "#table-groups", 0)[:2] == ["1", "2"]


def test_tables_filter_and_copy_what_is_shown(page):
    page.evaluate(
        "Object.defineProperty(navigator, 'clipboard', {value: {writeText: async text => { window.copied = text; }}})"
    )
    tools = page.locator('.tools[data-for="table-groups"]')
    tools.locator("input").fill("layer3.")
    wanted = [group for group in slim_report().groups if group.name.startswith("layer3.")]
    assert names_in(page, "#table-groups", 1) == [group.name for group in wanted]
    tools.locator("button").click()
    expect(tools.locator(".said")).to_have_text(f"{len(wanted)} rows copied")
    rows = list(csv.DictReader(io.StringIO(page.evaluate("window.copied"))))
    assert [row["group"] for row in rows] == [group.name for group in wanted]
    assert [int(row["kept"]) for row in rows] == [group.kept for group in wanted]
    assert float(rows[0]["share of MACs"]) == wanted[0].macs_share
    tools.locator("input").fill("")
    assert len(names_in(page, "#table-groups", 1)) == len(slim_report().groups)


def test_layers_have_their_widths(page):
    group = next(group for group in slim_report().groups if group.kept < group.units)
    page.locator('.tools[data-for="table-layers"] input').fill(group.name)
    assert f"{group.units:,} → {group.kept:,}" in names_in(page, "#table-layers", 2)
    page.locator('.tools[data-for="table-layers"] input').fill("")


# ---------------------------------------------------------------- the graph


def node(page, name):
    return page.locator(f'#graph .node[aria-label^="{name}:"], #graph .node[aria-label^="{name},"]')


def test_a_click_on_a_group_lights_its_members(page):
    node(page, "layer1.0.conv1").click()
    lit = page.locator("#graph .node.lit").evaluate_all("nodes => nodes.map(node => node.getAttribute('aria-label'))")
    assert {label.split(":")[0] for label in lit} == {"conv1", "layer1.0.conv1", "layer1.0.conv2"}
    assert page.locator("#graph .lines path.lit").count() == 2
    for text in ("written by layer1.0.conv1", "read by layer1.0.conv2"):
        expect(page.locator("#picked")).to_contain_text(text)
    assert page.locator("#kept a.lit").count() == 1
    node(page, "layer1.0.conv1").click()
    assert page.locator("#graph .lit").count() == 0
    expect(page.locator("#picked")).to_be_hidden()


def test_the_graph_finds_layers_and_takes_keys(page):
    page.locator("#find").fill("layer4.2.conv2")
    assert "1 layer in 2 groups" in page.locator("#found").inner_text()
    assert page.locator("#graph .node.match").count() == 2
    page.locator("#find").press("Enter")
    expect(page.locator("#picked h3")).to_have_text("layer4.2.conv2")
    page.locator("#graph .node.picked").focus()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Enter")
    assert page.locator("#picked h3").inner_text() != "layer4.2.conv2"
    page.locator("#find").fill("")
    page.locator("#graph .node.picked").press("Enter")


def test_colours_follow_what_was_chosen(page):
    fills = "nodes => nodes.map(node => node.style.fill)"
    seen = set()
    for scale in ("keep", "density", "macs", "time"):
        page.locator("#colour").select_option(scale)
        seen.add(tuple(page.locator("#graph .front").evaluate_all(fills)))
    assert len(seen) == 3  # time was made up in proportion to MACs


def test_densenet_201_opens_by_module(dense_page):
    nodes = dense_page.locator("#graph .node")
    assert nodes.count() < 20
    node(dense_page, "features.denseblock3").click()
    assert 50 < nodes.count() < 80
    dense_page.locator("#open .chip", has_text="denseblock3").click()
    assert nodes.count() < 20
    dense_page.locator("#find").fill("denseblock4.denselayer9.conv2")
    dense_page.locator("#find").press("Enter")
    expect(dense_page.locator("#picked h3")).to_have_text("features.denseblock4.denselayer9.conv2")
    for _ in range(3):
        if dense_page.locator("#more").is_enabled():
            dense_page.locator("#more").click()
    assert nodes.count() == len(dense_report().groups)


# ---------------------------------------------------------------- screens and paper


@pytest.mark.parametrize("name", ["page", "alarming_page", "dense_page"])
def test_a_phone_needs_no_sideways_scrolling(request, name):
    page = request.getfixturevalue(name)
    page.set_viewport_size(PHONE)
    until(page, "document.querySelector('#treemap .main-svg').clientWidth < 390")
    assert page.evaluate("[document.documentElement.scrollWidth, document.body.scrollWidth]") == [390, 390]
    page.set_viewport_size(DESK)
    until(page, "document.querySelector('#treemap .main-svg').clientWidth > 900")


def brightness(page, selector, what):
    code = page.locator(selector).first.evaluate(f"node => getComputedStyle(node).{what}")
    return sum(map(int, re.findall(r"\d+", code)[:3])) / 765


def test_dark_is_dark_and_follows_the_system(page):
    page.emulate_media(color_scheme="dark")
    until(page, "getComputedStyle(document.body).backgroundColor !== 'rgb(255, 255, 255)'")
    assert brightness(page, "body", "backgroundColor") < 0.2 < 0.6 < brightness(page, "#curve .xtitle", "fill")
    page.emulate_media(color_scheme="light")
    until(page, "getComputedStyle(document.body).backgroundColor === 'rgb(255, 255, 255)'")
    assert brightness(page, "#curve .xtitle", "fill") < 0.5


def test_it_prints_in_light_and_as_wide_as_paper(page):
    page.emulate_media(color_scheme="dark")
    page.evaluate("addEventListener('beforeprint', () => (window.announced = true), {once: true})")
    printed = page.pdf(format="A4")
    assert page.evaluate("window.announced")
    assert printed.startswith(b"%PDF")
    assert 3 <= len(re.findall(rb"/Type\s*/Page\b", printed)) <= 12
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("#curve .main-svg").first.evaluate("svg => svg.clientWidth") < 700
    assert brightness(page, "body", "backgroundColor") == 1
    assert page.locator("details:not([open])").count() == 0
    assert brightness(page, "#curve .xtitle", "fill") < 0.5
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    page.emulate_media(media="screen", color_scheme="light")
    assert not page.evaluate("document.documentElement.classList.contains('paper')")


@pytest.mark.parametrize("name", ["page", "alarming_page"])
def test_axe_finds_nothing_serious(request, name):
    page = request.getfixturevalue(name)
    found = Axe().run(page, context={"exclude": [".main-svg"]}).response["violations"]
    serious = [(rule["id"], rule["nodes"][0]["html"]) for rule in found if rule["impact"] in ("serious", "critical")]
    assert serious == []


# ---------------------------------------------------------------- hostile names


ATTACK = '</script><script>window.attacked=1</script><img src="x" onerror="attacked=1">{{7*7}}<b>'


def test_names_are_only_ever_text(browser, files):
    base = slim_report()
    groups = tuple(
        replace(row, name=f"{ATTACK}.{row.name}", members=(ATTACK, "__proto__"), reason=ATTACK) for row in base.groups
    )
    hostile = replace(
        base,
        model=ATTACK,
        criterion=ATTACK,
        command_line=ATTACK,
        notes=(ATTACK,),
        groups=groups,
        modules=tuple(replace(row, path=f"<script>.{ATTACK}.{row.path}") for row in base.modules),
        links=tuple(replace(link, path=ATTACK + link.path) for link in base.links),
        findings=tuple(
            replace(finding(base, 0, "capacity"), where=(groups[3].name, ATTACK), seen=ATTACK) for _ in range(2)
        ),
        saliency=replace(
            base.saliency,
            groups=tuple(replace(row, group=f"{ATTACK}.{row.group}") for row in base.saliency.groups),
            agreement=replace(base.saliency.agreement, criteria=(ATTACK, "a", "b", "c")),
        ),
    )
    with opened(browser, files("hostile", hostile)) as page:
        assert page.locator("h1").inner_text() == ATTACK
        page.locator("#find").fill("layer3")
        page.locator("#find").press("Enter")
        expect(page.locator("#picked h3")).to_contain_text(ATTACK)
        page.locator("#kept a").nth(2).hover()
        expect(page.locator("#tip")).to_contain_text(ATTACK)
        assert "{{7*7}}<b>" in page.locator("#treemap").text_content()
        assert page.locator("main img").count() == 0
        assert page.evaluate("window.attacked") is None


# ---------------------------------------------------------------- the file


@pytest.mark.parametrize("name", REPORTS)
def test_the_page_is_one_small_file(files, name):
    text = files(name).read_text(encoding="utf-8")
    assert len(text.encode()) < LARGEST_PAGE
    own = text.replace(packed_plotly(), "")
    assert len(own) < 800_000
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|@import|<link|src=", own)


def test_the_page_is_the_same_on_every_run():
    assert render_html(slim_report()) == render_html(slim_report())
