"""Options that several commands have, and what they pass on."""

from __future__ import annotations

import argparse
from typing import Any

# Kept here as text: importing the modules that own these would be cheap, importing torch would not.
SITES = ("auto", "mlp_out", "attn_out", "attn_in", "mlp_in")
ROUTES = ("auto", "native", "flag", "host", "insert")
SHARDS = ("copy", "hardlink", "symlink")
ENGINES = ("transformers", "vllm", "sglang", "llama.cpp", "mlx")
METHODS = ("mean", "pca", "probe", "optimize")
CHAT_TEMPLATES = ("auto", "never")
ACCEPT_LICENCE = (
    "you have read the base's terms and may publish this where bake would refuse: a public push from a "
    "gated or licence-less base, or a name or file that its licence asks for"
)
LAWS = ("inverse-sqrt-d", "sqrt-d", "norm", "flat")


def add_finding(command: Any) -> None:
    """Add how a direction is found; what is not given stays out of the namespace."""
    option = lambda *names, **kwargs: command.add_argument(  # noqa: E731
        *names, default=argparse.SUPPRESS, **kwargs
    )
    option(
        "--method",
        choices=METHODS,
        help="difference of means, principal component of the differences, linear probe, or what gradient "
        "descent finds to raise the positive completions' likelihood (mean)",
    )
    option(
        "--token",
        metavar="POSITION",
        help="what is read of a completion: its last token, mean over its tokens, an index of them such "
        "as -2, or all of the text's tokens (last)",
    )
    option("--from-layer", type=int, metavar="L", help="use layer L's direction in every layer")
    option(
        "--chat-template",
        choices=CHAT_TEMPLATES,
        help="make prompts messages and completions replies where the tokenizer has a template (auto)",
    )
    option(
        "--held-out",
        metavar="FILE",
        help="pairs that say how well it separates (else the pairs themselves, divided)",
    )
    option(
        "--seed",
        type=int,
        metavar="N",
        help="random seed: of dividing the pairs, and of optimize (0)",
    )
    option("--steps", type=int, metavar="N", help="most steps of optimize (150)")
    option(
        "--kl-weight",
        type=float,
        metavar="W",
        help="what optimize pays for changing neutral text (0.3)",
    )


def add_placement(command: Any) -> None:
    """Add where the weights are held while a model runs."""
    command.add_argument(
        "--device-map", choices=("auto",), help="spread weights over GPUs, CPU and disk"
    )
    command.add_argument(
        "--max-memory", metavar="SIZES", help="weights kept in memory: 600MB, or 0=20GB,cpu=60GB"
    )


def given_options(parsed: argparse.Namespace) -> dict[str, Any]:
    """Return a command's options by name, without what belongs to the command line itself."""
    ours = ("run", "command", "json")
    return {name: value for name, value in vars(parsed).items() if name not in ours}
