"""Dashboards as a person sees them: real servers, a real browser, and screenshots in `outputs/screenshots/`.

Needs Debian's chromium; `.ci/run` installs it.
"""

import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from merge_callback import MergeCallback, Window
from merge_callback.apps import report as report_command
from tests.helpers.toys import Toy, fit, lightning, make

pytestmark = pytest.mark.slow
browser = pytest.importorskip("tests.helpers.browser", reason="playwright is not installed")
if browser.CHROMIUM is None:
    pytest.skip("chromium is not installed: apt-get install chromium", allow_module_level=True)

from playwright.sync_api import expect  # noqa: E402 (only where it is installed)

SCREENSHOTS = Path(__file__).parents[2] / "outputs" / "screenshots"


def screenshot(page, name, **options):
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png", **options)


def watched_run(folder):
    """A run with several merges and predictions, logged by TensorBoard."""
    merges = {"sma": "sma", "late": Window(span=0.05)}
    callback = MergeCallback(merges=merges, calibration="prior", higher_is_better="*acc*")
    logger = lightning(".loggers").TensorBoardLogger(folder, name="", version="run")
    return fit(make(Toy), folder, callback, max_steps=80, val_check_interval=4, logger=logger)


def test_tensorboard_shows_live_merged_and_annealed_on_one_chart_without_a_click(tmp_path):
    run = watched_run(tmp_path)
    with browser.tensorboard(tmp_path / "run") as url, browser.opened_page() as page:
        page.goto(f"{url}/?tagFilter=%5Eval_loss%24&smoothing=0#timeseries")
        card = page.locator("scalar-card")
        expect(card).to_have_count(1)
        expect(card.locator("tb-truncated-path")).to_have_attribute("title", "val_loss")
        rows = card.locator("tb-data-table-content-row")
        expect(rows).to_have_count(4)
        for name in ("merged", "merged_late", "annealed"):
            expect(rows.filter(has_text=re.compile(rf"\b{name}\b")).first).to_be_visible()
        # What the table beside the chart says of the merge is what was logged.
        merged = run.trainer.callback_metrics["merged/val_loss"].item()
        expect(rows.filter(has_text=re.compile(r"\bmerged\b(?!_)")).first).to_contain_text(f"{merged:.4f}")
        dots = rows.locator(".row-circle span").all()
        colours = {dot.evaluate("dot => getComputedStyle(dot).backgroundColor") for dot in dots}
        wanted = {tuple(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours}
        assert len(wanted) == 4
        # The lines are pixels of a canvas.
        for _ in range(100):
            image = Image.open(io.BytesIO(card.locator("line-chart").screenshot())).convert("RGB")
            drawn = {colour for _, colour in image.getcolors(2**20)}
            if wanted <= drawn:
                break
            page.wait_for_timeout(100)
        assert wanted <= drawn
        screenshot(page, "tensorboard_time_series")


def test_tensorboard_s_custom_scalars_hold_charts_of_everything_and_the_user_s_own(tmp_path):
    run = watched_run(tmp_path)
    run.trainer.logger.experiment.add_custom_scalars({"Mine": {"training": ["Multiline", ["train_loss"]]}})
    run.trainer.logger.experiment.close()
    with (
        browser.tensorboard(tmp_path / "run") as url,
        browser.opened_page(viewport={"width": 1280, "height": 2600}) as page,
    ):
        page.goto(f"{url}/#custom_scalars")
        categories = ["Mine", "Predicted, with interval", "Live, merged, annealed", "Gain of the merge", "Merge"]
        expect(page.locator(".category-name")).to_have_text(categories)
        card = page.locator("tf-custom-scalar-multi-line-chart-card").filter(
            has=page.locator(".heading-label", has_text=re.compile("^val_loss$"))
        )
        # Each series is drawn twice, as logged and smoothed: four runs, and the gains of two merges.
        expect(card.first.locator("path.line[d^=M]")).to_have_count(8)
        expect(page.locator("tf-custom-scalar-margin-chart-card path.area[d^=M]")).to_have_count(1)
        screenshot(page, "tensorboard_custom_scalars")


def test_tensorboard_shows_the_coefficients_and_the_decay_they_stand_for(tmp_path):
    watched_run(tmp_path)
    with browser.tensorboard(tmp_path / "run") as url, browser.opened_page() as page:
        page.goto(f"{url}/#images")
        image = page.locator("tf-image-loader img").first
        expect(image).to_be_visible()
        page.wait_for_function("image => image.naturalWidth === 600 && image.complete", arg=image.element_handle())
        expect(page.locator("body")).to_contain_text("coefficients")
        screenshot(page, "tensorboard_images")


RUN_WITH_MLFLOW = """
import sys
from pathlib import Path
from merge_callback import MergeCallback
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger
from tests.helpers.toys import Toy, fit, make

folder, store = Path(sys.argv[1]), sys.argv[2]
logger = MLFlowLogger("merges", run_name="toy", tracking_uri=store, artifact_location=(folder / "artifacts").as_uri())
fit(make(Toy), folder, MergeCallback(2, 5), logger=[CSVLogger(folder), logger])
print("run", logger.experiment_id, logger.run_id)
"""


@pytest.mark.slow
def test_mlflow_shows_merged_values_and_gains_beside_the_live_ones(tmp_path):
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    # A program of its own, since MLflow's store warns of what its own libraries will not have one day.
    command = [sys.executable, "-c", RUN_WITH_MLFLOW, str(tmp_path), store]
    root = Path(__file__).parents[2]
    environment = os.environ | browser.QUIET
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    experiment, run = done.stdout.split()[-2:]
    # Charts beyond the window are not drawn.
    tall = {"width": 1600, "height": 3000}
    with browser.mlflow(store, tmp_path) as url, browser.opened_page(viewport=tall) as page:
        page.goto(f"{url}/#/experiments/{experiment}/runs/{run}/model-metrics")
        cards = page.locator("[data-testid=experiment-view-compare-runs-card]")
        for name in ("val_loss", "merged/val_loss", "merge_gain/val_loss", "merge/spread"):
            card = cards.filter(has_text=f"toy ({name})")
            expect(card.locator(".js-plotly-plot .scatterlayer path.point")).to_have_count(6)
        screenshot(page, "mlflow")


def reported_run(folder):
    """A run's folder: its metrics, and the records of its anneals."""
    records = Path(__file__).parents[2] / "benchmarks" / "annealing" / "records" / "seed0" / "anneals.jsonl"
    shutil.copy(records, folder / "anneals.jsonl")
    rows = [f"{step - 1},{3 - step / 1000},{2.9 - step / 1000},0.1" for step in range(100, 2001, 100)]
    (folder / "metrics.csv").write_text("\n".join(["step,val_loss,merged/val_loss,merge_gain/val_loss", *rows, ""]))
    return folder


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_report_is_readable_on_a_phone_in_light_and_dark_and_asks_for_nothing(tmp_path, scheme):
    report = tmp_path / "report.html"
    report_command.run([str(reported_run(tmp_path)), "--output", str(report)])
    phone = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "color_scheme": scheme}
    with browser.opened_page(**phone) as page:
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(report.as_uri())
        assert [url for url in asked if not url.startswith("data:")] == [report.as_uri()]
        expect(page.locator("h1")).to_have_text("Merges and anneals: val_loss")
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        expect(page.locator("h2")).to_have_text(["How well anneals were predicted", "Every anneal", "Every validation"])
        assert page.locator("img").count() == 3
        for image in page.locator("img").all():
            # As large as can be read, in a part of the page that is moved with a finger.
            assert image.evaluate("image => image.complete && image.naturalWidth > 500 && image.clientWidth >= 600")
            assert image.evaluate("image => image.closest('.wide').clientWidth <= 390")
            # The variant for this scheme: its text is light on a dark page, and dark on a light one.
            pixels = Image.open(io.BytesIO(image.screenshot())).convert("L").getcolors(2**20)
            assert (sum(n * level for n, level in pixels) / sum(n for n, _ in pixels) > 128) == (scheme == "light")
        background = Image.open(io.BytesIO(page.screenshot())).convert("L").getpixel((2, 2))
        assert (background > 200) if scheme == "light" else (background < 60)
        screenshot(page, f"report_{scheme}", full_page=True)
