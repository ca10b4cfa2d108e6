"""The static site: what its pages hold, escaping, what it refuses; in a real browser: sorting, filters, opening a run."""

import dataclasses
import json
import os
import re
import shutil
from html.parser import HTMLParser
from urllib.parse import unquote

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
    assert trap["stages"] == {"embedding": 30, "removal": 30}
    assert trap["isolation"] == "trap"
    assert "torn/result.json is torn" in index.text
    # A filter offers what is there, "none" where some rows have no budget; a single value needs no filter.
    filters = {one["data-filter"] for one in index.all("select") if "data-filter" in one}
    assert filters == {"dataset", "model", "attack", "defense", "budget"}
    assert {"", "=", "=small"} <= {one["value"] for one in index.all("option")}
    # A number that is not there sorts by no number.
    assert sum(one.get("data-order") == "" for one in index.all("td")) > 4


def test_a_row_has_all_devices_of_its_seeds_and_the_data(tmp_path):
    for seed, device in enumerate(("cuda:0", "cpu")):
        more = {"environment": {"device": device}, "data": "fingerprint"}
        fake_run(tmp_path, seed=seed, acc=0.5, more=more)
    cells = collect.newest(collect.read([tmp_path]))
    pages = {run.folder: site.Page(run, "x") for seeds in cells.values() for run in seeds.values()}
    (row,) = site.leaderboard(cells, pages)
    assert (row["device"], row["data"]) == (["cpu", "cuda:0"], "fingerpr")


def test_nothing_comes_from_elsewhere(made):
    for file in [*made.rglob("*.html"), made / "assets" / "site.css", made / "assets" / "site.js"]:
        assert not re.search(r"https?://", file.read_text(encoding="utf-8")), file
    # The libraries name addresses (in licences, for maps that are not drawn) but read no style or font from one.
    styles = (made / "assets" / "datatables.css").read_text(encoding="utf-8")
    assert not re.search(r"@import|url\(\s*['\"]?(?!data:)", styles)
    for file in made.rglob("*.html"):
        for _, one in _page(file).tags:
            for name in filter(None, (one.get("href"), one.get("src"))):
                address = unquote(name.partition("#")[0])
                assert name == "data:," or (file.parent / address).exists(), (file, name)


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
    capsys.readouterr()
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


FOREIGN_RECORD, OWN_RECORD = '{"title": "mine"}', '{"schema": 1, "runs": 1, "tables": []}'


@pytest.mark.parametrize(
    "files",
    [
        None,
        {"thesis.txt": "mine"},
        {"report.json": FOREIGN_RECORD, "index.html": "mine"},
        {"report.json": "[1]"},
        {"report.json": OWN_RECORD, "thesis.txt": "mine"},
        {"report.json": OWN_RECORD, "runs/badnets/result.json": "{}"},
        {"report.json": OWN_RECORD, "figures/a/b/c.png": "mine"},
        {"report.json": OWN_RECORD, "src/index.html": "mine"},
    ],
)
def test_a_folder_that_is_no_report_is_left_alone(roots, tmp_path, capsys, files):
    out = tmp_path / "mine"
    if files is None:
        out.write_text("mine")
    for name, text in (files or {}).items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text)
    assert report.main([str(roots), "--out", str(out)]) == 2
    assert capsys.readouterr().err.startswith(f"error: --out {out} ")
    assert all((out / name).read_text() == text for name, text in (files or {}).items())
    assert out.exists()


def test_runs_are_not_shown_in_their_own_folder(roots, tmp_path, capsys):
    out = tmp_path / "site"
    roots.rename(out)
    for root in (out, out / "cifar10"):
        assert report.main([str(root), "--out", str(out)]) == 2
        assert f"--out {out} holds {root}, whose runs are to be shown" in capsys.readouterr().err


def test_what_a_killed_build_left_is_finished_by_the_next(tmp_path, monkeypatch):
    out, old, new = tmp_path / "site", tmp_path / ".site.1.old", tmp_path / ".site.2.tmp"
    monkeypatch.setattr(site, "_alive", lambda pid: pid == 3)
    for place in (old, new, tmp_path / ".site.3.tmp"):
        (place / "tracking").mkdir(parents=True)
        (place / "from").write_text(place.name)
    site._clean_up(out)  # killed between the two names
    assert (out / "from").read_text() == old.name
    assert (out / "tracking").is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".site.3.tmp", "site"]
    (out / "tracking").rename(tmp_path / "t")
    (old / "tracking").mkdir(parents=True)
    site._clean_up(out)  # killed before W&B's files had moved on
    assert (out / "from").exists()
    assert (out / "tracking").is_dir()
    assert not old.exists()
    assert site._beside(out, "tmp").name == f".site.{os.getpid()}.tmp"


def test_a_report_that_cannot_take_its_place_leaves_the_earlier_one(tmp_path):
    out = tmp_path / "site"
    out.mkdir()
    (out / "from").touch()
    with pytest.raises(OSError, match="nowhere"):
        site._replace(tmp_path / "nowhere", out)
    assert [path.name for path in tmp_path.iterdir()] == ["site"]
    assert (out / "from").exists()


def test_a_process_that_runs_is_alive():
    assert (site._alive(os.getppid()), site._alive(os.getpid()), site._alive(10**30)) == (True, False, False)


def test_torn_results_are_named_on_the_screen(tmp_path, capsys):
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "result.json").write_text('{"a')
    assert report.main([str(tmp_path), "--out", str(tmp_path / "o")]) == 2
    warning, error = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: ")
    assert error.startswith("error: no finished run")
    assert "torn/result.json is torn" in warning
    assert "torn/result.json is torn" in error


def test_odd_names_values_and_pictures_of_one_run_do_not_end_the_report(tmp_path, capsys, monkeypatch):
    root = tmp_path / os.fsdecode(b"caf\xe9")
    long = 300 * "x"
    fake_run(root, folder=root / "1", dataset=long, model=long, budget=long, acc=0.5)
    fake_run(root, "\ud800", folder=root / "2", acc=0.5)
    numbers = {"total": 1e400, "train": 5}
    more = {"seconds": numbers, "warnings": 5, "defense_seconds": [], "metrics": {"acc": 0.5, "acc_per_class": ["x"]}}
    place = fake_run(root, folder=root / "3", more=more)
    (place / "figures" / os.fsdecode(b"caf\xe9.png")).write_bytes(PNG)
    gone = place / "figures" / "gone.png"
    gone.write_bytes(PNG)

    def link(file, target):
        if file == gone:
            gone.unlink()
        raise OSError

    monkeypatch.setattr(site.os, "link", link)
    assert report.main([str(root), "--out", str(tmp_path / "site")]) == 0
    told = capsys.readouterr()
    assert "gone.png is left out: No such file or directory" in told.err
    assert "gone.png is left out" in _page(tmp_path / "site" / "index.html").text
    pages = [_page(file) for file in sorted((tmp_path / "site" / "runs").iterdir())]
    pictures = {one["src"].rpartition("/")[2] for page in pages for one in page.all("img")}
    assert pictures == {"curves.png", "caf%E9.png"}
    assert r"caf\udce9/3" in " ".join(page.text for page in pages)
    assert report.main([str(root), "--out", str(tmp_path / "site")]) == 0  # and it can be replaced


def test_a_folder_of_figures_that_leaves_the_run_is_not_followed(roots, tmp_path, capsys):
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "private.png").write_bytes(PNG)
    place = next(roots.rglob("no_defense/*/seed0"))
    shutil.rmtree(place / "figures")
    (place / "figures").symlink_to(secret)
    assert report.main([str(roots), "--out", str(tmp_path / "site")]) == 0
    assert not list((tmp_path / "site").rglob("private.png"))


@pytest.mark.parametrize(
    ("value", "read"),
    [
        ("/data/my images", None), ("a=b,{c},[d]", None), ("it's", None), ("true", None), ("12", None), ("1e5", None),
        ("/data/x-1.2_y", "/data/x-1.2_y"), ("cuda:0", "cuda:0"), (r"a\'b", None), ("", None),
    ],
)  # fmt: skip
def test_the_command_says_every_path_as_hydra_reads_it(value, read):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    word = site._override("dataset.root", value)
    assert OverridesParser.create().parse_override(word).value() == value
    if read is not None:
        assert word == f"dataset.root={read}"


def test_tables_on_data_and_networks_that_another_table_has(tmp_path):
    fake_run(tmp_path, "badnets", "trap", dataset="gtsrb", precision=0.9, recall=1)
    fake_run(tmp_path, "smooth", "tr", model="wrn16_1", paper="tr", budget="small", acc=0.9)
    cells = collect.newest(collect.read([tmp_path]))
    names = [name for name, _ in site.measured_tables(CONF, cells, site.Options())]
    assert "trap_table3-gtsrb" in names
    assert "tr_table5-small-wrn16_1" in names
    assert len(names) == len(set(names))


def test_a_table_at_a_reduced_budget_is_not_coloured(made):
    page = (made / "tables" / "trap_table1-small-photo_digits.html").read_text()
    assert not re.search(r'class="value ours (near|off|far)"', page)
    assert "nothing is marked" in page


def test_a_cell_links_to_each_of_its_runs(made):
    page = _page(made / "tables" / "trap_table1.html")
    links = [one["href"] for one in page.all("a") if "-badnets-trap-" in one.get("href", "")]
    assert len(links) == len(set(links)) == 2
    assert all(one.get("scope") for one in page.all("th"))


def test_files_that_are_missing_are_named_below_the_table():
    made = compare.compare(CONF, experiments.load(CONF, "trap_table1"), {})
    notes = ("no file: defense=x", "3 of 6 attacks; no file: dataset=y, defense=x", "not the number of one run")
    rows = tuple(dataclasses.replace(made.rows[0], note=note) for note in notes)
    for kept, told in ((rows, ["no file yet for defense=x, dataset=y."]), (rows[2:], [])):
        assert site.files_missing(dataclasses.replace(made, rows=kept)) == told


def test_charts_have_a_name_for_who_does_not_see_them(made):
    named = [one for _, one in _page(made / "index.html").tags if one.get("role") == "img"]
    assert {one["id"] for one in named} == {"tradeoff", "precision", "recall", "cost"}
    assert all(one["aria-label"] for one in named)


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
    assert {"badnets, 0.005", "badnets, 0.05", "badnets, 0.2"} <= {name for name, _ in grid.rows}
    assert all(len(cells) == len(grid.columns) for _, cells in grid.rows)


def test_w_and_b_gets_the_site_without_its_own_files(made, monkeypatch, capsys):
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
    monkeypatch.setattr(report, "MAX_TRACKED_ROWS", 5)
    (made / "tracking").mkdir()
    report.track(made, "offline", "trap_table1", 5)
    assert told == {
        "group": "trap_table1",
        "paths": {"assets", "figures", "index.html", "report.json", "runs", "runs.csv", "tables"},
        "table": "runs.csv",
        "runs": 5,
    }
    assert re.search(r"W&B's table has the first 5 of \d\d rows; runs.csv has them all", capsys.readouterr().err)


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
        # The last one has no ASR, as all undefended runs have no precision, and was made at a budget.
        odd = {"asr": 0.5} if place < 9 else {"budget": "small"}
        fake_run(root, EVIL, EVIL_TOO, place, acc=0.123, precision=0.5, recall=0.5, folder=root / f"odd{place}", **odd)
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
    assert shown.text == "332 of 332 rows"

    heading = browser.find_element(By.XPATH, "//table[@id='runs']//th[contains(., 'ACC') and not(contains(., 'ASR'))]")
    for order in (sorted, lambda values: sorted(values, reverse=True)):
        heading.click()
        values = [float(text.split()[0]) for text in _column(browser, 6)]
        assert len(values) == 25
        if values != order(values):  # the first click may sort either way
            heading.click()
            values = [float(text.split()[0]) for text in _column(browser, 6)]
        assert values == order(values)

    # What is not there is neither the best nor the worst: it comes last both ways.
    for direction in ("asc", "desc"):
        script = (
            "const box = document.getElementById('sort'); box.add(new Option('x', arguments[0]));"
            "box.value = arguments[0]; box.dispatchEvent(new Event('change'))"
        )
        browser.execute_script(script, f"6,{direction}")
        values = [float(text.split()[0]) for text in _column(browser, 7)]
        assert values == sorted(values, reverse=direction == "desc")
        browser.find_element(By.CSS_SELECTOR, "button.last").click()
        assert _column(browser, 7)[-1] == "-"

    # A filter that has "none" beside one value is there, one with a single value is not.
    _choose(browser, "select[data-filter=budget]", "=small")
    assert shown.text == "1 of 332 rows"
    _choose(browser, "select[data-filter=budget]", "=")
    assert shown.text == "331 of 332 rows"
    assert not browser.find_elements(By.CSS_SELECTOR, "select[data-filter=paper], select[data-filter=device]")
    _show(browser, browser.find_element(By.ID, "clear")).click()

    _choose(browser, "select[data-filter=defense]", "=trap")
    assert shown.text == "33 of 332 rows"
    assert set(_column(browser, 3)) == {"trap"}
    _choose(browser, "select[data-filter=dataset]", "=cifar100")
    assert shown.text == "11 of 332 rows"
    _show(browser, browser.find_element(By.ID, "clear")).click()
    assert shown.text == "332 of 332 rows"

    # Names with markup are text, in the table, the filters and the charts.
    _choose(browser, "select[data-filter=attack]", f"={EVIL}")
    assert (_column(browser, 2), _column(browser, 3)) == ([EVIL, EVIL], [EVIL_TOO, EVIL_TOO])
    for name in ("tradeoff", "isolation", "cost"):
        chart = browser.find_element(By.ID, name)
        _show(browser, chart)
        wait.until(lambda page, chart=chart: chart.get_attribute("data-drawn") == "yes")
    assert EVIL_TOO in browser.find_element(By.ID, "cost").text
    points = "return document.querySelectorAll('#tradeoff .scatterlayer .point').length"
    assert browser.execute_script(points) == 1  # the row without ASR is no point
    _show(browser, browser.find_element(By.ID, "clear")).click()
    _show(browser, browser.find_element(By.ID, "tradeoff"))
    wait.until(lambda page: page.execute_script(points) == 331)

    _show(browser, browser.find_element(By.CSS_SELECTOR, "input[type=search]")).send_keys("imagenet_subset dbr")
    wait.until(lambda page: shown.text == "11 of 332 rows")
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
        links = browser.find_elements(By.CSS_SELECTOR, "table.grid .runs")
        assert [one.text for one in links[:1]] == ["seeds 0 1 2"]
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
