"""The options of `bake tune`."""

from __future__ import annotations

from bake.options.declaration import Command, Option
from bake.options.shared import (
    BAKING,
    CHAT_TEMPLATE,
    MEMORY,
    MODEL,
    OUTPUT,
    PROMPTS,
    REVISION,
    SITES,
)

TUNED_SITES = SITES[1:]
TUNED_METHODS = ("mean", "pca", "probe")
TUNED_LAWS = ("inverse-sqrt-d", "flat", "measured")

TUNE = Command(
    "tune",
    "find where to push: site, layers, law and method that move most for one cost",
    "Bring every candidate to one cost (KL on neutral text) and compare what it moves: ways of finding the "
    "direction first, then bands and single layers, then laws; the best are judged on pairs and texts that "
    "chose nothing. Writes a ranking, the curve over layers and recipe.yaml, which bake export --recipe "
    "takes. A directory keeps every text as it is measured: the same command goes on after a break.",
    (
        MODEL,
        OUTPUT.but(help="where recipe, report and figures go"),
        Option("pairs", "contrast pairs that the direction is found from", metavar="FILE"),
        Option(
            "direction",
            "a direction file instead of --pairs: then only site, layers and law are compared",
            metavar="FILE",
        ),
        Option(
            "held_out",
            "pairs that judge: the first half chooses, the others rank the best",
            shown="those beside --pairs",
            metavar="FILE",
        ),
        Option(
            "site",
            "one or more sites",
            shown="all that are exact",
            choices=TUNED_SITES,
            many="listed",
            parameter="sites",
        ),
        Option(
            "method",
            "one or more ways of finding it",
            default=TUNED_METHODS,
            shown="mean pca probe",
            choices=TUNED_METHODS,
            many="listed",
            parameter="methods",
        ),
        Option(
            "token",
            "one or more token positions",
            default=("last", "mean"),
            shown="last mean",
            metavar="POSITION",
            many="listed",
            parameter="tokens",
        ),
        Option(
            "law",
            "one or more laws (at one cost, norm and sqrt-d are inverse-sqrt-d)",
            default=TUNED_LAWS,
            shown="inverse-sqrt-d flat measured",
            choices=TUNED_LAWS,
            many="listed",
            parameter="laws",
        ),
        Option(
            "route",
            "insert: the recipe may add layers, where the residual stream takes no push otherwise",
            default="auto",
            choices=("auto", "insert"),
        ),
        Option(
            "target_kl",
            "the cost: 95th percentile of KL(base ‖ steered) on neutral text, in nats",
            float,
            default=0.7,
            metavar="NATS",
        ),
        Option(
            "reverse", "push towards the negative completions: the recipe's m is negative", bool
        ),
        Option(
            "ablate",
            "also take the best direction out, of the stream and of writes, and compare each with the push "
            "that costs as much",
            bool,
        ),
        Option(
            "minutes",
            "begin no further stage after so many minutes, and rank what was measured",
            float,
            shown="no limit",
            metavar="N",
        ),
        Option("neutral", "text that must not change", default="neutral", metavar="FILE"),
        PROMPTS,
        CHAT_TEMPLATE.but(help="texts are conversations where the tokenizer has a template"),
        Option("html", "also one self-contained page", bool),
        REVISION,
        *MEMORY,
    ),
    heading=BAKING,
    examples=(
        "bake tune HuggingFaceTB/SmolLM2-135M-Instruct --pairs formal-casual -o tuned --minutes 20",
        "bake export --recipe tuned/recipe.yaml -o tuned-formal",
    ),
)
