"""`bake sweep`: what a direction does at each strength, and what it costs."""

from __future__ import annotations

import argparse
from typing import Any

from bake.cli.options import CHAT_TEMPLATES, LAWS, SITES, add_placement, given_options
from bake.cli.output import print_result


def add(commands: Any) -> None:
    """Add the command's parser."""
    command = commands.add_parser(
        "sweep",
        help="measure what a direction does at each strength, and what it costs",
        description="Hooks on one loaded model: shift, fluency and side effects at each multiplier, with "
        "random directions beside them; report.json, figures and the operating window. A directory "
        "keeps every text as it is measured: the same command goes on after a break.",
    )
    command.set_defaults(run=run)
    option = command.add_argument
    option("model", metavar="MODEL", help="path, Hub id, or bake-demo")
    option("--direction", required=True, metavar="FILE", help="direction file, or bake-demo")
    option("--output", "-o", required=True, metavar="DIR", help="where report and figures go")
    option(
        "--multipliers", type=_numbers, default=(-3, -2, -1, 1, 2, 3), metavar="M,…",
        help="strengths, written --multipliers=-2,-1,1,2 (-3,-2,-1,1,2,3)",
    )  # fmt: skip
    option("--band", nargs="+", default=["40:90"], metavar="A:B", help="one or more bands (40:90)")
    option("--site", nargs="+", default=["auto"], choices=SITES, help="one or more sites (auto)")
    option(
        "--law",
        nargs="+",
        default=["inverse-sqrt-d"],
        choices=LAWS,
        help="one or more laws (inverse-sqrt-d)",
    )
    option("--pairs", metavar="FILE", help="held-out contrast pairs, not those it was found from")
    option(
        "--chat-template",
        choices=CHAT_TEMPLATES,
        default="auto",
        help="score pairs as conversations where the tokenizer has a template (auto)",
    )
    option("--words", metavar="FILE", help="target words to count in sampled text, one a line")
    option("--openings", default="openings", metavar="FILE", help="texts to continue (openings)")
    option("--neutral", metavar="FILE", help="text that must not change (neutral)")
    option("--prompts", default="neutral", metavar="FILE", help="calibration prompts (neutral)")
    option("--scorer", metavar="MODULE:FUNCTION", help="your own score of a sampled text")
    option("--instruction", default="", metavar="TEXT", help="a prompt that asks for the same")
    option("--control-seeds", type=int, default=8, metavar="N", help="random directions (8)")
    option("--samples", type=int, default=2, metavar="N", help="continuations an opening (2)")
    option("--new-tokens", type=int, default=40, metavar="N", help="tokens of each (40)")
    option("--max-fluency", type=float, default=1.5, metavar="X", help="window's bound on "
           "sampled text's perplexity, × base (1.5)")  # fmt: skip
    option("--max-kl", type=float, default=1.0, metavar="NATS", help="window's bound on the 95th "
           "percentile KL on neutral text (1)")  # fmt: skip
    option("--last-token", action="store_true", help="also push the prompt's last token only, which "
           "no bake can do: to compare with")  # fmt: skip
    option("--by-layer", action="store_true", help="what each layer of the band contributes")
    option("--html", action="store_true", help="also one self-contained page, samples side by side")
    option("--seed", type=int, default=0, metavar="N", help="random seed of the sampled text (0)")
    option("--revision", metavar="REV", help="branch, tag or commit of a Hub model")
    add_placement(command)


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as -1,1") from None


def run(parsed: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    from bake.sweeps.description import describe
    from bake.sweeps.options import TrialOptions
    from bake.sweeps.run import sweep

    options = given_options(parsed)
    for one, many in (("band", "bands"), ("site", "sites"), ("law", "laws")):
        options[many] = tuple(options.pop(one))
    found = sweep(TrialOptions(**options))
    print_result(parsed, found.to_dict(), describe(found))
    return 0
