"""The options of `bake sweep`."""

from __future__ import annotations

from bake.options.declaration import Command, Option
from bake.options.shared import (
    BAKING,
    CHAT_TEMPLATE,
    LAWS,
    MEMORY,
    MODEL,
    OUTPUT,
    PROMPTS,
    REVISION,
    SITES,
)


def read_numbers(text: str) -> tuple[float, ...]:
    """Return the numbers of a list such as "-1,1"; raise ValueError where it is none."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{text!r} is no list of numbers such as -1,1") from None


SWEEP = Command(
    "sweep",
    "measure what a direction does at each strength, and what it costs",
    "Hooks on one loaded model: shift, fluency and side effects at each multiplier, with random directions "
    "beside them; report.json, figures and the operating window. A directory keeps every text as it is "
    "measured: the same command goes on after a break.",
    (
        MODEL,
        Option("direction", "direction file, or bake-demo", required=True, metavar="FILE"),
        OUTPUT.but(help="where report and figures go"),
        Option(
            "multipliers",
            "strengths, such as -2,-1,1,2",
            read_numbers,
            default=(-3.0, -2.0, -1.0, 1.0, 2.0, 3.0),
            shown="-3,-2,-1,1,2,3",
            metavar="M,…",
        ),
        Option(
            "band",
            "one or more bands",
            default=("40:90",),
            shown="40:90",
            metavar="A:B",
            many="listed",
            parameter="bands",
        ),
        Option(
            "site",
            "one or more sites",
            default=("auto",),
            shown="auto",
            choices=SITES,
            many="listed",
            parameter="sites",
        ),
        Option(
            "law",
            "one or more laws",
            default=("inverse-sqrt-d",),
            shown="inverse-sqrt-d",
            choices=LAWS,
            many="listed",
            parameter="laws",
        ),
        Option(
            "ablate",
            "also take the direction out, as bake ablate --scope does, with random ones beside it: of the "
            "stream, of writes in each --band",
            default=(),
            shown="",
            choices=("stream", "writes"),
            many="listed",
        ),
        Option(
            "strengths",
            "of --ablate writes: shares that are taken out, such as 0.5,1",
            read_numbers,
            default=(1.0,),
            shown="1",
            metavar="S,…",
        ),
        Option(
            "from_layer",
            "of --ablate stream: layers, each of whose directions is taken out everywhere",
            int,
            default=(),
            shown="the layer that separates held-out pairs best",
            metavar="L",
            many="listed",
            parameter="from_layers",
        ),
        Option("pairs", "held-out contrast pairs, not those it was found from", metavar="FILE"),
        CHAT_TEMPLATE.but(help="score pairs as conversations where the tokenizer has a template"),
        Option("words", "target words to count in sampled text, one a line", metavar="FILE"),
        Option(
            "openings",
            "texts to continue, or requests to reply to where the tokenizer has a chat template",
            shown="openings, or requests",
            metavar="FILE",
        ),
        Option("neutral", "text that must not change", shown="neutral", metavar="FILE"),
        PROMPTS,
        Option("scorer", "your own score of a sampled text", metavar="MODULE:FUNCTION"),
        Option(
            "judge",
            "an OpenAI-compatible server that scores what was written, from 0 to 10; it sees replies only. "
            "A key for it is read from BAKE_JUDGE_KEY",
            metavar="URL",
        ),
        Option("judge_model", "what the judge's server calls its model", metavar="NAME"),
        Option(
            "question", "what the judge is asked, such as 'Does the text refuse?'", metavar="TEXT"
        ),
        Option("judge_repeats", "how often about each reply", int, default=2, metavar="N"),
        Option(
            "instruction", "a prompt that asks for the same", default="", shown="", metavar="TEXT"
        ),
        Option("control_seeds", "random directions", int, default=8, metavar="N"),
        Option("samples", "continuations an opening", int, default=2, metavar="N"),
        Option("new_tokens", "tokens of each", int, default=40, metavar="N"),
        Option(
            "max_fluency",
            "the window's bound on sampled text's perplexity, × base",
            float,
            default=1.5,
            metavar="X",
        ),
        Option(
            "max_kl",
            "the window's bound on the 95th percentile KL on neutral text",
            float,
            default=1.0,
            metavar="NATS",
        ),
        Option(
            "last_token",
            "also push the prompt's last token only, which no bake can do: to compare with",
            bool,
        ),
        Option("by_layer", "what each layer of the band contributes", bool),
        Option("html", "also one self-contained page, samples side by side", bool),
        Option("seed", "random seed of the sampled text", int, default=0, metavar="N"),
        REVISION,
        *MEMORY,
    ),
    heading=BAKING,
    examples=(
        "bake sweep bake-demo --direction bake-demo --multipliers -1,1 -o demo-sweep --html",
    ),
)
