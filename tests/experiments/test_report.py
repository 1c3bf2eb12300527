"""One page of what runs came to."""

import base64
import html.parser
import io
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from experiments import records, report, report_figures
from experiments.records import group, read_runs


def make(folder, metrics, *, seed=0, bits=4, lines=(), **quant):
    folder.mkdir(parents=True)
    quant = {"weight_bits": bits, "activation_bits": bits, "clipping": "octav", **quant}
    command = "python -m experiments.train --config=configs/digits.py --workdir=/home/me/x --n=<b>"
    config = {"experiment": "made", "seed": seed, "quant": quant, "dataset": {"name": "<digits>"}}
    result = {
        "experiment": "made",
        "config": config,
        "command": command,
        "git_commit": "abc",
        "versions": {"jax": "0"},
        "device": {"platform": "cpu", "kind": "cpu", "count": 1},
        "seed": seed,
        "wall_seconds": 60.0,
        "metrics": metrics,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def trained(step, loss, threshold):
    figures = {"threshold_over_max": threshold, "sqnr_db": 20.0, "clipped_fraction": 0.01}
    named = {f"diagnostics/conv/0/weights/{name}": value for name, value in figures.items()}
    return {"step": step, "split": "train", "loss": loss, **named}


@pytest.fixture
def runs(tmp_path):
    folder = tmp_path / "runs"
    lines = [trained(step, 2.0 / step, 0.5 + 0.1 * step) for step in range(1, 4)]
    make(folder / "a", {"test_accuracy": 0.80}, lines=lines)
    make(folder / "deep" / "b", {"test_accuracy": 0.90}, lines=lines, seed=1)
    make(folder / "c", {"test_accuracy": 0.50}, bits=2, lines=lines)
    make(folder / "d", {"test_accuracy": 0.95}, bits=32, clipping="max")
    (folder / "config.json").write_text(json.dumps({"experiment": "sweep"}))
    (folder / "e").mkdir()
    (folder / "e" / "config.json").write_text(json.dumps({"experiment": "made"}))
    return folder


class Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text.append(data.strip())


def test_runs_are_grouped_by_what_they_differ_in(runs):
    found, unfinished = read_runs(runs)
    assert [run.name for run in found] == ["a", "c", "d", "deep/b"]
    assert unfinished == ["e"]
    in_float, four, two = group(found)
    assert [g.label for g in (in_float, four, two)] == ["float", "weight bits 4", "weight bits 2"]
    assert four.series == two.series == "made"
    assert four.headline == ("test_accuracy", pytest.approx(0.85), pytest.approx(0.005**0.5))
    assert two.headline == ("test_accuracy", 0.5, 0.0)
    assert four.runs[0].diagnostics == {
        "conv/0/weights": {
            "threshold_over_max": pytest.approx(0.8), "sqnr_db": 20.0, "clipped_fraction": 0.01,
        }
    }  # fmt: skip


def test_labels_name_rules_scales_and_bits_that_differ(tmp_path):
    for number, notation in enumerate(["4/4U/4/6", "4/8U/4/6", "3/3U/-/-"]):
        make(tmp_path / str(number), {"test_f1": 0.5, "float_f1": 0.7}, notation=notation)
    groups = group(read_runs(tmp_path)[0])
    assert [g.label for g in groups] == ["4/4U/4/6", "4/8U/4/6", "3/3U/-/-"]
    assert [g.series for g in groups] == [
        "scales 4/6",
        "activations 8 bits, scales 4/6",
        "scales -/-",
    ]
    assert [g.bits for g in groups] == [4, 4, 3]
    assert groups[0].runs[0].in_float == 0.7


def test_labels_name_overrides_of_runs_that_have_some(tmp_path):
    for number, overrides in enumerate([[], ["conv.*=8/8", "stem=8/8"]]):
        make(tmp_path / str(number), {"test_accuracy": 0.5}, overrides=overrides)
    labels = [g.label for g in group(read_runs(tmp_path)[0])]
    assert labels == ["made", "overrides conv.*=8/8 stem=8/8"]


def test_the_page_shows_everything_and_needs_nothing(runs):
    figure = Image.new("RGB", (8, 8))
    figure.save(runs / "a" / "own.png")
    said = report.write(runs, runs / "report")
    assert said == f"{runs / 'report.html'}: 4 runs, 5 figures"
    text = (runs / "report.html").read_text()
    page = Page(text)
    shown = " ".join(page.text)
    assert "85.0" in shown
    assert "7.1" in shown  # the spread
    assert "not finished, and not shown: e" in " ".join(shown.split())
    assert "a/own.png" in shown
    assert "--workdir=PATH/x" in shown
    assert "/home/me" not in text
    assert "<digits>" not in text  # escaped
    assert "--n=<b>" in shown
    assert "b" not in {tag for tag, _ in page.tags}
    assert "ARG: bits (2 to 8" in shown  # what the config says
    # No script, so no console error; no address, so no network.
    assert {"script", "link", "iframe"}.isdisjoint(tag for tag, _ in page.tags)
    images = [a.get("src") or a["srcset"] for tag, a in page.tags if tag in ("img", "source")]
    assert len(images) == 5 * 2 + 1
    for image in images:
        kind, content = image.split(",")
        assert kind == "data:image/png;base64"
        Image.open(io.BytesIO(base64.b64decode(content))).verify()
    assert not re.search(r"(src|href|srcset|url)[=(]\W?https?:", text)
    names = sorted(path.name for path in runs.glob("report-*.png"))
    assert names == [
        f"report-{name}.png"
        for name in ("accuracy", "clipped_fraction", "loss", "sqnr_db", "thresholds")
    ]


def test_figures_have_ink_for_both_papers(runs):
    report.write(runs, runs / "report")
    page = Page((runs / "report.html").read_text())
    ink = []
    for tag, attributes in page.tags:
        if tag in ("source", "img"):
            content = (attributes.get("src") or attributes["srcset"]).split(",")[1]
            pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGBA"))
            assert (pixels[..., 3] == 0).mean() > 0.1  # the paper shines through
            opaque = pixels[pixels[..., 3] > 250][:, :3]
            colours, counts = np.unique(opaque, axis=0, return_counts=True)
            ink.append({tuple(colour) for colour in colours[np.argsort(counts)[-40:]].tolist()})
    assert all((0xE6,) * 3 in colours for colours in ink[::2])
    assert all((0x22,) * 3 in colours for colours in ink[1::2])


@pytest.mark.parametrize("written", ["inf", "-inf", "nan"])
@pytest.mark.parametrize("everywhere", [False, True])
def test_figures_of_no_size_are_left_blank(tmp_path, written, everywhere):
    line = trained(1, 2.0, 0.5) | {"diagnostics/conv/1/weights/sqnr_db": written}
    if everywhere:
        line |= dict.fromkeys((key for key in line if key.startswith("diagnostics/")), written)
    make(tmp_path / "trained", {"test_accuracy": 0.5, "test_loss": written}, lines=[line])
    quantised = {"conv/0/weights": {"sqnr_db": written if everywhere else 10.0}}
    make(tmp_path / "quantised", {"test_accuracy": 0.5, "diagnostics": quantised}, clipping="max")
    assert report.write(tmp_path, tmp_path / "report").endswith("2 runs, 4 figures")
    runs, _ = read_runs(tmp_path)
    found = next(run for run in runs if run.name == "trained")
    number = pytest.approx(float(written), nan_ok=True)
    assert found.metrics["test_loss"] == number
    assert found.diagnostics["conv/1/weights"] == {"sqnr_db": number}


def test_letters_stand_out_beside_cells_of_no_size(tmp_path):
    figures = {"a": {"sqnr_db": 0.0}, "b": {"sqnr_db": 9.0}, "c": {"sqnr_db": "inf"}}
    make(tmp_path / "a", {"diagnostics": figures})
    drawn = report_figures.heat_map(group(read_runs(tmp_path)[0]), "sqnr_db", "SQNR, dB")
    letters = [(text.get_text(), text.get_color()) for text in drawn.axes[0].texts]
    assert letters == [("0.0", "white"), ("9.0", "black")]


def test_a_browser_shows_the_page(runs, tmp_path):
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("no chromium: install it to see that the page is shown")
    report.write(runs, runs / "report")
    done = subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr",
            "--window-size=400,4000", f"--screenshot={tmp_path / 'page.png'}",
            (runs / "report.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr
    seen = np.asarray(Image.open(tmp_path / "page.png").convert("L"))
    # On a narrow screen too, figures follow one another down the page.
    assert all((seen[top : top + 800] < 128).any() for top in range(0, 2400, 800))


def test_no_run_and_no_folder_are_said(tmp_path, runs):
    with pytest.raises(FileNotFoundError, match="no finished run in"):
        report.write(tmp_path / "nothing", tmp_path / "report")
    with pytest.raises(FileNotFoundError, match="make it first"):
        report.write(runs, tmp_path / "no" / "report")


def test_bits_of_a_block_format_are_not_known(tmp_path):
    make(tmp_path / "a", {}, notation="nvfp4")
    (run,), _ = read_runs(tmp_path)
    assert run.bits is None
    assert run.headline is None
    assert records.group([run])[0].headline is None
    assert report.write(tmp_path, tmp_path / "report").endswith("1 runs, 0 figures")
