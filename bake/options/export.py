"""The options of `bake export`, which are also the keys of a recipe."""

from __future__ import annotations

from bake.options.declaration import Command, Option, grouped
from bake.options.shared import (
    ACCEPT_LICENCE,
    BAKING,
    COMMIT_MESSAGE,
    CREATE_PR,
    DIRECTION_SITE,
    ENGINES,
    FINDING,
    LAWS,
    LAYER_OFFSET,
    MEMORY,
    MODEL,
    OUTPUT,
    OVERWRITE,
    PROMPTS,
    PUBLIC,
    REVISION,
    ROUTES,
    SITES,
    STATISTIC,
)

THE_DIRECTION, HOW_FOUND = "the direction", "how --pairs become a direction"
THE_STRENGTH, THE_PLACE = "the strength", "the place"
WRITTEN, THE_MEMORY, THE_HUB = "what is written", "memory", "the Hub"


def read_multiplier(text: str) -> float | str:
    """Return a number, "auto" or "-auto"; raise ValueError for anything else."""
    try:
        return text if text in ("auto", "-auto") else float(text)
    except ValueError:
        raise ValueError(f"{text!r} is neither a number nor auto nor -auto") from None


EXPORT = Command(
    "export",
    "bake a direction into a checkpoint",
    "Measure, decide, write and prove: one directory that plain transformers loads.",
    (
        MODEL.but(default="", shown=""),
        Option("recipe", "YAML with any of these options; options given here win", metavar="FILE"),
        OUTPUT.but(required=False, shown="./MODEL-CONCEPT, such as ./SmolLM2-135M-formal"),
        OVERWRITE.but(help="replace the output directory when done"),
        REVISION,
        Option(
            "estimate",
            "say what it would cost (bytes, memory, passes, time) from headers alone; write nothing",
            bool,
        ),
        *grouped(
            THE_DIRECTION,
            Option(
                "direction",
                "a direction: safetensors, .gguf, .npy, .npz, .pt, a rotalabs-steer folder, "
                "FILE:TENSOR[INDEX] of an autoencoder's decoder, or bake-demo; repeated, their sum, each "
                "with its strength",
                metavar="FILE[:STRENGTH]",
                many="repeated",
            ),
            Option(
                "orthogonalize",
                "orthogonalise several directions in the order given (Gram–Schmidt)",
                bool,
            ),
            Option(
                "ablate",
                "first take this direction out of the residual stream, as bake ablate does, then push; "
                "repeated, the subspace that they span",
                metavar="FILE",
                many="repeated",
            ),
            Option(
                "ablate_layer",
                "take layer L's direction of --ablate out everywhere",
                int,
                shown="the layer that separates held-out pairs best",
                metavar="L",
            ),
            LAYER_OFFSET,
            DIRECTION_SITE,
            Option("keep_scale", "α = m·‖v‖: the vector's own length instead of a law", bool),
            Option(
                "pairs", "find it from contrast pairs: JSONL, JSON, CSV or a set", metavar="FILE"
            ),
        ),
        *grouped(HOW_FOUND, *FINDING),
        *grouped(
            THE_STRENGTH,
            Option(
                "multiplier",
                "strength m; negative reverses. auto (-auto: reversed): the largest shift of held-out "
                "pairs that costs at most --target-kl",
                read_multiplier,
                shown="auto with --pairs or --held-out, else 1",
                metavar="M",
                short="-m",
            ),
            Option(
                "target_kl",
                "what auto may cost: 95th percentile of KL(base ‖ steered) on neutral text, in nats; "
                "compares across models, sites and bands as m does not",
                float,
                shown="0.7",
                metavar="NATS",
            ),
            Option(
                "law",
                "how α follows from μ; measured: from what each layer's push does to held-out pairs and "
                "costs neutral text",
                default="inverse-sqrt-d",
                shown="inverse-sqrt-d: α = m·μ/√d",
                choices=(*LAWS, "measured"),
            ),
            Option("coefficients", "explicit α per layer instead of a law", metavar="L=α,…"),
            PROMPTS,
            Option("calibration", "norms from bake calibrate instead of measuring", metavar="FILE"),
            STATISTIC,
        ),
        *grouped(
            THE_PLACE,
            Option("band", "layers to push, per cent of the depth", default="40:90", metavar="A:B"),
            Option(
                "layers",
                "layers to push instead of a band, counted from 0, such as 14 or 3-5,8",
                metavar="LIST",
            ),
            Option("site", "where the push is added", default="auto", choices=SITES),
            Option(
                "route",
                "how the bias comes to exist: already there, by a config flag, in another stock "
                "architecture that computes the same, or in extra layers, which auto never adds",
                default="auto",
                choices=ROUTES,
            ),
            Option(
                "slot",
                "which bias takes it where both can, or attention's value biases, which only float32 holds",
                choices=("norm", "projection", "value"),
            ),
            Option(
                "target",
                "only a route that is known to survive in this engine",
                shown="default: any; bake says where the chosen one survives",
                choices=ENGINES,
            ),
            Option("convert_site", "use a residual direction at an input site", bool),
        ),
        *grouped(
            WRITTEN,
            Option(
                "shards",
                "base shards without a change: copy (cloned where the file system can), or link to the "
                "base's files, also in the Hub's cache. A hard link is the same file twice: writing into "
                "one changes both. A symbolic link breaks when the base is moved or deleted. Patched "
                "shards are always copies",
                default="copy",
                choices=("copy", "hardlink", "symlink"),
            ),
            Option(
                "thin",
                "read no weights and write no base shards: only the new biases, index, config and card, "
                "not verified until the base's shards are beside them (needs --direction and "
                "--calibration)",
                bool,
            ),
            Option(
                "dtype",
                "store the checkpoint in this dtype",
                shown="the base's",
                choices=("float32", "float16", "bfloat16"),
            ),
            Option(
                "name",
                "the model's name, the title of its card",
                shown="base and concept",
                metavar="TEXT",
            ),
            Option(
                "description",
                "what the model is, in a sentence or two: the card begins with it",
                metavar="TEXT",
            ),
            Option(
                "base_id",
                "a local base's id on the Hub, for the card; its files are compared with those there",
                metavar="ID[@REV]",
            ),
            Option("allow_rounding", "accept a dtype too coarse for the push", bool),
            Option(
                "sweep",
                "a bake sweep of this bake: its figures go into the card",
                metavar="DIR",
            ),
        ),
        *grouped(THE_MEMORY, *MEMORY),
        *grouped(
            THE_HUB,
            Option("push_to_hub", "publish when proven", shown="private", metavar="REPO_ID"),
            *(
                option.but(help=f"with --push-to-hub: {option.help}")
                for option in (PUBLIC.but(shown=""), CREATE_PR, COMMIT_MESSAGE, ACCEPT_LICENCE)
            ),
        ),
    ),
    heading=BAKING,
    examples=(
        "bake export HuggingFaceTB/SmolLM2-135M-Instruct --pairs formal-casual",
        "bake export HuggingFaceTB/SmolLM2-135M-Instruct --pairs formal-casual -m -auto -o casual",
        "bake export HuggingFaceTB/SmolLM2-135M-Instruct --pairs formal-casual --estimate",
    ),
    from_recipe=True,
)
