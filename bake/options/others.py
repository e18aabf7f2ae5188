"""The options of the commands beside `bake export` and `bake sweep`."""

from __future__ import annotations

from bake.options.declaration import Command, Option
from bake.options.shared import (
    ACCEPT_LICENCE,
    BAKE,
    BASE,
    COMMIT_MESSAGE,
    CREATE_PR,
    DIRECTION_SITE,
    DIRECTORY,
    FILE,
    FINDING,
    LAYER_OFFSET,
    MEMORY,
    MODEL,
    OUTPUT,
    OVERWRITE,
    PROMPTS,
    PUBLIC,
    READ_AT,
    REVISION,
    SITES,
    STATISTIC,
)

ON_THE_HUB = REVISION.but(help="branch, tag or commit on the Hub")

CALIBRATE = Command(
    "calibrate",
    "measure the activation norm of every layer",
    "Measure how long activations are, which decides how strongly a layer is pushed. bake export "
    "does it by itself; a saved result goes in with --calibration.",
    (
        MODEL,
        OUTPUT.but(help="JSON file", metavar="FILE"),
        PROMPTS,
        READ_AT,
        STATISTIC,
        REVISION,
        *MEMORY,
    ),
)

DIRECTION = Command(
    "direction",
    "find a direction from contrast pairs, convert one, or show what one says",
    "Find one direction per layer that separates the positive from the negative texts of contrast "
    "pairs, and say how well it separates pairs that it was not found from.",
    (
        MODEL,
        Option(
            "pairs",
            "JSONL, JSON, CSV or a set (see bake prompts list)",
            required=True,
            metavar="FILE",
        ),
        OUTPUT.but(help="safetensors file", metavar="FILE"),
        *FINDING,
        Option(
            "layers", "layers to find it in, such as 3,5-8", shown="all of them", metavar="LIST"
        ),
        Option("neutral", "prompts that optimize leaves alone", default="neutral", metavar="FILE"),
        READ_AT.but(
            help="where activations are read; auto: where bake export pushes on this model",
            choices=SITES,
        ),
        REVISION,
        *MEMORY,
    ),
    epilog="bake direction convert FILE --output FILE writes one in another tool's format, bake direction "
    "show FILE --model MODEL shows what one says; see their --help",
)

CONVERT = Command(
    "direction convert",
    "write a direction in another tool's format",
    "Write a direction in another tool's format, with its own lengths: .gguf for llama.cpp's "
    "--control-vector and repeng, .npy and .npz for numpy, .safetensors for bake.",
    (
        FILE,
        OUTPUT.but(help="its suffix names the format", metavar="FILE"),
        LAYER_OFFSET,
        DIRECTION_SITE,
        Option("model_hint", "GGUF: the architecture, such as llama", metavar="NAME"),
        Option("layers", "how many the model has", int, metavar="N", excludes="size"),
        Option("model", "the model, whose config says how many", metavar="MODEL", excludes="size"),
    ),
)

SHOW = Command(
    "direction show",
    "show what a direction says",
    "Show what a direction says: the tokens it raises and lowers most through the model's final "
    "norm and unembedding, its cosines to other directions, and how well it separates pairs.",
    (
        FILE.but(help="direction file, or bake-demo"),
        Option("model", "path, Hub id, or bake-demo", metavar="MODEL"),
        REVISION,
        Option(
            "compare",
            "other directions: their cosines to it",
            default=(),
            shown="",
            metavar="FILE",
            many="listed",
        ),
        Option("tokens", "how many of each kind", int, default=10, metavar="N"),
        LAYER_OFFSET,
        DIRECTION_SITE,
    ),
)

INSPECT = Command(
    "inspect",
    "say which sites and routes are exact here, and why others are not",
    "From the config alone: the places where a push could go, how the bias that takes it comes to "
    "exist, what that changes, and which engines read it. No weight is read.",
    (
        MODEL.but(default="", shown="", excludes="what"),
        Option(
            "all",
            "every architecture of the installed transformers, on its default configuration (minutes)",
            bool,
            excludes="what",
        ),
        REVISION,
    ),
)

VERIFY = Command(
    "verify",
    "prove a baked directory or a published bake again, or ask a server whether it serves it",
    "Prove a baked directory, or a published bake by its id, again. With --endpoint: ask an "
    "OpenAI-compatible server to continue the canary of the directory's bake.json, and say whether "
    "it serves the bake or the base. Exit code 3 where it is not the bake.",
    (
        BAKE.but(name="directory", default="."),
        ON_THE_HUB,
        BASE,
        Option("endpoint", "a server, as http://localhost:8000/v1", metavar="URL"),
        Option("model", "what the server calls the model", metavar="NAME"),
        *(option.but(choices=option.choices and ("auto",)) for option in MEMORY),
    ),
)

PUBLISH = Command(
    "publish",
    "publish a baked directory to the Hub",
    "One commit with everything, compared after it arrived. Base shards without a change are copied"
    " on the Hub where the base lies there. After a break, run it again: nothing is sent twice.",
    (
        DIRECTORY,
        Option("repo_id", "such as your-name/your-model", metavar="REPO_ID", positional=True),
        PUBLIC,
        Option(
            "revision",
            "branch to commit to, made where there is none",
            shown="main",
            metavar="BRANCH",
        ),
        CREATE_PR,
        COMMIT_MESSAGE,
        ACCEPT_LICENCE,
        Option(
            "verify_remote",
            "download what was published and prove it, loaded by its id in a fresh process; a thin bake's "
            "card then says so, in a second commit",
            bool,
        ),
        Option(
            "strengths",
            "also put these multipliers on branches (0.5,1.5: m0.5 and m1.5; below zero written "
            "--strengths=-1,1), each proven before it is sent; only the slots' shard is sent for each",
            metavar="M,…",
        ),
        BASE.but(help="the base, for these proofs"),
    ),
)

PROMPT_SETS = Command(
    "prompts",
    "list or show the prompt sets and contrast pairs",
    "The sets that ship: their names can be given to --prompts, --pairs, --held-out, --openings and"
    " --neutral.",
    (
        Option(
            "action",
            "list: every set; show NAME: print one",
            metavar="ACTION",
            choices=("list", "show"),
            positional=True,
        ),
    ),
)

SETS = Command(
    "prompts list",
    "every set that ships: name, kind, count, purpose",
    "List the sets that ship.",
    (),
)

SET = Command(
    "prompts show",
    "print a set: texts, or pairs as two lines + and -",
    "Print a set: texts, or pairs as two lines + and -.",
    (
        Option("name", "a name from bake prompts list", metavar="NAME", positional=True),
        Option("limit", "only the first N", int, shown="all", metavar="N"),
    ),
)

DIFF = Command(
    "diff",
    "which tensors, config keys and files differ, and by how much",
    "Compare two checkpoints byte for byte; of those on the Hub, headers and the bytes of files "
    "whose hash differs.",
    (
        BASE.but(help="path, Hub id, or bake-demo", shown="", metavar="BASE", positional=True),
        Option("baked", "path or Hub id", metavar="BAKED", positional=True),
        Option("base_revision", "of a base on the Hub", metavar="REV"),
        REVISION.but(help="of a baked model on the Hub"),
    ),
)

REPRODUCE = Command(
    "reproduce",
    "build a bake again from its bake.json and compare every file",
    "Build a bake again, from its bake.json, its direction and its base, in a temporary directory, "
    "and compare every file's bytes. Exit code 3 where one differs.",
    (
        BAKE,
        BASE,
        ON_THE_HUB,
        Option(
            "calibrate",
            "measure the norms again, on FILE or the set that the bake names, and say how they differ",
            default=False,
            bare=True,
            metavar="FILE",
        ),
    ),
)

RESCALE = Command(
    "rescale",
    "give a baked directory another strength",
    "New bytes for the slots, in place; nothing else moves. Not verified until bake verify has run again.",
    (
        DIRECTORY,
        Option(
            "multiplier",
            "the new strength m; negative reverses",
            float,
            required=True,
            metavar="M",
            short="-m",
        ),
    ),
)

UNDO = Command(
    "undo",
    "write the base of a bake, from the bake alone",
    "Write the base that a bake was made from, with nothing but the bake: the tensors that it added"
    " are left out, those that it patched get their old values back, and so does config.json.",
    (BAKE, OUTPUT, OVERWRITE, ON_THE_HUB),
)

DEMO = Command(
    "demo",
    "the whole pipeline on the small model that ships in the package",
    "Bake the shipped direction at m = 1 and −1, prove both, and compare text that base and bakes "
    "write. Nothing is downloaded; it takes less than a minute.",
    (OUTPUT.but(help="keep the two checkpoints here", required=False), OVERWRITE),
)
