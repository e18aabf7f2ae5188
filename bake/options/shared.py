"""Options that several commands have."""

from __future__ import annotations

from bake.options.declaration import Option

# What commands stand under in the overview.
BAKING, DIRECTIONS = "bake a model", "directions and texts"
HEARING = "hear it first"
AFTERWARDS, HELP = "check, publish, change", "try and set up"
SITES = ("auto", "mlp_out", "attn_out", "attn_in", "mlp_in")
ROUTES = ("auto", "native", "flag", "host", "insert")
LAWS = ("inverse-sqrt-d", "sqrt-d", "norm", "flat")
ENGINES = ("transformers", "vllm", "sglang", "llama.cpp", "ollama", "lm-studio", "mlx")

MODEL = Option("model", "path, Hub id, or bake-demo", metavar="MODEL", positional=True)
BAKE = Option(
    "model", "a baked directory, or its id on the Hub", metavar="DIR|REPO_ID", positional=True
)
DIRECTORY = Option("directory", "what bake export wrote", metavar="DIR", positional=True)
FILE = Option("file", "any direction that bake export takes", metavar="FILE", positional=True)
REVISION = Option("revision", "branch, tag or commit of a Hub model", metavar="REV")
BASE = Option("base", "the base", metavar="MODEL", shown="default: as bake.json names it")
OUTPUT = Option(
    "output", "directory to write; must not exist", metavar="DIR", short="-o", required=True
)
OVERWRITE = Option("overwrite", "replace what is there", bool)
DEVICE_MAP = Option(
    "device_map",
    "auto: spread weights over GPUs, CPU and disk; tp: shard every layer over the processes of accelerate "
    "launch (transformers' tensor parallelism)",
    choices=("auto", "tp"),
)
MAX_MEMORY = Option(
    "max_memory", "weights kept in memory: 600MB, or 0=20GB,cpu=60GB", metavar="SIZES"
)
MEMORY = (DEVICE_MAP, MAX_MEMORY)
PROMPTS = Option(
    "prompts", "calibration prompts: text, JSONL or a set", default="neutral", metavar="FILE"
)
STATISTIC = Option(
    "statistic", "which average of the token norms μ is", default="mean", choices=("mean", "median")
)
READ_AT = Option("site", "where activations are read", default="mlp_out", choices=SITES[1:])
LAYER_OFFSET = Option(
    "layer_offset", "added to the layers that the file names", int, shown="0", metavar="N"
)
DIRECTION_SITE = Option(
    "direction_site", "where the file's direction was found", shown="mlp_out", choices=SITES[1:]
)
CHAT_TEMPLATE = Option(
    "chat_template",
    "make prompts messages and completions replies where the tokenizer has a template",
    default="auto",
    choices=("auto", "never"),
)
ACCEPT_LICENCE = Option(
    "accept_licence",
    "you have read the base's terms and may publish this where bake would refuse: a public push from a "
    "gated or licence-less base, or a name or file that its licence asks for",
    bool,
)
PUBLIC = Option("public", "make the repository public", bool, shown="private")
CREATE_PR = Option("create_pr", "open a pull request instead of committing", bool)
COMMIT_MESSAGE = Option(
    "commit_message", "the commit's title", shown="Publish the baked model", metavar="TEXT"
)
# How contrast pairs become a direction.
FINDING = (
    Option(
        "method",
        "difference of means, principal component of the differences, linear probe, or what gradient "
        "descent finds to raise the positive completions' likelihood",
        default="mean",
        choices=("mean", "pca", "probe", "optimize"),
    ),
    Option(
        "token",
        "the token position that is read: a completion's last token, the mean over its tokens, an index "
        "such as -2, or all of the text's tokens",
        default="last",
        metavar="POSITION",
    ),
    Option("from_layer", "use layer L's direction in every layer", int, metavar="L"),
    CHAT_TEMPLATE,
    Option(
        "held_out",
        "pairs that say how well it separates (else the pairs themselves, divided)",
        metavar="FILE",
    ),
    Option(
        "seed", "random seed: of dividing the pairs, and of optimize", int, default=0, metavar="N"
    ),
    Option("steps", "most steps of optimize", int, default=150, metavar="N"),
    Option(
        "kl_weight",
        "what optimize pays for changing neutral text",
        float,
        default=0.3,
        metavar="W",
    ),
)
