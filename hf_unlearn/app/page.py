"""The page: what is where, and which button does what. What they do is in [`hf_unlearn.app.desk`]."""

from __future__ import annotations

import html
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from ..files import first_line
from ..filtering.drawing.actions import ACTIONS
from . import fitting
from .comparing import MOST, SHOWN_ACTIONS
from .desk import Desk
from .fitting import Fitted
from .marks import Marks
from .opened import Opened


logger = logging.getLogger(__name__)

BLOCKED = '<span><i class="ring"></i>blocked by the filter</span>'
LEGEND = f'<div class="legend">{BLOCKED}</div>'
MARKS = (
    '<div class="legend"><span><i class="cross">✕</i>you marked it undesired</span>'
    f'<span><i class="tick">✓</i>you marked it clean</span>{BLOCKED}</div>'
)
ON_CLICK = Path(__file__).with_name("marks.js")
ACTION_NAMES = {"blank": "black", "blur": "blurred", "regenerate": "drawn again, with other noise"}
RULES = {
    "clean images that may be blocked": "max_false_alarm",
    "undesired images that must be blocked": "min_recall",
}


@contextmanager
def _told() -> Iterator[None]:
    """What went wrong, in a line on the page."""
    try:
        yield
    except gr.Error:
        raise
    except (ValueError, OSError) as error:
        raise gr.Error(first_line(error), title="This does not work", print_exception=False) from error
    except Exception as error:
        logger.exception("the app")
        raise gr.Error(f"{type(error).__name__}: {first_line(error)}", title="Something went wrong") from error


def page(desk: Desk) -> gr.Blocks:
    """The whole page.

    Args:
        desk ([`Desk`]): with what is opened.
    """
    found = desk.found
    with gr.Blocks(title="hf_unlearn", analytics_enabled=False, delete_cache=(3600, 3600)) as demo:
        gr.HTML(_head(found), elem_classes="head")
        if found.pipeline is None:
            _own_images(desk, gr.State(None))
            return demo
        drawn = _what_is_drawn(desk)
        marks, fitted = gr.State(Marks()), gr.State(None)
        something = bool(desk.choices(None))
        with gr.Tabs(selected="compare" if something else "make"):
            with gr.Tab("Before and after", id="compare"):
                which = _compare(desk, drawn, fitted)
            with gr.Tab("Make a filter", id="make"):
                _make(desk, drawn, marks, fitted, which)
            with gr.Tab("Your own images", id="own"):
                _own_images(desk, fitted)
    return demo


def _head(found: Opened) -> str:
    names = [f"<code>{html.escape(name)}</code>" for name in found.names]
    if found.unlearned is not None:
        what = f"An original, {names[0]}, and what it became, {names[1]}."
    elif found.pipeline is None:
        what = f"The filter {names[0]}."
    elif found.checker is not None:
        concepts = ", ".join(html.escape(name) for name in found.checker.concepts)
        what = f"{' with the filter '.join(names)}, which blocks: {concepts}."
    else:
        what = f"{names[0]}. It has no filter yet."
    about = "See what a pipeline draws and what comes out of it; mark what must not be shown, and make a filter that blocks it."
    if found.pipeline is None:
        about = "See which images it blocks."
    return f"<h1>hf_unlearn</h1><p>{what}</p><p>{about}</p>"


def _what_is_drawn(desk: Desk) -> list[Any]:
    """Fields that all tabs share, in the order of [`Desk.asked`]."""
    found, takes = desk.found, _takes(desk.found)
    prompts = gr.Textbox(
        "\n".join(found.prompts),
        label="Prompts",
        info="One a line; samples take them in turn.",
        lines=3,
        visible=found.prompted,
        elem_id="prompts",
    )
    with gr.Row():
        seed = gr.Number(
            desk.job.seed,
            label="Seed",
            info="The noise that all samples begin from.",
            precision=0,
            minimum=0,
            elem_id="seed",
        )
        steps = gr.Number(
            desk.job.num_inference_steps,
            label="Denoising steps",
            info="Empty: the pipeline's own.",
            precision=0,
            visible="num_inference_steps" in takes,
        )
        guidance = gr.Number(
            desk.job.guidance_scale,
            label="Guidance",
            info="Empty: the pipeline's own.",
            visible="guidance_scale" in takes,
        )
    return [prompts, seed, steps, guidance]


def _takes(found: Opened) -> set[str]:
    return set(inspect.signature(found.pipeline.__call__).parameters)


def _asked(desk: Desk, drawn: tuple[Any, ...], **keys: Any):
    prompts, seed, steps, guidance = drawn
    return desk.asked(prompts=prompts, seed=seed or 0, steps=steps, guidance=guidance, **keys)


def _heavy(button: gr.Button, function: Callable, inputs: list[Any], outputs: list[Any], **given: Any) -> Any:
    """One drawing at a time: all visitors share the pipeline."""
    return button.click(
        function, inputs, outputs, concurrency_id="draw", concurrency_limit=1, api_visibility="private", **given
    )


def _light(event: Callable, function: Callable, inputs: list[Any], outputs: list[Any]) -> Any:
    """One after another, and none is dropped: a hand clicks faster than a page is drawn."""
    return event(
        function,
        inputs,
        outputs,
        show_progress="hidden",
        trigger_mode="multiple",
        concurrency_limit=1,
        api_visibility="private",
    )


# Before and after


def _compare(desk: Desk, drawn: list[Any], fitted: gr.State) -> gr.Radio:
    choices = desk.choices(None)
    gr.HTML(
        "<p>Each sample is drawn twice, from the same noise: as the pipeline draws it, and as it comes out.</p>",
        elem_classes="how",
    )
    with gr.Row():
        which = gr.Radio(
            choices, value=choices[0][1] if choices else None, label="What comes in between", elem_id="which"
        )
        action = gr.Radio(
            [(ACTION_NAMES[name], name) for name in SHOWN_ACTIONS],
            value=desk.found.action if desk.found.action in SHOWN_ACTIONS else "blank",
            label="What is blocked comes out",
            visible=desk.found.unlearned is None,
        )
        count = gr.Slider(6, MOST, 24, step=6, label="Samples")
    with gr.Row():
        button = gr.Button("Draw", variant="primary", elem_id="draw")
        other = gr.Button("Other noise", elem_id="other-noise")
    said = gr.Markdown(
        "Press *Draw*." if choices else "There is nothing to compare with yet: make a filter in the next tab.",
        elem_id="said",
        elem_classes="said",
    )
    with gr.Row():
        grids = []
        for name in ("Before", "After"):
            with gr.Column(min_width=280):
                gr.Markdown(f"**{name}**")
                grids.append(gr.HTML(elem_id=name.lower()))
    if desk.found.unlearned is None:
        gr.HTML(LEGEND)

    def compare(*values: Any, progress=gr.Progress()) -> tuple[Any, ...]:  # noqa: B008 (how gradio hands it in)
        *asked, which, action, count, fitted = values
        with _told():
            comparison = desk.compare(
                _asked(desk, asked), which, fitted, count, action, partial(_tell, progress, "drawing")
            )
            return (*desk.pictures(comparison), comparison.line)

    inputs, outputs = [*drawn, which, action, count, fitted], [*grids, said]
    _heavy(button, compare, inputs, outputs)
    _light(other.click, lambda seed: (seed or 0) + 1, [drawn[1]], [drawn[1]]).then(
        compare, inputs, outputs, concurrency_id="draw", concurrency_limit=1, api_visibility="private"
    )
    return which


def _tell(progress: gr.Progress, what: str, done: int, of: int) -> None:
    progress((done, of), desc=what, unit="samples")


# A filter


def _make(desk: Desk, drawn: list[Any], marks: gr.State, fitted: gr.State, which: gr.Radio) -> None:
    shown = gr.State(0)
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=300):
            gr.Markdown(
                "### 1. Mark what must not be shown\nDraw samples, then click those that show it. Twenty are enough, as a rule."
            )
            gr.Radio(
                [("undesired", "undesired"), ("clean", "clean")],
                value="undesired",
                label="A click marks a sample",
                elem_id="kind",
            )
            with gr.Row():
                more = gr.Button("Draw samples", variant="primary", elem_id="more")
                back = gr.Button("‹ Page before", elem_id="back")
                on = gr.Button("Next page ›", elem_id="on")
            grid = gr.HTML(elem_id="samples", js_on_load=ON_CLICK.read_text(encoding="utf-8"))
            gr.HTML(MARKS)
            count = gr.Markdown("No samples yet.", elem_id="count")
            rest = gr.Checkbox(True, label="I have looked at all pages: what I did not mark is clean", elem_id="rest")
            undesired = gr.Textbox(
                label="Undesired samples, by number",
                info="As in: 3 17 42. Changes with your clicks, and they with it.",
                elem_id="undesired",
            )
        with gr.Column(scale=4, min_width=300):
            asked = _filter_fields(desk)
            button = gr.Button("Fit the filter", variant="primary", elem_id="fit")
            promised = gr.HTML(elem_id="promised")
            save = None if desk.job.output_dir is None else _save_fields(desk)
            publish = None if save is None or desk.job.is_for_others else _publish_fields()

    def counted(marks: Marks, page: int, rest: bool) -> tuple[str, str]:
        return desk.count(marks, page, rest_is_clean=rest), " ".join(map(str, marks.of("undesired")))

    def view(marks: Marks, page: int, fitted: Fitted | None, rest: bool) -> tuple[Any, ...]:
        return desk.page(marks, page, fitted), *counted(marks, page, rest)

    def draw(*values: Any, progress=gr.Progress()) -> tuple[Any, ...]:  # noqa: B008
        *asked, marks, fitted, rest = values
        with _told():
            page = desk.draw_page(_asked(desk, asked), marks, partial(_tell, progress, "drawing"))
        return marks, page, gr.update(value="Draw more"), *view(marks, page, fitted, rest)

    def turn(by: int, marks: Marks, page: int, fitted: Fitted | None, rest: bool) -> tuple[Any, ...]:
        page = min(max(page + by, 0), max(marks.pages - 1, 0))
        return page, *view(marks, page, fitted, rest)

    def click(marks: Marks, page: int, rest: bool, at: gr.EventData):
        with _told():  # the tile shows it already
            marks.click(at.number, at.kind)
        return marks, *counted(marks, page, rest)

    def write(text: str, marks: Marks, page: int, fitted: Fitted | None, rest: bool):
        with _told():
            marks.write("undesired", text)
        return marks, *view(marks, page, fitted, rest)

    def fit(*values: Any, progress=gr.Progress()):  # noqa: B008
        *asked, concept, encoder, rule, rate, confidence, unmarked, marks, page, rest = values
        keys = {"concept": concept, "encoder": encoder.strip() or None, "threshold": rule, "rate": rate / 100}
        with _told():
            job = _asked(desk, asked, **keys, confidence=confidence / 100, unmarked=int(unmarked))
            new = desk.fit(job, marks, rest_is_clean=rest, told=partial(_tell, progress, "drawing unmarked samples"))
        text = _promised(new, fitting.on_marks(new, marks, rest_is_clean=rest))
        chosen = gr.update(choices=desk.choices(new), value=desk.choices(new)[0][1])
        return new, text, chosen, *view(marks, page, new, rest)

    seen = [grid, count, undesired]
    _heavy(more, draw, [*drawn, marks, fitted, rest], [marks, shown, more, *seen], show_progress_on=[grid])
    for turned, by in ((back, -1), (on, 1)):
        _light(turned.click, partial(turn, by), [marks, shown, fitted, rest], [shown, *seen])
    _light(grid.click, click, [marks, shown, rest], [marks, count, undesired])
    _light(undesired.submit, write, [undesired, marks, shown, fitted, rest], [marks, *seen])
    _light(rest.change, counted, [marks, shown, rest], [count, undesired])
    _heavy(
        button,
        fit,
        [*drawn, *asked, marks, shown, rest],
        [fitted, promised, which, *seen],
        show_progress_on=[promised],
    )
    if save is not None:
        name, whole, action, keep, said = save
        saved = gr.State(None)

        def put(name: str, whole: bool, action: str, fitted: Fitted | None) -> tuple[str, Path]:
            with _told():
                folder, code = desk.save(fitted, name, whole=whole, action=action)
            parts = "`filter/` and `pipeline/`" if whole else "`filter/`"
            return _used(f"Saved: {parts} in `{folder}`.", code), folder

        _heavy(keep, put, [name, whole, action, fitted], [said, saved])
        if publish is not None:
            repo_id, private, send, sent = publish

            def push(repo_id: str, private: bool, saved: Path | None) -> str:
                with _told():
                    return _used(*desk.publish(saved, repo_id, private=private))

            _heavy(send, push, [repo_id, private, saved], [sent])


def _filter_fields(desk: Desk) -> list[Any]:
    """In the order in which `fit` takes them."""
    found = desk.found
    gr.Markdown(
        "### 2. Fit a filter\nIt learns from your marks, and from samples that it draws itself and nobody has to look at."
    )
    concept = gr.Textbox("undesired", label="Name of what it blocks", elem_id="concept")
    encoder = gr.Textbox(
        found.encoder or "",
        label="What sees the images",
        info="A folder or an id of an image model, or digits."
        + (" Empty: the generator's own latents." if found.has_latents else ""),
        elem_id="encoder",
    )
    rule = gr.Dropdown([*RULES.items()], value="max_false_alarm", label="The promise is of")
    with gr.Row():
        rate = gr.Slider(1, 99, 5, step=1, label="at most (clean) or at least (undesired), %")
        confidence = gr.Slider(80, 99, 95, step=1, label="with confidence, %")
    unmarked = gr.Slider(
        100, 5000, 1000, step=100, label="Unmarked samples", info="More tell better how samples look in general."
    )
    rule.input(
        lambda rule: 5 if rule == "max_false_alarm" else 90,
        [rule],
        [rate],
        show_progress="hidden",
        api_visibility="private",
    )
    return [concept, encoder, rule, rate, confidence, unmarked]


def _save_fields(desk: Desk) -> tuple[Any, ...]:
    gr.Markdown("### 3. Save it")
    name = gr.Textbox("my-filter", label="Name", info=f"A new folder in {desk.job.output_dir}.", elem_id="name")
    whole = gr.Checkbox(True, label="With the pipeline, which then never draws without it", elem_id="whole")
    action = gr.Dropdown(
        [(ACTION_NAMES.get(name, name), name) for name in ACTIONS if name != "flag"],
        value="blank",
        label="What is blocked comes out",
    )
    keep = gr.Button("Save", elem_id="save")
    return name, whole, action, keep, gr.Markdown(elem_id="saved")


def _publish_fields() -> tuple[Any, ...]:
    gr.Markdown(
        "### 4. Publish it\nWhat you saved last goes to the Hub with its card: the pipeline with its filter, or the filter alone if you saved that."
    )
    repo_id = gr.Textbox(
        label="Repository", placeholder="me/my-filter", info="Is made if it is not there.", elem_id="repo-id"
    )
    private = gr.Checkbox(True, label="Private, if it is made now", elem_id="private")
    send = gr.Button("Publish", elem_id="publish")
    return repo_id, private, send, gr.Markdown(elem_id="published")


def _used(said: str, code: list[str]) -> str:
    return f"{said} Use it:\n\n```python\n" + "\n".join(code) + "\n```"


def _promised(fitted: Fitted, on_marks: str) -> str:
    first, *rest = fitting.promise(fitted).splitlines()
    cells = [[html.escape(cell) for cell in row] for row in fitting.rows(fitted)]
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in cells)
    return (
        f'<div class="promise"><p><b>{html.escape(first)}</b></p>{"".join(f"<p>{html.escape(line)}</p>" for line in rest)}'
        f"<p>{html.escape(fitting.leak(fitted))}</p></div><p>{html.escape(on_marks)}</p>"
        f'<div class="figures"><table><tr><th></th><th>share</th><th>95 % interval</th><th>counted</th></tr>{body}</table></div>'
    )


# Images from elsewhere


def _own_images(desk: Desk, fitted: gr.State) -> None:
    gr.HTML(
        "<p>What the filter says of images that you drop here. The promise is of the generator's samples, not of these.</p>",
        elem_classes="how",
    )
    with gr.Row(equal_height=False):
        files = gr.File(file_count="multiple", file_types=["image"], label="Images", height=200, elem_id="files")
        with gr.Column():
            picture = gr.HTML(elem_id="verdict")
            gr.HTML(LEGEND)
            said = gr.Textbox(label="Scores", lines=4, elem_id="scores")
    button = gr.Button("Judge", variant="primary", elem_id="judge")

    def judge(files: list[str] | None, fitted: Fitted | None):
        from ..jobs.marking import read_image

        with _told():
            return desk.judge([read_image(Path(file), "images") for file in files or ()], fitted)

    _heavy(button, judge, [files, fitted], [picture, said])
