"""The page, drawn with Gradio: two columns that answer, and the knobs of a `Stage`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bake.errors import BakeError
from bake.live.steering import Setting
from bake.live.writing import Style
from bake.play.stage import Messages, Stage, make_setting
from bake.support.progress import announce

# Of what passes through the model, one at a time; others wait in a queue.
MODEL = {"concurrency_id": "model", "concurrency_limit": 1}
WAITING = 20  # requests in the queue, at most
CSS = """
.gradio-container { max-width: 1280px !important; margin: 0 auto; }
@media (max-width: 700px) {
  #columns { flex-direction: column; }
  #columns > * { min-width: 100% !important; }
}
footer { display: none !important; }
"""
LONGEST = 400  # tokens of an answer; others wait meanwhile
RANGE = 4.0  # × the usual strength is as far as the slider goes
PLAIN = {"render_markdown": False, "latex_delimiters": [], "buttons": ["copy"]}


def build(stage: Stage) -> Any:
    """Return the page of a stage, a `gradio.Blocks`. Raises BakeError where Gradio is not installed."""
    gr = import_gradio()
    session = stage.session
    style = session.talk.style
    names = stage.names(None)
    with gr.Blocks(title=stage.title, analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(f"## {_escape(stage.title)}")
        with gr.Row(elem_id="columns"):
            left = gr.Chatbot(label=names.base, elem_id="base", height=420, **PLAIN)
            right = gr.Chatbot(label=names.other, elem_id="steered", height=420, **PLAIN)
        with gr.Row():
            text = gr.Textbox(
                show_label=False,
                container=False,
                scale=6,
                elem_id="text",
                placeholder="Say something to both" if stage.is_chat else "Begin a text for both",
                autofocus=True,
            )
            send = gr.Button("Send", variant="primary", min_width=80, elem_id="send")
            stop = gr.Button("Stop", min_width=80, elem_id="stop")
            clear = gr.Button("New", min_width=80, elem_id="new")
        with gr.Accordion("How it is sampled", open=False):
            sampling = [
                gr.Slider(
                    1, LONGEST, style.new_tokens, step=1, label="New tokens", elem_id="tokens"
                ),
                gr.Slider(
                    0, 2, style.temperature, step=0.05, label="Temperature; 0: the likeliest"
                ),
                gr.Number(style.seed, precision=0, minimum=0, label="Seed of the noise, for both"),
            ]
        knobs = _knobs(gr, stage) if stage.steering is not None else []

        def answer(
            said: str, base: Messages, other: Messages, *values: Any
        ) -> Iterator[tuple[Any, ...]]:
            asked = Style(min(int(values[0]), LONGEST), float(values[1]), int(values[2] or 0))
            with _shown(gr):
                setting = _setting_of(stage, values[3:])
                before = [_plain(base), _plain(other)]
                for first, second, over in stage.answer(said, before, setting, asked):
                    yield (
                        "",
                        gr.update(value=first, label=over.base),
                        gr.update(value=second, label=over.other),
                    )

        inputs = [text, left, right, *sampling, *knobs]
        running = gr.on(
            [send.click, text.submit],
            answer,
            inputs,
            [text, left, right],
            show_progress="hidden",
            api_name="answer",
            **MODEL,
        )
        stop.click(None, cancels=[running], api_visibility="private")
        clear.click(
            lambda: ([], []), None, [left, right], cancels=[running], api_visibility="private"
        )
    page.queue(max_size=WAITING)
    return page


def _knobs(gr: Any, stage: Stage) -> list[Any]:
    """Draw the knobs, what they cost, and how to bake what they say; return their components."""
    steering = stage.steering
    assert steering is not None
    usual, most = stage.multiplier, RANGE * abs(stage.multiplier)
    start, stop = (float(part) for part in steering.recipe.band.split(":"))
    step = 10.0 ** int(f"{most / 100:e}".rpartition("e")[2])
    with gr.Row(equal_height=False):
        with gr.Column(min_width=280):
            strength = gr.Slider(
                -most, most, usual, step=step, label="Strength m", elem_id="multiplier"
            )
            # Coefficients that the user gave say which layers.
            placed = steering.recipe.coefficients is None
            shares = [
                gr.Slider(
                    0, 100, at, step=1, label=f"{which} layer, % of the depth", visible=placed
                )
                for which, at in (("First", start), ("Last", stop))
            ]
            layers = gr.Textbox(
                steering.recipe.layers or "",
                label="Layers instead, such as 10-14",
                elem_id="layers",
                visible=placed,
            )
            several = len(steering.given) > 1
            strengths = [
                gr.Slider(-2, 2, entry.strength, step=0.05, label=f"Share of {name}")
                for entry, name in zip(steering.given, steering.names, strict=False)
                if several
            ]
        with gr.Column(min_width=280):
            cost = gr.Markdown(elem_id="cost")
            command = gr.Code(
                label="The export command",
                language="shell",
                elem_id="command",
                lines=1,
                wrap_lines=True,
                interactive=False,
            )
            recipe = gr.DownloadButton("Download recipe.yaml", elem_id="recipe")
            if stage.curve is not None:
                gr.Image(
                    str(stage.curve), label="What each layer does, by bake tune", interactive=False
                )
    knobs = [strength, *shares, layers, *strengths]
    kept = tempfile.TemporaryDirectory(prefix="bake-play-")  # As long as this process runs.
    folder = kept.name

    def describe(*values: Any, _kept: Any = kept) -> tuple[Any, ...]:
        try:
            setting = _setting_of(stage, values)
            assert setting is not None
            said = stage.cost(setting)
            if setting.multiplier == 0:
                return said, "", gr.update(value=None, interactive=False)
            return (
                said,
                stage.command(setting),
                gr.update(value=_recipe_file(folder, stage, setting), interactive=True),
            )
        except BakeError as error:
            return f"**{_escape(str(error))}**", "", gr.update(value=None, interactive=False)

    gr.on(
        [gr.context.Context.root_block.load, *(knob.change for knob in knobs)],
        describe,
        knobs,
        [cost, command, recipe],
        show_progress="hidden",
        trigger_mode="always_last",
        api_name="describe",
        **MODEL,
    )
    return knobs


def _setting_of(stage: Stage, values: tuple[Any, ...]) -> Setting | None:
    """Return what the knobs say; None where there are none."""
    if stage.steering is None:
        return None
    multiplier, start, stop, layers, *strengths = values
    placed = stage.steering.recipe.coefficients is None
    return make_setting(multiplier, (start, stop) if placed else None, layers or "", strengths)


def _recipe_file(folder: str, stage: Stage, setting: Setting) -> str:
    """Write the recipe where Gradio may read it, which keeps a copy for the page; return its path."""
    path = Path(folder) / "recipe.yaml"
    path.write_text(stage.recipe(setting), encoding="utf-8")
    return str(path)


def _plain(messages: Messages) -> Messages:
    """Return a column's messages with texts for contents, which Gradio gives as parts."""
    found = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            content = "".join(str(part.get("text", "")) for part in content)
        found.append({"role": message["role"], "content": content})
    return found


def _escape(text: str) -> str:
    """Return a text that Markdown and HTML leave as it is."""
    return "".join(
        f"&#{ord(letter)};" if letter in "\\`*_{}[]<>()#+-!|&" else letter for letter in text
    )


@contextmanager
def _shown(gr: Any) -> Iterator[None]:
    """Show a BakeError on the page in its own words."""
    try:
        yield
    except BakeError as error:
        raise gr.Error(str(error), print_exception=False) from None


def import_gradio() -> Any:
    """Return Gradio, which sends nothing anywhere; raise BakeError where it is not installed."""
    import os

    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio
    except ImportError:
        raise BakeError(
            "bake play needs Gradio: pip install '.[play]' in a checkout, or pip install gradio"
        ) from None
    return gradio


def launch(
    page: Any,
    *,
    host: str | None = None,
    port: int | None = None,
    open_browser: bool = False,
    block: bool = True,
) -> str:
    """Serve a page until it is interrupted, or with block=False in the background; return its address.

    host, port: None is what the environment says (GRADIO_SERVER_NAME), else this machine alone and the
    first free port. Nothing is shared, counted or sent anywhere. Raises BakeError where it cannot listen.
    """
    gr = import_gradio()
    try:
        _, address, _ = page.launch(
            server_name=host,
            server_port=port,
            inbrowser=open_browser,
            prevent_thread_lock=True,
            share=False,
            quiet=True,
            show_error=True,
            enable_monitoring=False,
            ssr_mode=False,
            footer_links=[],
            css=CSS,
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        )
    except OSError as error:
        raise BakeError(f"the page cannot be served: {error}") from None
    if block:
        announce(f"the page is at {address}; Ctrl-C ends it")
        page.block_thread()
    return str(address)
