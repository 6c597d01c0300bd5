"""The page of a prequential run."""

from __future__ import annotations

import html.parser
import os
from pathlib import Path
from typing import Any

import pytest

from tessera import report
from tessera.errors import InputError, StorageError
from tessera.recipes import OnlineSettings, learn_online


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return [learn_online(OnlineSettings(recipe=name, rows=4000)) for name in ("online", "steady")]


def test_the_page_says_what_was_measured(results: list[dict[str, Any]], tmp_path: Path) -> None:
    page = report.write_online(results, tmp_path).read_text()
    main = results[0]
    assert f"{100 * main['accuracy']:.1f}\u00a0% of 4,000 rows right" in page.replace(
        " %", "\u00a0%"
    )
    for key in ("no_change", "majority"):
        assert f"{100 * main[key]:.1f}" in page
    assert main["weights_sha256"] in page
    assert "over the last 200 rows" in page


def test_equal_results_give_equal_bytes_and_nothing_is_fetched(
    results: list[dict[str, Any]], tmp_path: Path
) -> None:
    one, two = (report.write_online(results, tmp_path / n).read_bytes() for n in "ab")
    assert one == two

    found: list[str] = []

    class Links(html.parser.HTMLParser):
        def handle_starttag(self, tag: str, attrs: Any) -> None:
            found.extend(v for k, v in attrs if k in ("src", "href", "xlink:href"))

    Links().feed(one.decode())
    assert found == []


def test_names_from_outside_are_text(results: list[dict[str, Any]], tmp_path: Path) -> None:
    nasty = [{**r, "stream": "<script>alert(1)</script>"} for r in results]
    assert "<script>" not in report.write_online(nasty, tmp_path).read_text()


def test_what_it_refuses(results: list[dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least one result"):
        report.write_online([], tmp_path)
    lacking = {k: v for k, v in results[0].items() if k != "drifts"}
    with pytest.raises(InputError, match=r"the key 'drifts' in results\[0\]"):
        report.write_online([lacking], tmp_path)
    with pytest.raises(InputError, match=r"results\[1\] of other: write one report each"):
        report.write_online([results[0], {**results[1], "stream": "other"}], tmp_path)
    assert not os.listdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="Choose a folder"):
        report.write_online(results, tmp_path / "file")
