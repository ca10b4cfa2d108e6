"""The static site: what its pages hold, escaping, what it refuses; in a real browser: sorting, filters, opening a run."""

import json
import re
import shutil
from html.parser import HTMLParser

import pytest

from backdoor_bench import collect, experiments
from backdoor_bench.reporting import compare, site
from scripts import report
from tests.conftest import CONF
from tests.fake_runs import PNG, fake_run

EVIL = "<script>window.hacked=1</script>"
EVIL_TOO = "<img src=x onerror=window.hacked=1>"


class Page(HTMLParser):
    """Tags with their attributes, and all text outside of scripts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        if not self.tags or self.tags[-1][0] != "script":
            self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def _page(path):
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture
def roots(tmp_path):
    """Two seeds of a cell of TRAP's Table I, one undefended run, one at a reduced budget, one with foreign names."""
    root = tmp_path / "runs"
    before = {"acc": 0.948, "asr": 1.0}
    for seed in (0, 1):
        fake_run(
            root, "badnets", "trap", seed, undefended=before, acc=0.94 + seed / 100, asr=0.001, precision=1, recall=1
        )
    fake_run(root, "badnets", "no_defense", acc=0.948, asr=0.7)
    fake_run(root, "badnets", "trap", dataset="photo_digits", model="small_cnn", budget="small", acc=0.7, asr=0.01)
    odd = fake_run(root, EVIL, EVIL_TOO, settings=(f"attack.name={EVIL}",), acc=0.5, config=False, folder=root / "odd")
    (odd / "figures" / f"{EVIL_TOO}.png").write_bytes(PNG)
    (root / "torn").mkdir()
    (root / "torn" / "result.json").write_text('{"a')
    return root


@pytest.fixture
def made(roots, tmp_path, capsys):
    out = tmp_path / "site"
    assert report.main([str(roots), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"5 runs: {out / 'index.html'}\n"
    return out


def test_the_leaderboard_has_a_row_a_cell_with_links_to_its_seeds(made):
    index = _page(made / "index.html")
    links = [one["href"] for one in index.all("a") if one.get("href", "").startswith("runs/")]
    assert len(links) == len(set(links)) == 5
    assert all((made / link).is_file() for link in links)
    rows = json.loads(re.search(r'id="rows">(.*?)</script>', (made / "index.html").read_text(), re.DOTALL)[1])
    trap = next(row for row in rows if row["n"] == 2)
    assert (trap["acc"], trap["asr"], trap["gap"], trap["undefended_asr"]) == (94.5, 0.1, 94.4, 100)
    assert trap["stages"] == {"train": 60, "embedding": 30, "removal": 30}
    assert trap["isolation"] == "trap"
    assert "torn/result.json is torn" in index.text


def test_nothing_comes_from_elsewhere(made):
    for file in [*made.rglob("*.html"), made / "assets" / "site.css", made / "assets" / "site.js"]:
        assert not re.search(r"https?://", file.read_text(encoding="utf-8")), file
    for file in made.rglob("*.html"):
        page = _page(file)
        names = [
            one.get("href") or one.get("src") for one in (*page.all("link"), *page.all("script"), *page.all("img"))
        ]
        for name in filter(None, names):
            assert name == "data:," or (file.parent / name.replace("%20", " ")).exists() or "%3C" in name


def test_every_name_is_escaped(made):
    for file in made.rglob("*.html"):
        page = _page(file)
        assert all("hacked" not in str(one.get("src", "")) or "%3C" in one["src"] for one in page.all("script")), file
        assert not any("onerror" in one for _, one in page.tags), file
        assert "<script>window" not in file.read_text(encoding="utf-8"), file
    odd = _page(next(made.glob("runs/*window*.html")))
    assert f"{EVIL} against {EVIL_TOO}" in odd.text
    assert "The run folder has no config.yaml" in odd.text


def test_a_runs_page_shows_numbers_figures_and_how_to_repeat_it(made, roots):
    page = _page(made / "runs" / sorted(path.name for path in made.glob("runs/cifar10-badnets-trap-*"))[0])
    assert "python run.py paper=trap dataset=cifar10 model=resnet18 attack=badnets defense=trap seed=" in page.text
    assert "hardware.device=cpu hardware.threads=1" in page.text
    assert "backdoor_bench.attacks.x.X" in page.text
    (picture,) = page.all("img")
    assert (made / "runs" / picture["src"]).read_bytes() == PNG
    siblings = [one["href"] for one in page.all("a") if one.get("href", "").startswith("cifar10-badnets-trap")]
    assert len(siblings) == 1


def test_the_tables_of_the_papers_with_their_files(made):
    table = (made / "tables" / "trap_table1.html").read_text()
    # 94.5 +- 0.71 beside the printed 94.8: near; ASR 70 of an undefended model beside 100: far.
    assert re.search(r'class="value ours near">\s*<span class="metric">ACC</span>', table)
    assert re.search(r'class="value ours far">\s*<span class="metric">ASR</span>.*?-30\.00 !', table, re.DOTALL)
    for ending in ("md", "tex", "csv"):
        assert (made / "tables" / f"trap_table1.{ending}").is_file()
    reduced = _page(made / "tables" / "trap_table1-small-photo_digits.html").text
    assert "at the reduced budget small" in reduced
    assert "its numbers" in reduced


def test_an_earlier_report_is_replaced_and_keeps_what_w_and_b_left(made, roots, capsys):
    (made / "tracking").mkdir()
    (made / "tracking" / "id.txt").write_text("x")
    (made / "runs" / "stale.html").touch()
    assert report.main([str(roots), "--out", str(made), "--figures", "none"]) == 0
    assert not (made / "runs" / "stale.html").exists()
    assert not (made / "figures").exists()
    assert (made / "tracking" / "id.txt").read_text() == "x"
    assert [path.name for path in made.parent.iterdir() if path.name.startswith(".")] == []


def test_figures_can_be_linked_and_links_in_a_run_folder_are_not_followed(roots, tmp_path, capsys):
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"secret")
    place = next(roots.rglob("no_defense/*/seed0")) / "figures"
    (place / "leak.png").symlink_to(secret)
    for how in ("link", "copy"):
        out = tmp_path / how
        assert report.main([str(roots), "--out", str(out), "--figures", how]) == 0
        page = _page(next(out.glob("runs/cifar10-badnets-no_defense-*.html")))
        (picture,) = page.all("img")
        assert (out / "runs" / picture["src"]).resolve().read_bytes() == PNG
        assert ("runs/cifar10" in picture["src"]) == (how == "link")


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_folder_that_is_no_report_is_left_alone(roots, tmp_path, capsys, kind):
    out = tmp_path / "mine"
    if kind == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "thesis.txt").write_text("mine")
    assert report.main([str(roots), "--out", str(out)]) == 2
    assert capsys.readouterr().err.startswith(f"error: --out {out} ")
    assert out.exists()


def test_bad_input_ends_with_its_code(roots, tmp_path, capsys, monkeypatch):
    (tmp_path / "empty").mkdir()
    assert report.main([str(tmp_path / "empty"), "--out", str(tmp_path / "o")]) == 2
    assert "no finished run" in capsys.readouterr().err
    fake_run(roots, "sig", schema=99, acc=0.5)
    assert report.main([str(roots), "--out", str(tmp_path / "o")]) == 3
    monkeypatch.setattr(site.importlib.util, "find_spec", lambda name: None)
    assert report.main([str(roots), "--out", str(tmp_path / "o")]) == 2
    assert "pip install 'backdoor-bench[report]'" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_two_runs_never_share_a_page(tmp_path):
    for place in ("a", "b"):
        fake_run(tmp_path / place, acc=0.5)
    runs = collect.read([tmp_path])
    for run in runs:
        run.result["config_hash"] = "same"
    names = site._page_names(runs)
    assert len(set(names)) == 2


def test_defences_across_and_rates_down(tmp_path):
    table = compare.compare(CONF, experiments.load(CONF, "trap_table4"), {})
    (grid, *_) = site.grids(table)
    assert any(", 0.05" in name or ", 0.005" in name for name, _ in grid.rows)
    assert all(len(cells) == len(grid.columns) for _, cells in grid.rows)


def test_w_and_b_gets_the_site_without_its_own_files(made, monkeypatch):
    from backdoor_bench import tracking

    told = {}

    class Fake:
        def artifact(self, name, kind, paths):
            told["paths"] = {path.name for path in paths}

        def table(self, name, path, max_rows):
            told["table"] = path.name

        def finish(self, summary):
            told["runs"] = summary["runs"]

    monkeypatch.setattr(tracking, "start", lambda config, *rest: told.update(group=config.group) or Fake())
    (made / "tracking").mkdir()
    report.track(made, "offline", "trap_table1", 5)
    assert told == {
        "group": "trap_table1",
        "paths": {"assets", "figures", "index.html", "report.json", "runs", "runs.csv", "tables"},
        "table": "runs.csv",
        "runs": 5,
    }


# ------------------------------------------------------------------ in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Headless Chromium from the PATH."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs chromium and chromedriver on the PATH")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for word in (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):  # fmt: skip
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    opened.set_page_load_timeout(300)
    opened.set_script_timeout(300)
    yield opened
    opened.quit()


@pytest.fixture(scope="module")
def thousand(tmp_path_factory):
    """The site of 1,000 results: three data sets, ten defences, eleven attacks, three seeds, and some odd names."""
    root = tmp_path_factory.mktemp("thousand")
    attacks = sorted(file.stem for file in (CONF / "attack").glob("*.yaml"))[:11]
    defenses = ("no_defense", "trap", "dbr", "dst", "tr", "abl", "nad", "dbd", "cbd", "asd")
    number = 0
    for dataset in ("cifar10", "cifar100", "imagenet_subset"):
        for attack in attacks:
            for place, defense in enumerate(defenses):
                for seed in range(3):
                    metrics = {"acc": 0.5 + 0.04 * place + seed / 500, "asr": (number % 97) / 100}
                    flags = {} if defense in ("no_defense", "nad") else {"precision": 0.9, "recall": place / 10}
                    fake_run(root, attack, defense, seed, dataset=dataset, **metrics, **flags)
                    number += 1
    for place in range(10):
        fake_run(
            root, EVIL, EVIL_TOO, place, acc=0.123, asr=0.5, precision=0.5, recall=0.5, folder=root / f"odd{place}"
        )
    out = tmp_path_factory.mktemp("site") / "report"
    assert report.main([str(root), "--out", str(out)]) == 0
    assert len(list((out / "runs").iterdir())) == 1000
    return out


def _open(browser, address, width, height):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(address.as_uri())
    wait = WebDriverWait(browser, 300)
    if address.name == "index.html":
        wait.until(lambda page: page.find_element(By.TAG_NAME, "body").get_attribute("data-ready") == "yes")
    overflow = browser.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
    assert overflow <= 0, f"{address.name} is wider than {width} px"
    return wait


def _column(browser, number):
    """The texts of a column's cells on the page shown."""
    script = "return [...document.querySelectorAll(arguments[0])].map((cell) => cell.innerText)"
    return browser.execute_script(script, f"#runs tbody td:nth-child({number})")


def _clean(browser):
    assert [line for line in browser.get_log("browser") if line["level"] in ("SEVERE", "WARNING")] == []
    assert browser.execute_script("return window.hacked") is None


def _show(browser, element):
    """Scrolled to the middle of the window, where the sticky header does not cover it; returns it."""
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    return element


def _choose(browser, css, value):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import Select

    Select(browser.find_element(By.CSS_SELECTOR, css)).select_by_value(value)


@pytest.mark.slow
def test_sort_filter_search_charts_and_opening_a_run(browser, thousand):
    from selenium.webdriver.common.by import By

    wait = _open(browser, thousand / "index.html", 1280, 900)
    shown = browser.find_element(By.ID, "shown")
    assert shown.text == "331 of 331 rows"

    heading = browser.find_element(By.XPATH, "//table[@id='runs']//th[contains(., 'ACC') and not(contains(., 'ASR'))]")
    for order in (sorted, lambda values: sorted(values, reverse=True)):
        heading.click()
        values = [float(text.split()[0]) for text in _column(browser, 6)]
        assert len(values) == 25
        if values != order(values):  # the first click may sort either way
            heading.click()
            values = [float(text.split()[0]) for text in _column(browser, 6)]
        assert values == order(values)

    _choose(browser, "select[data-filter=defense]", "trap")
    assert shown.text == "33 of 331 rows"
    assert set(_column(browser, 3)) == {"trap"}
    _choose(browser, "select[data-filter=dataset]", "cifar100")
    assert shown.text == "11 of 331 rows"
    _show(browser, browser.find_element(By.ID, "clear")).click()
    assert shown.text == "331 of 331 rows"

    # Names with markup are text, in the table, the filters and the charts.
    _choose(browser, "select[data-filter=attack]", EVIL)
    assert (_column(browser, 2), _column(browser, 3)) == ([EVIL], [EVIL_TOO])
    for name in ("tradeoff", "isolation", "cost"):
        chart = browser.find_element(By.ID, name)
        _show(browser, chart)
        wait.until(lambda page, chart=chart: chart.get_attribute("data-drawn") == "yes")
    assert EVIL_TOO in browser.find_element(By.ID, "cost").text
    points = "return document.querySelectorAll('#tradeoff .scatterlayer .point').length"
    assert browser.execute_script(points) == 1
    _show(browser, browser.find_element(By.ID, "clear")).click()
    _show(browser, browser.find_element(By.ID, "tradeoff"))
    wait.until(lambda page: page.execute_script(points) == 331)

    _show(browser, browser.find_element(By.CSS_SELECTOR, "input[type=search]")).send_keys("imagenet_subset dbr")
    wait.until(lambda page: shown.text == "11 of 331 rows")
    _show(browser, browser.find_element(By.CSS_SELECTOR, "#runs .seeds a")).click()
    wait.until(lambda page: "/runs/" in page.current_url)
    assert browser.find_element(By.TAG_NAME, "h1").text.endswith("against dbr")
    assert "python run.py" in browser.find_element(By.CSS_SELECTOR, "pre.command").text
    picture = browser.find_element(By.CSS_SELECTOR, "figure img")
    _show(browser, picture)
    wait.until(lambda page: page.execute_script("return arguments[0].naturalWidth", picture) == 1)
    _clean(browser)


@pytest.mark.slow
def test_a_papers_table_in_the_browser(browser, thousand):
    from selenium.webdriver.common.by import By

    for width, height in ((1280, 900), (390, 844)):
        _open(browser, thousand / "tables" / "trap_table1.html", width, height)
        near, far = (browser.find_elements(By.CSS_SELECTOR, f"table .value.{name}") for name in ("near", "far"))
        assert near
        assert near[0].value_of_css_property("background-color") != far[0].value_of_css_property("background-color")
        scroll = "const box = document.querySelector('.scroll'); return box.scrollWidth > box.clientWidth"
        assert browser.execute_script(scroll)
    _clean(browser)


@pytest.mark.slow
def test_a_narrow_window(browser, thousand):
    from selenium.webdriver.common.by import By

    wait = _open(browser, thousand / "index.html", 390, 844)
    assert not browser.find_element(By.CSS_SELECTOR, "#runs thead").is_displayed()
    _choose(browser, "#sort", "6,asc")
    rates = [float(text.split()[0]) for text in _column(browser, 7)]
    assert rates == sorted(rates)
    card = browser.find_element(By.CSS_SELECTOR, "#runs tbody tr")
    assert card.size["width"] <= 390
    for name in ("tradeoff", "isolation", "cost"):
        chart = browser.find_element(By.ID, name)
        _show(browser, chart)
        wait.until(lambda page, chart=chart: chart.get_attribute("data-drawn") == "yes")
        assert chart.size["width"] <= 390
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    _open(browser, next((thousand / "runs").glob("*trap*.html")), 390, 844)
    _clean(browser)
