"""The page in a real browser: from disk, live, and with everything hostile that a run could hold."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from deadhead import HeadPlan, cut
from deadhead.checkpoints import checkpoint
from deadhead.data import load_text, load_tokenizer
from deadhead.measure.evaluation import evaluate
from deadhead.report.writing import report_run
from deadhead.training.recipes.reading import load_recipe
from deadhead.training.runs.options import Options
from deadhead.training.runs.single import run_single
from deadhead.training.runs.summary import read_summary, write_summary
from tests.small_runs import save_small_llama, small_recipe, write_prose

pytestmark = pytest.mark.slow

if TYPE_CHECKING:
    from playwright.sync_api import Page

_HOSTILE = '"><img src=x onerror=alert(1)><script>alert(2)<\u2215script> <b>bold</b> &lt;i&gt; %{x}'


def _open(page: Page, path: Path) -> list[str]:
    """Open a page from disk without a network; return what was asked for."""
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.context.set_offline(True)
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-ready]", state="attached")
    return asked


def _see_all(page: Page) -> None:
    """Let every chart be drawn."""
    for place in page.locator("figure").all():
        place.scroll_into_view_if_needed()
        place.locator(".drawing .mark, .note").first.wait_for(state="attached")


def _counts(page: Page, where: str = ".map") -> list[str]:
    return page.locator(f"{where} td.count").all_text_contents()


def _choose_moment(page: Page, frame: int) -> None:
    page.locator(".scrub").first.evaluate(
        "(scrub, frame) => { scrub.value = frame; scrub.dispatchEvent(new Event('input')); }", frame
    )


@pytest.fixture(scope="module")
def written(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    assert report_run(small_run, path).lacks == ""
    return path


def test_from_disk_nothing_is_asked_for(written: Path, page: Page, complaints: list[str]) -> None:
    assert _open(page, written) == [written.as_uri()]
    _see_all(page)
    # The policy holds for whatever script may come to run: nothing can leave.
    sent = page.evaluate("fetch('http://127.0.0.1:9/').then(() => 'sent', (error) => String(error))")
    assert "TypeError" in sent
    assert all("Content Security Policy" in complaint for complaint in complaints)
    complaints.clear()


def test_the_head_map_is_the_plan_and_its_course(small_run: Path, written: Path, page: Page) -> None:
    _open(page, written)
    plan = HeadPlan.from_json(small_run / "head_plan.json")
    assert _counts(page) == [f"{len(heads)}/4" for heads in plan.kept.values()]
    for layer, kept in plan.kept.items():
        for head in range(4):
            cell = page.locator(f'.map .cell[data-key="{layer}"][data-index="{head}"]')
            assert cell.text_content() == ("" if head in kept else "×")
            assert f"layer {layer}, head {head}: {'stays' if head in kept else 'cut'}" in str(
                cell.get_attribute("aria-label")
            )
    assert page.text_content(".moment") == f"the plan: {sum(plan.heads)} of 8 heads stay"
    lines = [json.loads(line) for line in (small_run / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["phase"] == "prune"]
    assert page.locator(".scrub").get_attribute("max") == str(len(lines))
    for frame, line in enumerate(lines):
        _choose_moment(page, frame)
        assert page.text_content(".moment") == f"step {line['step']}"
        chances = line["open_probability"]
        assert _counts(page) == [f"{sum(p >= 0.5 for p in chances[layer])}/4" for layer in ("0", "1")]
    page.select_option(".shade", "difference")
    assert "output difference, 0 to" in str(page.text_content(".ramp-text"))


def test_a_run_that_measured_no_output_differences_has_no_chart_of_them(
    small_run: Path, written: Path, page: Page, tmp_path: Path
) -> None:
    _open(page, written)
    assert page.is_visible(".difference-section") and page.is_visible(".shade")
    shutil.copytree(small_run, tmp_path / "run")
    lines = [json.loads(line) for line in (small_run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("output_difference", None)
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report_run(tmp_path / "run", tmp_path / "page.html", attention=False)
    _open(page, tmp_path / "page.html")
    assert page.is_hidden(".difference-section") and page.is_hidden(".shade")
    assert page.text_content(".ramp-text") == "open probability, 0 to 100 %"


def test_clicks_and_keys_choose_a_head(written: Path, page: Page) -> None:
    _open(page, written)
    page.click('.map .cell[data-key="1"][data-index="2"]')
    assert str(page.text_content(".chosen-text")).startswith("Chosen: layer 1, head 2:")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert str(page.text_content(".chosen-text")).startswith("Chosen: layer 0, head 3:")
    layer = page.locator('[data-chart="layer"]')
    layer.scroll_into_view_if_needed()
    layer.locator(".drawing .mark").first.wait_for(state="attached")
    assert "Layer 0" in str(layer.locator("figcaption").text_content())
    attention = page.locator('[data-chart="attention"]')
    attention.scroll_into_view_if_needed()
    attention.locator(".drawing .mark").first.wait_for(state="attached")
    assert attention.locator(".plot").get_attribute("aria-label") == "Attention pattern of layer 0, head 3"
    # One cell of the map takes the tab key, as in any grid.
    assert page.locator('.map .cell[tabindex="0"]').count() == 1


def test_numbers_can_be_read_as_tables(small_run: Path, written: Path, page: Page) -> None:
    _open(page, written)
    _see_all(page)
    for figure in page.locator("figure").all():
        figure.locator("summary").click()
        figure.locator("table tbody tr").first.wait_for()
        assert figure.locator(".plot").get_attribute("aria-label")
    summary = json.loads((small_run / "summary.json").read_text())
    rows = page.locator('[data-chart="costs"] tbody tr').all_text_contents()
    assert any(f"{summary['dense']['parameters']:,}" in row for row in rows if row.startswith("parameters"))
    page.hover('[data-term="l0"]')
    assert "expected to be open" in str(page.text_content("#tip"))
    page.focus('[data-term="gate"]')
    assert "trainable switch" in str(page.text_content("#tip"))


@pytest.mark.parametrize("width", [400, 1400])
def test_nothing_moves_while_charts_are_drawn(width: int, written: Path, page: Page) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    _open(page, written)
    assert page.locator(".drawing .mark").count() < page.locator("figure").count()
    height = page.evaluate("document.documentElement.scrollHeight")
    _see_all(page)
    assert page.evaluate("document.documentElement.scrollHeight") == height


@pytest.mark.parametrize("width", [320, 390, 768])
def test_no_sideways_scrolling_on_narrow_screens(width: int, written: Path, page: Page) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    _open(page, written)
    _see_all(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_print_has_every_chart(written: Path, page: Page, tmp_path: Path) -> None:
    _open(page, written)
    page.pdf(path=tmp_path / "page.pdf")
    assert page.locator("figure .drawing").count() >= page.locator("figure").count()
    assert (tmp_path / "page.pdf").stat().st_size > 20_000


def test_hostile_text_stays_text(small_run: Path, page: Page, tmp_path: Path) -> None:
    folder = tmp_path / _HOSTILE.replace("/", "\u2215")
    shutil.copytree(small_run, folder)
    shutil.copytree(small_run, tmp_path / "beside <u>it")
    summary = read_summary(folder)
    summary["samples"] = {_HOSTILE: _HOSTILE, "dense": "</pre><script>alert(3)</script>"}
    summary["versions"] = {_HOSTILE: _HOSTILE}
    write_summary(folder, summary)
    (folder / "recipe.toml").write_text((folder / "recipe.toml").read_text() + f"\n# {_HOSTILE}\n")
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    metrics.append({"phase": _HOSTILE, "step": 1, "loss": 1.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    report_run(folder, tmp_path / "page.html", sentence="<b>cat</b> <img src=x>")
    asked = _open(page, tmp_path / "page.html")
    _see_all(page)
    for summary_of in page.locator("figure summary").all():
        summary_of.click()
    assert len(asked) == 1
    assert page.locator("img, b, u, i, a[href]").count() == 0
    assert page.text_content("h2.name") == folder.name
    assert _HOSTILE in page.locator(".samples pre").all_text_contents()
    # In the labels of charts too.
    assert _HOSTILE in page.locator("figure text").all_text_contents()
    ticks = page.locator('[data-chart="attention"] .tick-y text').all_text_contents()
    assert "".join(ticks[:3]) == "<b>"


def test_groups_and_blocks_have_maps_of_their_own(page: Page, tmp_path: Path) -> None:
    text = write_prose(tmp_path)
    save_small_llama(tmp_path / "llama", text)
    recipe = small_recipe(text, prune={"flops": 0.6, "l0": 0.01, "init": 2.0, "sequence_length": 16, "block_size": 8})
    run_single("prune", recipe.prune, tmp_path / "llama", recipe.data, Options(out=tmp_path / "cut"))
    report_run(tmp_path / "cut", tmp_path / "page.html")
    _open(page, tmp_path / "page.html")
    plan = HeadPlan.from_json(tmp_path / "cut" / "head_plan.json")
    assert plan.hidden_units is not None
    captions = page.locator(".map caption").all_text_contents()
    assert captions == ["key/value groups of each layer", "blocks of hidden units or persistent vectors"]
    expected = [f"{len(kept)}/2" for kept in plan.kept.values()] + [
        f"{len(kept) // 8}/6" for kept in plan.hidden_units.kept.values()
    ]
    assert _counts(page) == expected
    kept = next((layer, heads[0]) for layer, heads in plan.kept.items() if heads)
    page.click(f'.map .cell[data-key="{kept[0]}"][data-index="{kept[1]}"]')
    attention = page.locator('[data-chart="attention"]')
    attention.scroll_into_view_if_needed()
    # A group shows each of its query heads.
    heads = f"head {2 * kept[1]}, {2 * kept[1] + 1}"
    page.wait_for_selector(f'[data-chart="attention"] .plot[aria-label$="{heads}"]')


@pytest.fixture
def watched(small_run: Path, tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """Return the folders of a run that goes on beside a finished one, and the address of the page that shows both."""
    goes_on = tmp_path / "goes on"
    goes_on.mkdir()
    shutil.copy(small_run / "recipe.toml", goes_on)
    command = [sys.executable, "-m", "deadhead", "watch", str(small_run), str(goes_on), "--tokens", "100"]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        found = re.search(r"http://127\.0\.0\.1:\d+/\?token=[\w-]{20,}", process.stdout.readline())
        assert found is not None
        yield goes_on, found.group()
        process.send_signal(2)
        rest = process.communicate(timeout=30)[0]
    assert process.returncode == 0, rest
    assert "Traceback" not in rest


def test_live(small_run: Path, watched: tuple[Path, str], page: Page, tmp_path: Path) -> None:
    goes_on, address = watched
    page.goto(address)
    first, second = page.locator(".run").nth(0), page.locator(".run").nth(1)
    assert first.locator(".name").text_content() == "first"
    assert "step 0 of 3" in str(second.locator(".state").text_content())
    boxes = first.bounding_box(), second.bounding_box()
    assert boxes[0] is not None and boxes[1] is not None
    assert boxes[1]["x"] >= boxes[0]["x"] + boxes[0]["width"], "side by side"

    # New points arrive by themselves.
    lines = (small_run / "metrics.jsonl").read_text().splitlines(keepends=True)
    with (goes_on / "metrics.jsonl").open("a") as file:
        file.writelines(lines[:2])
        file.flush()
        second.locator(".state", has_text="dense training: step 2 of 3").wait_for()
        file.writelines(lines[2:5])
    second.locator(".state", has_text="training with gates: step 2 of 5").wait_for()
    assert second.locator(".map .cell").count() == 8
    assert second.locator(".moment").text_content() == "step 2"
    second.locator('[data-chart="training"] .drawing .mark').first.wait_for(state="attached")

    _try_heads(first, page, small_run, tmp_path)
    assert second.locator(".trial").is_hidden(), "there is no model yet"
    # Models that come to be can be tried without loading the page anew.
    for name in ("dense", "gated"):
        # A run's models appear whole, as these do.
        shutil.copytree(small_run / name, tmp_path / name)
        (tmp_path / name).rename(goes_on / name)
        second.locator(f'.trial-model option[value="{name}"]').wait_for(state="attached")
    assert second.locator(".trial-model").input_value() == "dense", "what is being tried stays"


def _try_heads(run: Any, page: Page, folder: Path, tmp_path: Path) -> None:
    """Click heads off, and find what is shown and saved in the model that is cut by it."""
    run.locator(".trial-result", has_text="perplexity").wait_for()
    run.locator(".trial-all").click()
    run.locator(".trial-result", has_text="8 of 8 on").wait_for()
    for layer, head in ((0, 3), (1, 0)):
        run.locator(f'.trial-map .cell[data-key="{layer}"][data-index="{head}"]').click()
    run.locator(".trial-result", has_text="6 of 8 on").wait_for()
    run.locator(".trial-prompt").fill("a small cat ")
    run.locator(".trial-prompt").blur()
    run.locator(".trial-continuation", has_text=re.compile("^a small cat ")).wait_for()
    assert run.locator('.trial-map .cell[aria-pressed="false"]').count() == 2
    with page.expect_download() as download:
        run.locator(".trial-save").click()
    download.value.save_as(tmp_path / "head_plan.json")
    plan = HeadPlan.from_json(tmp_path / "head_plan.json")
    assert plan.kept == {0: (0, 1, 2), 1: (1, 2, 3)}
    shown = re.search(r"perplexity ([\d.]+)", str(run.locator(".trial-result").text_content()))
    assert shown is not None
    model = cut(checkpoint.load(folder / "gated"), plan)
    text, _ = load_text(load_recipe(folder / "recipe.toml").data.source, tokenizer=load_tokenizer(folder / "gated"))
    assert evaluate(model, text.splits["valid"], limit=100).perplexity == pytest.approx(float(shown.group(1)), rel=1e-3)

    run.locator(".sentence").fill("<i>dog")
    run.locator(".ask button").click()
    run.locator('[data-chart="attention"]').scroll_into_view_if_needed()
    run.locator('[data-chart="attention"] .tick-y text', has_text="<").first.wait_for()


def test_the_server_gone_is_said(watched: tuple[Path, str], page: Page, complaints: list[str]) -> None:
    page.goto(watched[1])
    page.locator("#connection", has_text="live").wait_for()
    page.route("**/api/**", lambda route: route.abort())
    page.locator("#connection", has_text="does not answer").wait_for()
    page.unroute("**/api/**")
    page.locator("#connection", has_text="live").wait_for()
    assert all("net::ERR_FAILED" in complaint for complaint in complaints)
    complaints.clear()
