"""The report is a pure function of the result: whatever a search ended with, it is a whole page."""

from __future__ import annotations

import base64
import copy
import html.parser
import io
import json
import re
from typing import Any

import pytest
from rich.console import Console

from search_client import report


def entry(iteration: int, cost: float, widths: list[int], kernels: list[int], quality: float) -> dict[str, Any]:
    architecture = {"widths": widths, "kernels": kernels}
    candidates = [{"key": f"{n:x}", "cost": cost - n / 100, "quality": quality - n / 50} for n in range(4)]
    return {
        "iteration": iteration, "target": cost + 0.01, "cost": cost, "quality": quality, "architecture": architecture,
        "drawn": 5 if iteration else 0, "candidates": candidates if iteration else [],
    }  # fmt: skip


def network(accuracy: float, latency_ms: float, cost: float) -> dict[str, Any]:
    return {
        "accuracy": accuracy, "accuracy_of": "trained", "cost": cost, "macs": 4_000_000, "parameters": 90_000,
        "operators": 12, "latency_ms": latency_ms, "latency_half_width_ms": 0.004, "predicted_latency_ms": cost,
        "predicted_low_ms": cost * 0.97, "predicted_high_ms": cost * 1.03,
    }  # fmt: skip


@pytest.fixture
def result() -> dict[str, Any]:
    return {
        "name": "trial <b>", "version": "0", "finished_at": "2030-01-01T00:00:00+00:00",
        "metric": {"name": "latency", "unit": "ms"}, "budget": 1.0,
        "initial": network(0.98, 2.03, 2.0), "discovered": network(0.975, 1.01, 0.99),
        "target": {"key": "0" * 16, "description": "a phone & its CPU"}, "pin": 3,
        "seconds": {
            "super_network": 100.0, "samples": 60.0, "discovered_network": 50.0, "initial_network": 70.0,
            "total": 280.0,
            "waiting_for_device_samples": 20.0, "waiting_for_device_discovered": 4.0,
        },
        "service": {
            "networks": 900, "lookups": 20_000, "lookups_answered_without_measuring": 19_500, "operators_measured": 500,
            "operators_failed": 0, "whole_networks_measured": 14, "requests": 80, "retries": 0,
        },
        "correction": {
            "relative_half_width": 0.03,
            "left_out": {"networks": 12, "mean_error": 0.012, "max_error": 0.028},
        },
        "calibration": [{"sum_ms": 1.0 + n / 10, "left_out_ms": 1.1 + n / 10, "measured_ms": 1.09 + n / 10}
                        for n in range(8)],
        "samples": {"iterations": 2, "drawn": 10, "evaluated": 8},
        "layers": [{"name": "stem", "widths": [0, 8, 16], "kernels": [3]},
                   {"name": "last", "widths": [0, 16, 32], "kernels": [3, 5]}],
        "trajectory": [
            entry(0, 2.0, [16, 32], [3, 5], 0.97), entry(1, 1.5, [8, 32], [3, 3], 0.96),
            entry(2, 0.99, [8, 0], [3, 3], 0.95),
        ],
    }  # fmt: skip


class Balanced(html.parser.HTMLParser):
    VOID = frozenset({"meta", "img", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attributes: object) -> None:
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read(page: str) -> str:
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    return parser.text


def show(result: dict[str, Any]) -> str:
    console = Console(width=120, file=io.StringIO())
    console.print(report.summary(result))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_page_holds_everything_and_loads_nothing(result: dict[str, Any]) -> None:
    page = report.html(result)
    text = read(page)
    for words in (
        "trial <b>", "a phone & its CPU", "97.5 %", "1.01 ms", "0.990 ms", "-2.0 % off", "0.960 to 1.02 ms",
        "19,500", "500", "12 whole networks", "4 min 40 s", "last 32 → removed", "kernel 5 → 3",
    ):  # fmt: skip
        assert words in text, words
    pictures = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', page)
    assert len(pictures) == 4
    assert all(b"<svg" in base64.b64decode(picture) for picture in pictures)
    assert not re.findall(r"(?:src|href)=[\"'](?!data:)", page)
    assert "<script" not in page


def test_the_same_result_gives_the_same_page(result: dict[str, Any]) -> None:
    page = report.html(result)
    assert report.html(json.loads(json.dumps(result))) == page
    assert report.html(copy.deepcopy(result)) == page


@pytest.mark.parametrize("case", ["no correction", "nothing to shrink", "macs", "kept", "super-network accuracy"])
def test_other_ends_of_a_search(result: dict[str, Any], case: str) -> None:
    if case == "no correction":
        result["correction"] = result["calibration"] = None
        for name in ("initial", "discovered"):
            result[name]["predicted_low_ms"] = result[name]["predicted_high_ms"] = None
    elif case == "nothing to shrink":
        result["trajectory"] = result["trajectory"][:1]
    elif case == "macs":
        result["metric"] = {"name": "macs", "unit": "M MACs"}
        for name in ("initial", "discovered"):
            result[name] = {key: value for key, value in result[name].items() if "latency" not in key}
        for name in ("service", "target", "pin", "correction", "calibration"):
            del result[name]
        result["seconds"] |= {"waiting_for_device_samples": 0.0, "waiting_for_device_discovered": 0.0}
    elif case == "kept":
        result["trajectory"][1]["candidates"] = []
        result["trajectory"][1]["architecture"] = result["trajectory"][0]["architecture"]
    else:
        result["initial"]["accuracy_of"] = "super_network"
    text = read(report.html(result))
    printed = show(result)
    if case == "no correction":
        assert "no correction yet" in text
    if case == "macs":
        assert "M MACs" in text
        assert "M MACs" in printed
        assert "measured" not in printed
    if case == "kept":
        assert "kept" in text
        assert "kept" in printed
    if case == "super-network accuracy":
        assert "super-network at full width" in text


def test_the_summary_of_a_terminal(result: dict[str, Any]) -> None:
    printed = show(result)
    for words in ("2.03 ms ± 0.004", "500 operators measured", "19,500 of 20,000 lookups", "super-network 1 min 40 s"):
        assert words in printed


def test_numbers_as_a_person_writes_them() -> None:
    assert [report.number(value) for value in (0.1234, 1.234, 12.34, 1234.5, None)] == [
        "0.123", "1.23", "12.3", "1,234", "–",
    ]  # fmt: skip
    assert [report.duration(value) for value in (3.21, 61.4, 3725)] == ["3.2 s", "1 min 01 s", "1 h 02 min"]
