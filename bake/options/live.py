"""The options of `bake try`, `bake play` and `bake space`."""

from __future__ import annotations

from bake.options.declaration import Command, Option, grouped
from bake.options.export import (
    EXPORT,
    HOW_FOUND,
    THE_DIRECTION,
    THE_MEMORY,
    THE_PLACE,
    THE_STRENGTH,
)
from bake.options.shared import (
    BASE,
    COMMIT_MESSAGE,
    HEARING,
    MODEL,
    OUTPUT,
    PUBLIC,
    REVISION,
)
from bake.options.sweep import read_numbers

THE_TEXT = "the text"
_RECIPE = EXPORT["recipe"]
# What says how a model is pushed, as for an export; how far is for the knobs.
STEERING = tuple(
    option
    for option in EXPORT.options
    if option.group in (THE_DIRECTION, HOW_FOUND, THE_STRENGTH, THE_PLACE, THE_MEMORY)
    and option.name not in ("multiplier", "target_kl")
)
MULTIPLIERS = Option(
    "multipliers",
    "strengths to hear side by side, such as -1,0,1; 0 is the base",
    read_numbers,
    shown="what moves neutral text by about 0.7 nats, either way",
    metavar="M,…",
    short="-m",
)
SAMPLING = grouped(
    THE_TEXT,
    Option("new_tokens", "tokens of each text", int, default=60, metavar="N"),
    Option("temperature", "0 takes the likeliest token", float, default=0.7, metavar="T"),
    Option("sampling_seed", "of the noise, which all strengths share", int, default=0, metavar="N"),
    Option("system", "a system message before every conversation", metavar="TEXT"),
)

TRY = Command(
    "try",
    "hear a direction, or a bake beside its base, before anything is written",
    "Continue prompts at several strengths side by side, with the same noise: as a conversation where the "
    "model has a chat template. KL is how far a text strays from the base, nats a token of its own; the "
    "perplexity is the base's. Without a prompt: a line to type at, with /m, /layers, /band, /reset, "
    "/save and /help. Without a direction: a baked directory or Hub id beside its base. What is heard is "
    "what bake export writes, at the same strength.",
    (
        MODEL.but(default="", shown=""),
        Option(
            "texts",
            "what is said; without one, a line to type at",
            metavar="PROMPT",
            positional=True,
            default=(),
            shown="",
            many="listed",
        ),
        MULTIPLIERS,
        _RECIPE,
        BASE.but(help="the base that a bake is heard beside"),
        REVISION,
        *SAMPLING,
        *STEERING,
    ),
    heading=HEARING,
    examples=(
        'bake try HuggingFaceTB/SmolLM2-135M-Instruct --pairs formal-casual "Tell me about the moon."',
        'bake try SmolLM2-135M-Instruct-formal "Tell me about the moon."',
    ),
    from_recipe=True,
)

HEAR = Command(
    "hear",
    TRY.help,
    TRY.description,
    TRY.options,
)

STEER = Command(
    "steer",
    "steer a model that Python holds",
    "",
    (
        Option("model", "transformers' model, or (model, tokenizer)", positional=True),
        Option("multiplier", "strength m; negative reverses", float, default=1.0),
        Option("tokenizer", "its tokenizer; else the one that its name or path has"),
        Option("norms", "of bake.calibrate, or its file, instead of measuring"),
        *STEERING,
    ),
)

PLAY = Command(
    "play",
    "a local page: base and steered side by side, with sliders",
    "A page in the browser on this machine: chat or text, base and steered side by side, sliders for the "
    "strength and the layers, several directions mixed, what it costs, and the recipe and command of what "
    "is heard. Needs the extra play. Nothing leaves the machine; --host lets others in.",
    (
        MODEL.but(default="", shown=""),
        MULTIPLIERS.but(
            name="multiplier",
            help="the strength that the page begins with",
            kind=float,
            shown="what moves neutral text by about 0.7 nats",
            metavar="M",
        ),
        _RECIPE.but(
            help="YAML with any of these options; a layer curve of bake tune beside it is shown"
        ),
        Option("host", "address to listen at", default="127.0.0.1", metavar="ADDRESS"),
        Option("port", "port to listen at", int, shown="the first free one from 7860", metavar="N"),
        Option("open", "open the page in a browser", bool),
        BASE.but(help="the base that a bake is heard beside"),
        REVISION,
        *SAMPLING,
        *STEERING,
    ),
    heading=HEARING,
    examples=("bake play HuggingFaceTB/SmolLM2-135M-Instruct --pairs formal-casual",),
    from_recipe=True,
)

SPACE = Command(
    "space",
    "a Hugging Face Space that lets others hear a bake",
    "Write a folder that is a Space: it compares a published bake with its base, or with --play lets its "
    "visitors turn the strength of its direction. It runs on a CPU. The page is that of bake play.",
    (
        Option(
            "model",
            "a published bake: its directory, or its id",
            metavar="DIR|REPO_ID",
            positional=True,
        ),
        OUTPUT.but(help="folder to write; must not exist"),
        Option("play", "sliders over the base, instead of the bake beside its base", bool),
        Option("title", "the page's title", shown="the bake's", metavar="TEXT"),
        Option("push_to_hub", "publish it as this Space", shown="private", metavar="REPO_ID"),
        PUBLIC.but(help="with --push-to-hub: make it public"),
        COMMIT_MESSAGE.but(
            help="with --push-to-hub: the commit's title", shown="Publish the Space"
        ),
        REVISION,
    ),
    heading=HEARING,
    examples=(
        "bake space you/SmolLM2-135M-Instruct-formal -o formal-space",
        "bake space you/SmolLM2-135M-Instruct-formal -o formal-play --play",
    ),
)
