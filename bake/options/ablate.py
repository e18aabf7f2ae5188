"""The options of `bake ablate`."""

from __future__ import annotations

from bake.options.declaration import Command, Option, grouped
from bake.options.export import (
    EXPORT,
    HOW_FOUND,
    THE_DIRECTION,
    THE_HUB,
    THE_MEMORY,
    THE_PLACE,
    WRITTEN,
)
from bake.options.shared import (
    BAKING,
    DEVICE_MAP,
    DIRECTION_SITE,
    FINDING,
    LAYER_OFFSET,
    MAX_MEMORY,
    MODEL,
    OUTPUT,
    OVERWRITE,
    PROMPTS,
    REVISION,
)

_FOUND = tuple(option for option in FINDING if option.name != "from_layer")

ABLATE = Command(
    "ablate",
    "take a direction out of a checkpoint, instead of adding one",
    "Take directions out of the weights, prove that hooks would have done the same, and say how much is "
    "left. stream: nothing in the residual stream points along them any more, in any layer. writes: what "
    "some layers write loses a share of its component along them.",
    (
        MODEL,
        OUTPUT,
        OVERWRITE.but(help="replace the output directory when done"),
        REVISION,
        *grouped(
            THE_DIRECTION,
            Option(
                "direction",
                "a direction, of any format that bake export takes; repeated, the subspace that they span",
                metavar="FILE",
                many="repeated",
            ),
            EXPORT["pairs"],
            LAYER_OFFSET,
            DIRECTION_SITE,
            Option(
                "from_layer",
                "take layer L's direction out everywhere",
                int,
                shown="with --pairs the one that moves held-out pairs most within a bound of KL, else "
                "the one that separates them best",
                metavar="L",
            ),
            Option(
                "heads",
                "attention heads that write nothing, instead of a direction: LAYER.HEAD,… such as "
                "10.5,10.7",
                metavar="LIST",
            ),
            Option(
                "neurons",
                "neurons of MLPs that write nothing: LAYER:NEURON,… such as 10:3072",
                metavar="LIST",
            ),
            Option(
                "mean",
                "heads or neurons write their mean over --prompts instead of nothing; it needs a bias",
                bool,
            ),
            PROMPTS.but(help="with --mean: what it is measured on"),
        ),
        *grouped(HOW_FOUND, *_FOUND),
        *grouped(
            THE_PLACE,
            Option(
                "scope",
                "stream: out of the residual stream, everywhere; writes: out of what the layers of a band "
                "write",
                default="stream",
                choices=("stream", "writes"),
            ),
            Option(
                "strength",
                "with --scope writes: the share that is taken out; 1 all of it, 2 reflects it, a negative "
                "one amplifies it",
                float,
                default=1.0,
                metavar="S",
            ),
            EXPORT["band"].but(help="with --scope writes: layers, per cent of the depth"),
            EXPORT["layers"].but(
                help="with --scope writes: layers instead of a band, counted from 0, such as 14 or 3-5,8"
            ),
        ),
        *grouped(
            WRITTEN,
            *(EXPORT[name] for name in ("shards", "dtype", "name", "description", "base_id")),
            Option("allow_rounding", "accept a dtype too coarse for the ablation", bool),
        ),
        *grouped(
            THE_MEMORY,
            DEVICE_MAP.but(help="auto: spread weights over GPUs, CPU and disk", choices=("auto",)),
            MAX_MEMORY,
        ),
        *grouped(
            THE_HUB,
            *(
                EXPORT[name]
                for name in (
                    *("push_to_hub", "public", "create_pr", "commit_message", "accept_licence"),
                )
            ),
        ),
    ),
    heading=BAKING,
    examples=(
        "bake ablate HuggingFaceTB/SmolLM2-135M-Instruct --pairs cheerful-gloomy -o no-cheer",
    ),
)
