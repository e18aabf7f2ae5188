"""The options of the commands beside `bake export` and `bake sweep`."""

from __future__ import annotations

from bake.options.declaration import Command, Option
from bake.options.shared import (
    ACCEPT_LICENCE,
    AFTERWARDS,
    BAKE,
    BAKING,
    BASE,
    COMMIT_MESSAGE,
    CREATE_PR,
    DIRECTION_SITE,
    DIRECTIONS,
    DIRECTORY,
    FILE,
    FINDING,
    HELP,
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
    heading=BAKING,
    examples=("bake calibrate HuggingFaceTB/SmolLM2-135M-Instruct -o norms.json",),
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
    heading=DIRECTIONS,
    examples=(
        "bake direction HuggingFaceTB/SmolLM2-135M-Instruct --pairs formal-casual -o formal.safetensors",
    ),
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
        Option(
            "push",
            "FILE is a bake, a directory or Hub id: its push α·û of every layer, which steers as the bake "
            "does at scale 1",
            bool,
        ),
        Option("model_hint", "GGUF: the architecture, such as llama", metavar="NAME"),
        Option("layers", "how many the model has", int, metavar="N", excludes="size"),
        Option("model", "the model, whose config says how many", metavar="MODEL", excludes="size"),
    ),
    heading=DIRECTIONS,
    examples=(
        "bake direction convert formal.safetensors -o formal.gguf --layers 30",
        "bake direction convert SmolLM2-135M-Instruct-formal -o formal.gguf --push",
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
    heading=DIRECTIONS,
    examples=(
        "bake direction show formal.safetensors --model HuggingFaceTB/SmolLM2-135M-Instruct",
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
    heading=BAKING,
    examples=("bake inspect HuggingFaceTB/SmolLM2-135M-Instruct",),
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
    heading=AFTERWARDS,
    examples=(
        "bake verify SmolLM2-135M-Instruct-formal",
        "bake verify SmolLM2-135M-Instruct-formal --endpoint http://localhost:8000/v1 --model steered",
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
    heading=AFTERWARDS,
    examples=("bake publish SmolLM2-135M-Instruct-formal you/SmolLM2-135M-Instruct-formal",),
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
    heading=DIRECTIONS,
)

SETS = Command(
    "prompts list",
    "every set that ships: name, kind, count, purpose",
    "List the sets that ship.",
    (),
    heading=DIRECTIONS,
    examples=("bake prompts list",),
)

SET = Command(
    "prompts show",
    "print a set: texts, or pairs as two lines + and -",
    "Print a set: texts, or pairs as two lines + and -.",
    (
        Option("name", "a name from bake prompts list", metavar="NAME", positional=True),
        Option("limit", "only the first N", int, shown="all", metavar="N"),
    ),
    heading=DIRECTIONS,
    examples=("bake prompts show formal-casual --limit 3",),
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
    heading=AFTERWARDS,
    examples=("bake diff HuggingFaceTB/SmolLM2-135M-Instruct SmolLM2-135M-Instruct-formal",),
)

DETECT = Command(
    "detect",
    "what was baked into a stranger's checkpoint",
    "Read pushes and ablations out of a checkpoint's weights, whatever it says of itself: beside its base "
    "where one is given, else only what a model of its family cannot have by itself. Of checkpoints on the "
    "Hub only parts are read. Exit code 0 whatever is found; --json has the verdict.",
    (
        Option("suspect", "path or Hub id", metavar="SUSPECT", positional=True),
        Option("base", "what it was made of: path, Hub id, or bake-demo", metavar="BASE"),
        Option(
            "against",
            "directions, or folders of them: whose direction it is, and in which sum",
            default=(),
            shown="",
            metavar="FILE",
            many="listed",
        ),
        Option(
            "measure",
            "run the base (else the suspect, without the push) over PROMPTS, or the neutral set: relative "
            "influence, the law and m that fit, and tokens; the weights are downloaded",
            bare="neutral",
            metavar="PROMPTS",
        ),
        Option("output", "where the direction that was found goes", metavar="FILE", short="-o"),
        Option(
            "undo",
            "write the suspect without what was found: with its base's values, or without what was created",
            metavar="DIR",
        ),
        REVISION.but(help="of a suspect on the Hub"),
        Option("base_revision", "of a base on the Hub", metavar="REV"),
    ),
    heading=AFTERWARDS,
    examples=(
        "bake detect SmolLM2-135M-Instruct-formal --base HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
)

QUANTISATIONS = (
    "F16",
    "BF16",
    "Q8_0",
    "Q6_K",
    "Q5_K_M",
    "Q5_K_S",
    "Q4_K_M",
    "Q4_K_S",
    "Q4_0",
    "IQ4_XS",
    "Q3_K_M",
    "Q3_K_S",
    "Q2_K",
)
GGUF = Command(
    "gguf",
    "a bake as a file for llama.cpp, Ollama and LM Studio",
    "Write a bake as a GGUF file by llama.cpp's own converter and quantiser, and run base and bake in "
    "llama.cpp beside transformers: the file is written where the push is in it. Beside it go an Ollama "
    "Modelfile and LM Studio's folders. Exit code 3 where it does not steer as the bake does.",
    (
        BAKE,
        OUTPUT.but(help="GGUF file", metavar="FILE"),
        Option(
            "quantize",
            "one of llama-quantize's kinds: " + ", ".join(QUANTISATIONS),
            shown="as the weights",
            choices=QUANTISATIONS,
            metavar="KIND",
        ),
        Option(
            "llama_cpp",
            "llama.cpp's checkout, in which it was built, or llama-cpp-python's unpacked source",
            shown="what is on PATH",
            metavar="DIR",
        ),
        Option("base", "what it was made of, where the bake alone cannot tell", metavar="BASE"),
        OVERWRITE.but(help="replace FILE"),
        ON_THE_HUB,
        Option("base_revision", "of a base on the Hub", metavar="REV"),
    ),
    heading=AFTERWARDS,
    examples=(
        "bake gguf SmolLM2-135M-Instruct-formal -o formal.gguf --llama-cpp llama.cpp",
        "bake gguf SmolLM2-135M-Instruct-formal -o formal-q4.gguf --quantize Q4_K_M --llama-cpp llama.cpp",
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
    heading=AFTERWARDS,
    examples=("bake reproduce SmolLM2-135M-Instruct-formal",),
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
    heading=AFTERWARDS,
    examples=("bake rescale casual -m -0.2",),
)

UNDO = Command(
    "undo",
    "write the base of a bake, from the bake alone",
    "Write the base that a bake was made from, with nothing but the bake: the tensors that it added"
    " are left out, those that it patched get their old values back, and so does config.json.",
    (BAKE, OUTPUT, OVERWRITE, ON_THE_HUB),
    heading=AFTERWARDS,
    examples=("bake undo SmolLM2-135M-Instruct-formal -o base-again",),
)

DEMO = Command(
    "demo",
    "the whole pipeline on the small model that ships in the package",
    "Bake the shipped direction at m = 1 and −1, prove both, and compare text that base and bakes "
    "write. Nothing is downloaded; it takes less than a minute.",
    (OUTPUT.but(help="keep the two checkpoints here", required=False), OVERWRITE),
    heading=HELP,
    examples=("bake demo",),
)

COMPLETION = Command(
    "completion",
    "print the script that completes commands and options",
    "Print a shell's completion script; add its output to what your shell reads at start, such as "
    "bake completion bash >> ~/.bashrc",
    (
        Option(
            "shell", "your shell", metavar="SHELL", choices=("bash", "zsh", "tcsh"), positional=True
        ),
    ),
    heading=HELP,
    examples=("bake completion bash",),
)
