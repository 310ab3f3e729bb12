"""The board in a browser, without a kernel: it draws what it is sent, and loads before anywidget gives up on it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dashboards.browser import needs_browser, page
from dashboards.fake import FakeRun

from workbench.dashboards.live.board import HERE, Board
from workbench.dashboards.live.widget import Dashboard

pytestmark = [needs_browser, pytest.mark.browser]

LOAD = """async ([script, plotly_js]) => {
  const url = URL.createObjectURL(new Blob([script], {type: "text/javascript"}));
  const start = performance.now();
  window.board = (await import(url)).default;
  window.loadSeconds = (performance.now() - start) / 1000;
  window.sent = [];
  const on = (name, receive) => { window.receive = receive; };
  window.state = {plotly_js};
  window.model = {on, off: () => {}, send: message => sent.push(message), get: name => window.state[name]};
  window.board.render({model: window.model, el: document.body});
}"""


@pytest.fixture
def board() -> Iterator[Any]:
    with page() as view:
        view.goto("about:blank")
        view.add_style_tag(path=HERE / "board.css")
        view.evaluate(LOAD, [Board._esm, Board.plotly_js.default_value])
        yield view
        assert not view.errors


def show(view: Any, run: FakeRun, panel: str) -> None:
    """Send the blocks of a panel, as the kernel does."""
    dashboard = Dashboard(run, refresh=0, panel=panel)
    dashboard.board.send = lambda message: view.evaluate("message => window.receive(message)", message)  # type: ignore
    dashboard.board._handle_custom_msg({"event": "ready"}, [])


def test_the_module_loads_before_anywidget_gives_up(board: Any) -> None:
    assert board.evaluate("window.loadSeconds") < 2


def test_the_module_is_small() -> None:
    assert len(Board._esm) < 50_000, "anywidget waits two seconds, also on a busy machine"


def test_a_view_that_missed_its_blocks_asks_for_them_again(board: Any) -> None:
    board.evaluate("""window.receive({text: '{"patch": {"id": "none", "traces": {}, "layout": null}}'})""")
    assert board.evaluate("window.sent") == [{"event": "ready"}, {"event": "ready"}]


def test_it_asks_for_its_blocks(board: Any) -> None:
    assert board.evaluate("window.sent") == [{"event": "ready"}]


def test_a_new_view_draws_before_the_kernel_answers(board: Any, tmp_path: Path) -> None:
    dashboard = Dashboard(FakeRun(tmp_path), refresh=0, panel="curves")
    board.evaluate(
        """panel => {
      window.state.panel = panel;
      document.body.replaceChildren();
      window.board.render({model: window.model, el: document.body});
    }""",
        dashboard.board.panel,
    )
    board.wait_for_selector(".wb-board .scatterlayer .trace")


def test_no_button_sends_a_figure_anywhere(board: Any, tmp_path: Path) -> None:
    show(board, FakeRun(tmp_path), "curves")
    board.wait_for_selector(".modebar-btn", state="attached")
    titles = [button.get_attribute("data-title") for button in board.locator(".modebar-btn").all()]
    assert "Zoom" in titles and not [title for title in titles if "hare" in title or "loud" in title]


def test_figures_are_drawn(board: Any, tmp_path: Path) -> None:
    show(board, FakeRun(tmp_path), "curves")
    board.wait_for_selector(".wb-board .scatterlayer .trace")
    assert board.locator(".xtitle").text_content() == "training tokens"


def test_tables_are_drawn(board: Any, tmp_path: Path) -> None:
    show(board, FakeRun(tmp_path), "cost")
    assert "1.2 M" in board.locator(".wb-grid table").first.inner_text()


def test_a_mark_is_sent(board: Any, tmp_path: Path) -> None:
    show(board, FakeRun(tmp_path), "progress")
    board.get_by_role("button", name="pin arm gdn").first.click()
    assert board.evaluate("window.sent")[-1] == {"event": "mark", "mark": "pinned", "key": "arm gdn", "on": True}


def test_an_arm_unfolds_into_its_runs(board: Any, tmp_path: Path) -> None:
    show(board, FakeRun(tmp_path), "runs")
    rows = board.locator("tbody tr")
    assert rows.count() == 2
    board.get_by_role("button", name="unfold arm gdn").click()
    assert rows.count() == 8 and "confirmation, seed 0" in rows.nth(2).inner_text()
    board.get_by_role("button", name="details tuning-1-0").click()
    assert board.evaluate("window.sent")[-1] == {"event": "act", "action": "details", "key": "tuning-1-0"}


def test_filters_and_columns_are_sent(board: Any, tmp_path: Path) -> None:
    show(board, FakeRun(tmp_path), "runs")
    board.get_by_role("searchbox").fill("gdn lr>0.1")
    board.wait_for_function("window.sent.at(-1).event == 'filter'")
    assert board.evaluate("window.sent")[-1] == {"event": "filter", "key": "runs runs", "text": "gdn lr>0.1"}
    board.get_by_text("Columns", exact=True).click()
    board.get_by_label("tokens", exact=True).check()
    chosen = board.evaluate("window.sent")[-1]
    assert chosen["event"] == "columns" and {"arm", "tokens"} <= set(chosen["shown"])


def test_arm_and_metric_stay_in_sight(board: Any, tmp_path: Path) -> None:
    board.evaluate("document.body.style.width = '520px'")
    show(board, FakeRun(tmp_path), "runs")
    scroll = board.locator(".wb-scroll")
    assert scroll.evaluate("node => { node.scrollLeft = 400; return node.scrollLeft }") > 50
    heads = board.locator("th")
    places = {heads.nth(i).inner_text(): heads.nth(i).bounding_box()["x"] for i in range(heads.count())}
    assert 0 <= places["arm"] < places["report (bits/byte)"] < 400
    lines = board.evaluate("[...document.querySelectorAll('tbody tr')].map(row => row.offsetHeight)")
    assert max(lines) < 40, "one line a row"


def test_a_run_page_is_left_by_its_button(board: Any, tmp_path: Path) -> None:
    dashboard = Dashboard(FakeRun(tmp_path), refresh=0, panel="runs")
    dashboard.board.send = lambda message: board.evaluate("message => window.receive(message)", message)  # type: ignore
    dashboard.board._handle_custom_msg({"event": "act", "action": "details", "key": "tuning-1-0"}, [])
    board.get_by_role("button", name="all runs").click()
    assert board.evaluate("window.sent")[-1] == {"event": "act", "action": "close", "key": "tuning-1-0"}


def test_a_patch_changes_a_trace(board: Any, tmp_path: Path) -> None:
    run = FakeRun(tmp_path, progress=0.5, confirmed=False)
    show(board, run, "curves")
    board.wait_for_selector(".wb-board .scatterlayer .trace")
    trace = json.dumps({"x": [1, 2], "y": [3, 4], "type": "scatter", "name": "new"})
    patch = {"patch": {"id": "curves curves", "traces": {"5": trace}, "layout": None}}
    board.evaluate("message => window.receive(message)", {"text": json.dumps(patch)})
    board.wait_for_function("document.querySelector('.wb-plot').data[5].name == 'new'")
