import html.parser
import re

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from tests.train.compare.made_up import FACTS, example, full, lora, run, runs
from train.compare.reporting import tables
from train.compare.reporting.pages import HTML, MARKDOWN, write_report
from train.compare.reporting.pictures import draw
from train.compare.reporting.recommend import recommend
from train.compare.result import Comparison


class Parsed(html.parser.HTMLParser):
    """The tables and pictures of a page, and the tags that it opens and closes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.images: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag == "img":
            self.images.append(dict(attributes)["src"])
        if tag not in ("img", "meta"):
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & {*self.open}:
            self.tables[-1][-1][-1] += data


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    write_report(example(), folder)
    return folder, (folder / HTML).read_text(), (folder / MARKDOWN).read_text()


def last_place(cell):
    """Returns half a unit of the last digit that is shown."""
    return 0.5000001 * 10.0 ** -len(cell.partition(".")[2])


def test_the_main_table_equals_the_measurements(written):
    _, page, text = written
    shown = Parsed(page).tables[0]
    lines = [line for line in text.split("\n") if line.startswith("| ")]
    from_markdown = [
        [re.sub(r"\\|\*\*", "", cell) for cell in line.strip("| ").split(" | ")]
        for line in lines[: len(shown) + 1]
    ]
    assert from_markdown[:1] + from_markdown[2:] == shown
    rows = tables.rows(example())
    assert len(shown) == 1 + len(rows)
    for cells, row in zip(shown[1:], rows, strict=True):
        if row.quality is None:
            assert cells[1:6] == ["–"] * 4 + ["0"]
            assert cells[8] == "1 failed, 2 stopped early"
            continue
        # From the runs themselves, not from the aggregated row.
        scores = [run.score for run in example().runs if run.arm == row.arm]
        mean = sum(scores) / 3
        deviation = (sum((score - mean) ** 2 for score in scores) / 2) ** 0.5
        for cell, value in zip(
            cells[1:5], (mean, deviation, min(scores), max(scores)), strict=True
        ):
            assert float(cell) == pytest.approx(value, abs=last_place(cell))
        assert len(cells[2].lstrip("0.")) == 2, "two significant digits of the deviation"
        assert len({last_place(cell) for cell in cells[1:5]}) == 1
        loss = sum(run.held_out_loss for run in row.runs) / 3
        assert float(cells[6]) == pytest.approx(loss, abs=last_place(cells[6]))
        assert cells[5] == "3"
        assert int(cells[7].replace(",", "")) == row.trained_parameters


def test_the_page_is_whole_and_stands_alone(written):
    folder, page, text = written
    parsed = Parsed(page)
    assert parsed.open == []
    assert len(parsed.images) == 6 and all(
        one.startswith("data:image/png;base64,") for one in parsed.images
    )
    outside = re.sub(r'src="data:[^"]*"', "", page)
    assert not re.search(r"<script|https?:|url\(|@import|<link", outside)
    links = re.findall(r"\]\(([^)]*)\)", text)
    assert len(links) == 6 and all((folder / link).is_file() for link in links)
    sections = re.findall("<h2>(.*?)</h2>", page)
    assert sections == [
        *("Quality", "Pictures", "Costs", "Early stopping", "Latency of inference", "Storage"),
        *("Forgetting", "Failed runs", "Facts"),
    ]


def test_what_a_reader_asks_is_said(written):
    """The verdict, what would decide it, and the meaning of rows, peaks and tables."""
    _, page, text = written
    (verdict,) = re.findall('<p class="verdict">(.*?)</p>', page)
    assert re.sub("<[^>]*>", "", verdict).startswith(recommend(example()).headline[:40])
    assert "Without training, exact match is 0.120 by always the same" in page
    assert re.search("row that stands out is (ahead so far|the one recommended)", text)
    assert page.count("<tr class=best>") == len(re.findall(r"^\| \*\*LoRA", text, re.M)) == 1
    assert "Python, the compiler" in text and page.count("scrolls sideways") == page.count("<table")


def test_figures_say_what_they_are_of(written):
    """The weights that were read, one seed's costs, and times that noise does not tell apart."""
    _, _, text = written
    assert text.count("4-bit weights, not the hub's bf16") == 2, (
        "beside the title, and in the facts"
    )
    assert "of one seed of the best arm of each method" in text
    row = next(line for line in text.splitlines() if "| a decoding step of 8 rows |" in line)
    assert "| not told apart (0.970 to 1.04) | 1.18 (1.12 to 1.31) |" in row
    assert "the base is saved as a full model is" in text


def test_a_method_has_one_colour_in_all_pictures(tmp_path, monkeypatch):
    figures = {}
    monkeypatch.setattr(Figure, "savefig", lambda of, file: figures.update({file.name: of}))
    draw(example(), tmp_path)
    colours: dict[str, set[str]] = {}
    for name in ("curves.png", "rates.png", "sizes.png"):
        for axes in figures[name].axes:
            for line in [*axes.lines, *(c.lines[0] for c in axes.containers)]:
                method = str(line.get_label()).split(" ")[0].split("\n")[0]
                if not method.startswith("_"):
                    colours.setdefault(method, set()).add(line.get_color())
    for axes in figures["costs.png"].axes:
        for bar, label in zip(axes.patches, axes.get_yticklabels(), strict=True):
            colours[label.get_text().split(" ")[0]].add(to_hex(bar.get_facecolor()).upper())
    assert set(colours) >= {"LoRA", "DoRA", "full"}
    assert all(len(found) == 1 for found in colours.values()), colours
    assert len({*map(tuple, colours.values())}) == len(colours)


def test_names_of_users_are_escaped(written):
    _, page, text = written
    assert "made/up-&lt;1B&gt; &amp; co" in page and "<1B>" not in page
    assert "&lt;nan&gt; &amp; no more" in page
    assert r"made/up-\<1B\> \& co" in text


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, by their files' names, in place of the files."""
    found = {}
    monkeypatch.setattr(Figure, "savefig", lambda of, file: found.update({file.name: of}))
    return found


def test_rates_are_drawn_at_the_end_unless_settings_were_stopped(tmp_path, figures):
    late = [runs(arm, 1.0, 1.1) for arm in (lora(), lora(8, 3e-3), full(), full(3e-4))]
    found = Comparison(facts=FACTS, runs=tuple(run for group in late for run in group))
    titles = {one.file: one.title for one in draw(found, tmp_path)}
    assert titles["rates.png"] == "Held-out loss (nats per token) by learning rate"
    assert set(titles) == set(figures)
    titles = {one.file: one.title for one in draw(example(), tmp_path)}
    assert titles["rates.png"] == "Held-out loss by learning rate, early"


def test_lines_of_one_picture_are_told_apart(tmp_path, figures):
    arms = [lora(8, rate)._replace(alpha=alpha) for alpha in (4, 16) for rate in (1e-3, 3e-3)]
    arms += [full(rate)._replace(batch_size=size) for size in (8, 32) for rate in (1e-4, 3e-4)]
    found = [run(arm, 0, 1 + arm.batch_size * arm.learning_rate) for arm in arms]
    draw(Comparison(facts=FACTS, runs=tuple(found)), tmp_path)
    (axes,) = figures["rates.png"].axes
    assert len(axes.containers) == 4, "each has two rates"
    lines = [container.lines[0] for container in axes.containers]
    styles = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines}
    assert len(styles) == 4


def test_only_pictures_with_data_are_drawn(tmp_path):
    found = Comparison(
        facts=FACTS,
        runs=tuple(
            run.__class__(
                name=run.name, arm=run.arm, seed=run.seed, status="failed", error="no memory"
            )
            for run in (*runs(lora(), 1.0), *runs(full(), 1.0))
        ),
    )
    assert write_report(found, tmp_path).verdict == "undecided"
    assert list((tmp_path / "pictures").iterdir()) == []
    assert "no memory" in (tmp_path / HTML).read_text()
    assert "<h2>Pictures" not in (tmp_path / HTML).read_text()
