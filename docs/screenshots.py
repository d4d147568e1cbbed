"""The pictures of the page on what is logged, from the folder of a run of the demo: python docs/screenshots.py RUN"""

import sys
from pathlib import Path

from tests.helpers import browser

PICTURES = Path(__file__).parent / "pictures"


def main(run: Path) -> None:
    """Looks at the run's TensorBoard as a person would, and keeps what it sees."""
    PICTURES.mkdir(exist_ok=True)
    with browser.tensorboard(run / "tensorboard") as url:
        with browser.opened_page(viewport={"width": 1000, "height": 700}) as page:
            page.goto(f"{url}/?tagFilter=%5Eval_loss%24&smoothing=0#timeseries")
            page.locator("scalar-card tb-data-table-content-row").nth(2).wait_for()
            page.locator("scalar-card button[aria-label='Toggle full size mode']").click()
            page.wait_for_timeout(1500)
            page.locator("scalar-card").screenshot(path=PICTURES / "time_series.png")
        with browser.opened_page(viewport={"width": 1280, "height": 1500}) as page:
            page.goto(f"{url}/#custom_scalars")
            page.locator("tf-custom-scalar-multi-line-chart-card path.line").first.wait_for(state="attached")
            page.wait_for_timeout(1500)
            charts = {"x": 325, "y": 70, "width": 955, "height": 1430}
            page.screenshot(path=PICTURES / "custom_scalars.png", clip=charts)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
