import html.parser
import itertools
import json
import os
import re

import pytest

from tessera import report
from tessera.errors import InputError, StorageError
from tessera.report.result import REQUIRED

VOID = {"meta", "link", "img", "br", "hr"}


class Page(html.parser.HTMLParser):
    """Checks that tags nest, and keeps every element with its attributes and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.text = [], [], ""
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {[tag for tag, _ in self.open]}"

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"an attribute twice on {tag}: {names}"
        element = [tag, dict(attrs), "", [inside[0] for _, inside in self.open]]
        self.elements.append(element)
        if tag not in VOID:
            self.open.append((tag, element))

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        opened, _ = self.open.pop()
        assert opened == tag, f"</{tag}> closes <{opened}>"

    def handle_data(self, data):
        self.text += data
        for _, element in self.open:
            element[2] += data

    def all(self, tag, *classes):
        return [
            (attrs, text)
            for name, attrs, text, _ in self.elements
            if name == tag and set(classes) <= set((attrs.get("class") or "").split())
        ]


@pytest.fixture
def read(tmp_path):
    def write_and_parse(*results):
        return Page(report.write(results, tmp_path).read_text(encoding="utf-8"))

    return write_and_parse


def heat_cells(page):
    return [text for tag, attrs, text, inside in page.elements if tag == "g"]


def wide_charts(text):
    """The markup of the charts for a wide page; each has a narrow twin."""
    return re.findall(r'<div class="wide">(.*?)</svg>', text)


def test_the_path_is_returned_and_the_folder_made(tmp_path, learned):
    path = report.write([learned()], str(tmp_path / "new" / "folder"))
    assert path == tmp_path / "new" / "folder" / "index.html"
    assert os.listdir(path.parent) == ["index.html"]


def test_headline_says_the_outcome_in_words(read, learned, joint):
    main = learned(5, recipe="er+ewc", average_accuracy=0.7123)
    page = read(main, learned(5, recipe="finetune", average_accuracy=0.198), joint(5))
    ((_, headline),) = page.all("h1")
    assert headline.replace("\u00a0", " ") == (
        "er+ewc on digits, class-incremental: 71.2 % average accuracy after 5 tasks; "
        "finetune 19.8 %, joint 95.0 %"
    )


def test_sections_come_in_order(read, learned, joint):
    headings = [text for _, text in read(learned(), joint()).all("h2")]
    assert headings == [
        "Summary",
        "Accuracy matrix",
        "Accuracy over time",
        "Settings",
        "How to reproduce",
    ]


def test_summary_has_every_figure_and_a_dash_for_the_undefined(read, learned, joint):
    page = read(learned(), joint())
    figures = [text for tag, _, text, inside in page.elements if tag == "td"][:10]
    # By hand: final row 0.7 0.8 0.9; each earlier task lost 0.2 and 0.1; 0.05 before and after.
    assert figures[:5] == ["80.0", "\u221215.0", "0.0", "15.0", "12.3"]
    assert figures[5:] == ["95.0", "–", "–", "–", "12.3"]
    for source in ("Lopez-Paz & Ranzato 2017", "Chaudhry et al. 2018"):
        assert source in page.text


def test_heat_map_has_every_cell_with_its_tooltip(read, learned, joint):
    page = read(learned(), joint())
    cells = heat_cells(page)
    assert len(cells) == 4 * 3  # joint has no matrix
    assert "after task 3, on task 1: 70.0 %70.0" in cells
    assert "untrained, on task 2: 5.0 % (not learned yet)5.0" in cells
    assert "after task 1, on task 3: 5.0 % (not learned yet)5.0" in cells
    assert len(page.all("rect", "cell")) == 6
    assert len(page.all("rect", "ahead")) == 6
    for words in ("on task", "untrained", "after task 1", "after task 3", "not learned yet"):
        assert words in page.text
    assert "without a matrix: joint" in page.text


def test_every_drawing_is_an_image_with_a_description(read, learned):
    drawings = read(learned(), learned(recipe="finetune")).all("svg")
    assert len(drawings) == 1 + 2 + 2 * 2
    for attrs, _ in drawings:
        assert attrs["role"] == "img"
        assert len(attrs["aria-label"]) > 20


@pytest.mark.parametrize("num_tasks", [1, 2, 5, 20])
def test_one_polyline_per_task_and_a_bold_mean(tmp_path, learned, num_tasks):
    results = [learned(num_tasks), learned(num_tasks, recipe="finetune")]
    text = report.write(results, tmp_path).read_text(encoding="utf-8")
    Page(text)
    tasks, means = wide_charts(text)
    assert tasks.count('<polyline points="') == num_tasks + (num_tasks > 1)
    assert tasks.count('class="ink line thin"') == num_tasks
    assert tasks.count('class="ink line bold"') == (num_tasks > 1)
    assert tasks.count('class="boundary"') == num_tasks - 1
    assert means.count("<polyline") == 2
    assert "training step" in tasks
    assert "accuracy, %" in tasks


@pytest.mark.parametrize("num_tasks", [3, 20])
def test_end_labels_do_not_overlap(tmp_path, learned, num_tasks):
    text = report.write([learned(num_tasks)], tmp_path).read_text(encoding="utf-8")
    charts = re.findall(r'<svg [^>]*class="chart">.*?</svg>', text)
    assert len(charts) == 2
    for chart in charts:
        width, height = map(int, re.search(r'viewBox="0 0 (\d+) (\d+)"', chart).groups())
        labels = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" class="label', chart)
        heights = sorted(float(y) for _, y in labels)
        assert len(heights) == num_tasks + 1
        assert min(b - a for a, b in itertools.pairwise(heights)) > 13
        assert 0 < heights[0] < heights[-1] < height
        assert all(float(x) < width - 30 for x, _ in labels)


def test_mean_chart_draws_a_level_for_a_result_without_a_curve(tmp_path, learned, joint):
    text = report.write([learned(), joint()], tmp_path).read_text(encoding="utf-8")
    _, means = wide_charts(text)
    assert means.count('class="ink line level"') == 1
    assert "For joint, the level is the final average accuracy" in text


def test_missing_accuracies_are_passed_over(read, learned):
    main = learned(2)
    main["accuracy_matrix"] = [[None, None], [0.9, None], [0.8, 0.7]]
    main["curve"] = [
        {"step": 10, "task": 1, "accuracy": [0.9, None]},
        {"step": 20, "task": 2, "accuracy": [None, None]},
        {"step": 30, "task": 2, "accuracy": [0.8, 0.7]},
    ]
    for key in ("average_accuracy", "backward_transfer", "forward_transfer", "forgetting"):
        main[key] = None
    page = read(main)
    assert "undefined average accuracy" in page.all("h1")[0][1].replace("\u00a0", " ")
    assert "untrained, on task 1: not measured (not learned yet)–" in heat_cells(page)
    # Task 2 was measured once: a polyline of one point would not be seen, so it is a dot.
    assert len(page.all("circle", "dot")) == 2
    assert not re.search(r"\b(None|nan)\b", page.text)


def test_no_curve_and_only_joint_still_make_a_page(read, joint):
    page = read(joint(settings={}))
    assert "No curve was recorded" in page.text
    assert "No result learned the tasks one by one" in page.text
    assert "No settings were recorded" in page.text
    assert "No command line was recorded" in page.text


def test_joint_as_main_result_draws_all_tasks_from_the_start(tmp_path, joint):
    curve = [{"step": s, "task": 3, "accuracy": [0.1 * s] * 3} for s in range(5)]
    text = report.write([joint(curve=curve)], tmp_path).read_text(encoding="utf-8")
    (tasks,) = wide_charts(text)
    assert tasks.count("<polyline") == 4
    assert "boundary" not in tasks


def test_hostile_text_is_only_text(tmp_path, learned):
    evil = "</title></svg><script>alert('1')</script>\" onload=\"x&<b>"
    settings = {evil: evil, "command": evil, "list": [evil]}
    main = learned(recipe=evil, stream=evil, scenario=evil, weights_sha256=evil, settings=settings)
    text = report.write([main], tmp_path).read_text(encoding="utf-8")
    page = Page(text)
    assert not page.all("script")
    assert not page.all("b")
    assert not any("onload" in attrs for _, attrs, _, _ in page.elements)
    assert text.count("<title>") == len(page.all("title"))
    assert evil in page.all("h1")[0][1]
    assert evil in page.all("pre")[0][1]


def test_text_that_utf8_cannot_hold_is_replaced(read, learned):
    assert "er?" in read(learned(recipe="er\ud800")).all("h1")[0][1]


def test_nothing_is_loaded_from_anywhere(tmp_path, learned, joint):
    text = report.write([learned(), joint()], tmp_path).read_text(encoding="utf-8")
    for tag, attrs, _, _ in Page(text).elements:
        assert tag not in {"script", "link", "img", "iframe", "object", "image", "use"}
        assert not {"src", "href", "xlink:href", "srcset"} & attrs.keys()
    assert "http" not in text
    assert "@import" not in text
    assert set(re.findall(r"url\((.*?)\)", text)) == {"#scale", "#unlearned"}


def test_settings_stand_side_by_side_and_the_command_is_shown_once(read, learned):
    other = learned(recipe="si", settings={"c": 0.1, "command": "tessera learn --recipe er"})
    page = read(learned(), other)
    rows = [text for tag, _, text, _ in page.elements if tag == "tr"]
    assert "lr0.05–" in rows
    assert "c–0.1" in rows
    assert [text for _, text in page.all("pre")] == ["tessera learn --recipe er"]
    assert "ab" * 32 in page.text


def test_two_seeds_of_one_recipe_are_told_apart(read, learned):
    page = read(learned(seed=1), learned(seed=2))
    assert [t for a, t in page.all("th") if a.get("scope") == "row"][:2] == [
        "er (seed 1)",
        "er (seed 2)",
    ]


def test_equal_results_give_equal_bytes_also_through_json(tmp_path, learned, joint):
    results = [learned(), joint()]
    first = report.write(results, tmp_path / "a").read_bytes()
    again = report.write(json.loads(json.dumps(results)), tmp_path / "b").read_bytes()
    assert first == again


@pytest.mark.parametrize("key", REQUIRED)
def test_a_missing_key_is_named(tmp_path, learned, key):
    result = learned()
    del result[key]
    with pytest.raises(InputError, match=rf"needs the key '{key}' in results\[1\]"):
        report.write([learned(), result], tmp_path)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"average_accuracy": 71.2},
            r"\['average_accuracy'\] must be None or a finite number in \[0, 1\]",
        ),
        ({"forgetting": "much"}, r"\['forgetting'\] must be None or a finite number"),
        ({"seconds": float("inf")}, r"\['seconds'\] must be"),
        ({"num_tasks": 0}, r"\['num_tasks'\] must be a whole number >= 1"),
        ({"num_tasks": 4}, r"needs 5 rows for 4 tasks.*got 4 rows"),
        ({"accuracy_matrix": [[0.1] * 3] * 3 + [[0.1]]}, r"\[3\] needs one accuracy per task, 3"),
        ({"settings": [1]}, r"\['settings'\] must map names to values, got list"),
        ({"curve": 3}, r"\['curve'\] must be a list of points"),
        ({"curve": [{"step": 1}]}, r"\['curve'\]\[0\] needs the keys step, task and accuracy"),
        (
            {"curve": [{"step": 1, "task": 9, "accuracy": [0.1] * 3}]},
            r"\['task'\] must be a whole number >= 0 and <= 3, got 9",
        ),
    ],
)
def test_a_wrong_value_is_named(tmp_path, learned, changes, message):
    with pytest.raises(InputError, match=message):
        report.write([learned() | changes], tmp_path)


def test_results_that_cannot_be_compared_are_refused(tmp_path, learned):
    with pytest.raises(InputError, match=r"stream='digits' and results\[1\] has stream='mnist'"):
        report.write([learned(), learned(stream="mnist")], tmp_path)


@pytest.mark.parametrize("results", [[], {}, {"recipe": "er"}, ["er"]])
def test_something_else_than_results_is_refused(tmp_path, results):
    with pytest.raises(InputError, match=r"report\.write needs"):
        report.write(results, tmp_path)


def test_a_folder_that_is_a_file_says_what_to_do(tmp_path, learned):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError, match=r"could not write .*index\.html.*Choose a folder"):
        report.write([learned()], tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_an_older_report_survives_a_failure(tmp_path, learned, monkeypatch, broken):
    path = report.write([learned()], tmp_path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(StorageError, match="No space left on device"):
        report.write([learned(recipe="other")], tmp_path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["index.html"]
