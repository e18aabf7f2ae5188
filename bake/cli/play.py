"""`bake play`: a page on this machine."""

from __future__ import annotations

import argparse

from bake.cli.parser import options_of


def run(parsed: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    from bake.api.hearing import session_options
    from bake.play.app import build, import_gradio, launch
    from bake.play.run import open_stage

    import_gradio()  # Whether it is there is told before the model is loaded.
    options = options_of(parsed)
    place = {name: options.pop(name, None) for name in ("host", "port", "open")}
    if "multiplier" in options:
        options["multipliers"] = (options.pop("multiplier"),)
    with session_options(options) as (model, given, own):
        page = build(open_stage(model, given, **own))
        launch(
            page,
            host=place["host"] or "127.0.0.1",
            port=place["port"],
            open_browser=bool(place["open"]),
        )
    return 0
