"""Opens what a job names, and serves the page on this machine."""

from __future__ import annotations

import logging
import os
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..jobs.keys import console


if TYPE_CHECKING:
    from ..jobs.recipe.app import AppJob

logger = logging.getLogger(__name__)

OLDEST = 6  # gradio's first version whose `launch` takes theme and style
STYLE = Path(__file__).with_name("style.css")
VISITORS = 50  # whose marks are kept in memory
FONT = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]  # those of the machine: none is fetched
MONO = ["ui-monospace", "SFMono-Regular", "Consolas", "monospace"]


def launch(job: AppJob, *, stays: bool = True) -> Any:
    """Serve the page.

    Args:
        job ([`AppJob`]): what to open, and where to listen.
        stays (`bool`, defaults to `True`): until it is stopped; else the page is given back, and is served until its `close()`.

    Returns:
        `gradio.Blocks`: the page.

    Raises:
        ValueError: gradio is not installed or too old, what is named cannot be opened, or the port is taken.
    """
    check_gradio()
    # Read when gradio is imported. Pictures of what is undesired lie in its temporary folder: for nobody else to read.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    private = tempfile.TemporaryDirectory(prefix="hf_unlearn-app-")
    os.environ["GRADIO_TEMP_DIR"] = private.name
    from .desk import Desk
    from .opened import opened
    from .page import page

    if job.is_for_others:
        logger.warning(
            "host=%r: whoever reaches this address draws without the filter%s",
            job.host,
            "" if job.output_dir is None else f", and writes folders into {job.output_dir!r}",
        )
    demo = page(Desk(job, opened(job)))
    demo.hf_unlearn_temporary = private  # lives, and goes, with the page
    try:
        _, address, _ = demo.queue().launch(
            server_name=job.host,
            server_port=job.port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            ssr_mode=False,
            footer_links=[],
            theme=theme(),
            css_paths=[STYLE],
            state_session_capacity=VISITORS,
        )
    except OSError as error:  # what gradio says of a port that is taken
        raise ValueError(f"port={job.port}: cannot listen there; choose another, or leave it out") from error
    console().print(f"the app is at {address} (Ctrl-C stops it)")
    if stays:
        demo.block_thread()
    return demo


def check_gradio() -> None:
    """Refuse a machine without it, and with one of which parts have other names.

    Raises:
        ValueError: saying what to install.
    """
    try:
        found = version("gradio")
    except PackageNotFoundError:
        found = None
    if found is None or int(found.split(".")[0]) < OLDEST:
        there = "which is not installed" if found is None else f"this is {found}"
        raise ValueError(f"app: needs gradio {OLDEST} or newer, {there}; pip install 'hf_unlearn[app]'")


def theme() -> Any:
    """Plain, in the machine's own fonts, light or dark as the browser asks."""
    import gradio as gr

    return gr.themes.Base(primary_hue="blue", neutral_hue="slate", font=FONT, font_mono=MONO, radius_size="sm")
