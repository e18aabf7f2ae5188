"""The commands: parse, call, print. Results on stdout, progress and logs on stderr.

Nothing heavy is imported until a command runs, so `bake --help` is instant.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bake import __version__, direction_commands
from bake.errors import BakeError, EquivalenceError
from bake.results import print_result as _print

DESCRIPTION = "Turn a steering direction into ordinary weights: plain transformers, no hooks."
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


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of every command."""
    parser = argparse.ArgumentParser(prog="bake", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"bake {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_export(commands)
    _add_direction(commands)
    _add_calibrate(commands)
    _add_inspect(commands)
    _add_sweep(commands)
    _add_verify(commands)
    _add_publish(commands)
    _add_prompts(commands)
    _add_diff(commands)
    _add_reproduce(commands)
    _add_rescale(commands)
    _add_undo(commands)
    _add_demo(commands)
    for name in ("direction", "calibrate", "sweep", "verify"):
        _add_placement(commands.choices[name])
    for command in commands.choices.values():
        command.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code: 0 done, 1 a known error, 2 usage, 3 not equivalent."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if direction_commands.is_command(words):
        parsed = direction_commands.build_parser(words[1]).parse_args(words[2:])
    else:
        parsed = build_parser().parse_args(words)
    try:
        return int(parsed.run(parsed))
    except BakeError as error:
        print(f"bake: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("bake: interrupted; nothing was left behind", file=sys.stderr)
        return 130


def _add_export(commands: Any) -> None:
    command = commands.add_parser(
        "export",
        help="bake a direction into a checkpoint",
        description="Measure, decide, write and prove: one directory that plain transformers loads.",
    )
    command.set_defaults(run=_run_export)
    # Options that are not given stay out of the namespace, so that a recipe file can supply them.
    option = lambda *names, **kwargs: command.add_argument(  # noqa: E731
        *names, default=argparse.SUPPRESS, **kwargs
    )
    option("model", metavar="MODEL", nargs="?", help="path, Hub id, or bake-demo")
    option(
        "--recipe", metavar="FILE", help="YAML with any of these options; options given here win"
    )
    option(
        "--direction",
        action="append",
        metavar="FILE[:STRENGTH]",
        help="a direction: safetensors, .gguf, .npy, .npz, .pt, a rotalabs-steer folder, "
        "FILE:TENSOR[INDEX] of an autoencoder's decoder, or bake-demo; repeated, their sum, each with its "
        "strength",
    )
    option(
        "--orthogonalize",
        action="store_true",
        help="take from each of several directions what those before it hold",
    )
    option("--layer-offset", type=int, metavar="N", help="added to the layers the file names (0)")
    option(
        "--direction-site", choices=SITES[1:], help="where a file's direction was found (mlp_out)"
    )
    option("--keep-scale", action="store_true", help="α = m·‖v‖, the vector's own length, no law")
    option("--pairs", metavar="FILE", help="find the direction from contrast pairs: JSONL or a set")
    option("--output", "-o", metavar="DIR", help="directory to write; must not exist")
    option("--overwrite", action="store_true", help="replace the output directory when done")
    option("--revision", metavar="REV", help="branch, tag or commit of a Hub model")
    option(
        "--shards",
        choices=SHARDS,
        help="base shards without a change: copy (cloned where the file system can; the default), or "
        "link to the base's files, also in the Hub's cache. A hard link is the same file twice: "
        "writing into one changes both. A symbolic link breaks when the base is moved or deleted. "
        "Patched shards are always copies",
    )
    option(
        "--thin",
        action="store_true",
        help="read no weights and write no base shards: only the new biases, index, config and card, "
        "not verified until the base's shards are beside them (needs --direction and --calibration)",
    )
    option(
        "--multiplier",
        "-m",
        type=_multiplier,
        metavar="M",
        help="strength m; negative reverses (1.0). auto: a short sweep, and the largest shift that stays "
        "within bake sweep's bounds",
    )
    option("--band", metavar="A:B", help="layers to push, per cent of the depth (40:90)")
    option("--law", choices=LAWS, help="how α follows from μ (inverse-sqrt-d: α = m·μ/√d)")
    option("--coefficients", metavar="L=α,…", help="explicit α per layer instead of a law")
    option("--site", choices=SITES, help="where the push is added (auto)")
    option(
        "--route",
        choices=ROUTES,
        help="how the bias comes to exist: already there, by a config flag, in another stock architecture "
        "that computes the same, or in extra layers, which auto never adds (auto)",
    )
    option("--slot", choices=("norm", "projection"), help="which bias takes it where both can")
    option(
        "--target",
        choices=ENGINES,
        help="only a route that is known to survive in this engine (default: any; it is announced where "
        "the chosen one survives)",
    )
    option("--convert-site", action="store_true", help="use a residual direction at an input site")
    _add_finding(command.add_argument_group("with --pairs"))
    option("--prompts", metavar="FILE", help="calibration prompts: text, JSONL or a set (neutral)")
    option("--calibration", metavar="FILE", help="norms from bake calibrate instead of measuring")
    option("--statistic", choices=("mean", "median"), help="what μ is of the token norms (mean)")
    option("--sweep", metavar="DIR", help="a bake sweep of this bake: its figures go into the card")
    option("--device-map", choices=("auto",), help="spread weights over GPUs, CPU and disk")
    option(
        "--max-memory", metavar="SIZES", help="weights kept in memory: 600MB, or 0=20GB,cpu=60GB"
    )
    option("--dtype", choices=("float32", "float16", "bfloat16"), help="store the checkpoint so")
    option("--allow-rounding", action="store_true", help="accept a dtype too coarse for the push")
    option(
        "--estimate",
        action="store_true",
        help="say what it would cost (bytes, memory, passes, time) from headers alone; write nothing",
    )
    option("--push-to-hub", metavar="REPO_ID", help="publish when proven (private)")
    option("--public", action="store_true", help="with --push-to-hub: make the repo public")
    option("--create-pr", action="store_true", help="with --push-to-hub: open a pull request")
    option("--commit-message", metavar="TEXT", help="with --push-to-hub (Publish the baked model)")
    option("--accept-licence", action="store_true", help=f"with --push-to-hub: {ACCEPT_LICENCE}")


def _add_direction(commands: Any) -> None:
    command = commands.add_parser(
        "direction",
        help="find a direction from contrast pairs, convert one, or show what one says",
        epilog="bake direction convert FILE --output FILE writes one in another tool's format, bake "
        "direction show FILE --model MODEL shows what one says; see their --help",
    )
    command.set_defaults(run=_run_direction)
    command.add_argument("model", metavar="MODEL", help="path, Hub id, or bake-demo")
    command.add_argument(
        "--pairs",
        required=True,
        metavar="FILE",
        help="JSONL, CSV or a set (see bake prompts list)",
    )
    command.add_argument("--output", "-o", required=True, metavar="FILE", help="safetensors file")
    _add_finding(command)
    command.add_argument(
        "--layers", metavar="LIST", help="layers to find it in, such as 3,5-8 (all of them)"
    )
    command.add_argument(
        "--neutral",
        default="neutral",
        metavar="FILE",
        help="prompts optimize leaves alone (neutral)",
    )
    command.add_argument("--site", choices=SITES[1:], default="mlp_out", help="(mlp_out)")
    command.add_argument("--revision", metavar="REV", help="branch, tag or commit of a Hub model")


def _add_finding(command: Any) -> None:
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
    option("--seed", type=int, metavar="N", help="of dividing the pairs, and of optimize (0)")
    option("--steps", type=int, metavar="N", help="of optimize, at most (150)")
    option(
        "--kl-weight", type=float, metavar="W", help="of optimize: cost of changing the rest (0.3)"
    )


def _add_calibrate(commands: Any) -> None:
    command = commands.add_parser("calibrate", help="measure the activation norm of every layer")
    command.set_defaults(run=_run_calibrate)
    command.add_argument("model", metavar="MODEL", help="path, Hub id, or bake-demo")
    command.add_argument("--output", "-o", required=True, metavar="FILE", help="JSON file")
    command.add_argument(
        "--prompts", default="neutral", metavar="FILE", help="text, JSONL or a set (neutral)"
    )
    command.add_argument("--site", choices=SITES[1:], default="mlp_out", help="(mlp_out)")
    command.add_argument("--statistic", choices=("mean", "median"), default="mean", help="(mean)")
    command.add_argument("--revision", metavar="REV", help="branch, tag or commit of a Hub model")


def _add_inspect(commands: Any) -> None:
    command = commands.add_parser(
        "inspect", help="say which sites and routes are exact here, and why others are not"
    )
    command.set_defaults(run=_run_inspect)
    which = command.add_mutually_exclusive_group(required=True)
    which.add_argument("model", metavar="MODEL", nargs="?", help="path, Hub id, or bake-demo")
    which.add_argument(
        "--all",
        action="store_true",
        help="every architecture of the installed transformers, on its default configuration (minutes)",
    )
    command.add_argument("--revision", metavar="REV", help="branch, tag or commit of a Hub model")


def _add_sweep(commands: Any) -> None:
    command = commands.add_parser(
        "sweep",
        help="measure what a direction does at each strength, and what it costs",
        description="Hooks on one loaded model: shift, fluency and side effects at each multiplier, with "
        "random directions beside them; report.json, figures and the operating window. The same "
        "command again goes on after a break.",
    )
    command.set_defaults(run=_run_sweep)
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
    option("--law", nargs="+", default=["inverse-sqrt-d"], choices=LAWS, help="one or more laws")
    option("--pairs", metavar="FILE", help="held-out contrast pairs, not those it was found from")
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
    option("--seed", type=int, default=0, metavar="N", help="of the sampling noise (0)")
    option("--revision", metavar="REV", help="branch, tag or commit of a Hub model")


def _multiplier(text: str) -> float | str:
    return text if text == "auto" else float(text)


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def _add_verify(commands: Any) -> None:
    command = commands.add_parser(
        "verify",
        help="prove a baked directory or a published bake again, or ask a server whether it serves it",
        description="Prove a baked directory, or a published bake by its id, again. With --endpoint: ask "
        "an OpenAI-compatible server to continue the canary of the directory's bake.json, and say whether "
        "it serves the bake or the base. Exit code 3 where it is not the bake.",
    )
    command.set_defaults(run=_run_verify)
    command.add_argument("directory", metavar="DIR|REPO_ID", nargs="?", default=".", help="(.)")
    command.add_argument("--revision", metavar="REV", help="branch, tag or commit on the Hub")
    command.add_argument(
        "--base", metavar="MODEL", help="the base (default: as bake.json names it)"
    )
    command.add_argument("--endpoint", metavar="URL", help="a server, as http://localhost:8000/v1")
    command.add_argument("--model", metavar="NAME", help="what the server calls the model")


def _add_placement(command: Any) -> None:
    command.add_argument(
        "--device-map", choices=("auto",), help="spread weights over GPUs, CPU and disk"
    )
    command.add_argument(
        "--max-memory", metavar="SIZES", help="weights kept in memory: 600MB, or 0=20GB,cpu=60GB"
    )


def _add_publish(commands: Any) -> None:
    command = commands.add_parser(
        "publish",
        help="publish a baked directory to the Hub",
        description="One commit with everything, compared after it arrived. Base shards without a change "
        "are copied on the Hub where the base lies there. After a break, run it again: nothing is sent "
        "twice.",
    )
    command.set_defaults(run=_run_publish)
    command.add_argument("directory", metavar="DIR")
    command.add_argument("repo_id", metavar="REPO_ID")
    command.add_argument("--public", action="store_true", help="make the repo public (private)")
    command.add_argument(
        "--revision", metavar="BRANCH", help="branch to commit to, made where there is none (main)"
    )
    command.add_argument(
        "--create-pr", action="store_true", help="open a pull request instead of committing"
    )
    command.add_argument("--commit-message", metavar="TEXT", help="(Publish the baked model)")
    command.add_argument("--accept-licence", action="store_true", help=ACCEPT_LICENCE)
    command.add_argument(
        "--verify-remote",
        action="store_true",
        help="download what was published and prove it, loaded by its id in a fresh process; a thin bake's "
        "card then says so, in a second commit",
    )
    command.add_argument(
        "--strengths",
        metavar="M,…",
        help="also put these multipliers on branches (0.5,1.5: m0.5 and m1.5), each proven before it is "
        "sent; only the slots' shard is sent for each",
    )
    command.add_argument(
        "--base",
        metavar="MODEL",
        help="the base, for these proofs (default: as bake.json names it)",
    )


def _add_prompts(commands: Any) -> None:
    command = commands.add_parser("prompts", help="list or show the prompt sets and contrast pairs")
    actions = command.add_subparsers(dest="action", metavar="ACTION", required=True)
    listing = actions.add_parser("list", help="every set that ships: name, kind, count, purpose")
    listing.set_defaults(run=_run_prompts_list)
    showing = actions.add_parser("show", help="print a set: texts, or pairs as two lines + and -")
    showing.set_defaults(run=_run_prompts_show)
    showing.add_argument("name", metavar="NAME", help="a name from bake prompts list")
    showing.add_argument("--limit", type=int, metavar="N", help="only the first N (all)")
    for action in (listing, showing):
        # Suppressed, or the default here would undo a --json that was given before the action.
        action.add_argument(
            "--json", action="store_true", default=argparse.SUPPRESS, help="print one JSON object"
        )


def _add_diff(commands: Any) -> None:
    command = commands.add_parser(
        "diff",
        help="which tensors, config keys and files differ, and by how much",
        description="Compare two checkpoints byte for byte; of those on the Hub, headers and the bytes of "
        "files whose hash differs.",
    )
    command.set_defaults(run=_run_diff)
    command.add_argument("base", metavar="BASE", help="path, Hub id, or bake-demo")
    command.add_argument("baked", metavar="BAKED", help="path or Hub id")
    command.add_argument("--base-revision", metavar="REV", help="of a base on the Hub")
    command.add_argument("--revision", metavar="REV", help="of a baked model on the Hub")


def _add_reproduce(commands: Any) -> None:
    command = commands.add_parser(
        "reproduce", help="build a bake again from its bake.json and compare every file"
    )
    command.set_defaults(run=_run_reproduce)
    command.add_argument("model", metavar="DIR|REPO_ID")
    command.add_argument("--base", metavar="MODEL", help="the base (as bake.json names it)")
    command.add_argument("--revision", metavar="REV", help="branch, tag or commit on the Hub")
    command.add_argument(
        "--calibrate", metavar="SET", help="also measure the norms again and say how they differ"
    )


def _add_rescale(commands: Any) -> None:
    command = commands.add_parser(
        "rescale",
        help="give a baked directory another strength",
        description="New bytes for the slots, in place; nothing else moves. Not verified until bake verify "
        "has run again.",
    )
    command.set_defaults(run=_run_rescale)
    command.add_argument("directory", metavar="DIR")
    command.add_argument("--multiplier", "-m", type=float, required=True, metavar="M")


def _add_undo(commands: Any) -> None:
    command = commands.add_parser("undo", help="write the base of a bake, from the bake alone")
    command.set_defaults(run=_run_undo)
    command.add_argument("model", metavar="DIR|REPO_ID")
    command.add_argument("--output", "-o", required=True, metavar="DIR", help="must not exist")
    command.add_argument("--overwrite", action="store_true", help="replace what is there")
    command.add_argument("--revision", metavar="REV", help="branch, tag or commit on the Hub")


def _add_demo(commands: Any) -> None:
    command = commands.add_parser(
        "demo", help="the whole pipeline on the small model that ships in the package"
    )
    command.set_defaults(run=_run_demo)
    command.add_argument("--output", "-o", metavar="DIR", help="keep the two checkpoints here")
    command.add_argument("--overwrite", action="store_true", help="replace what is there")


def _run_export(parsed: argparse.Namespace) -> int:
    from bake import cost, pipeline, recipe, report, thin

    words = ("run", "command", "json", "recipe", "estimate")
    given = {k: v for k, v in vars(parsed).items() if k not in words}
    path, only = getattr(parsed, "recipe", None), hasattr(parsed, "estimate")
    wanted = (
        recipe.read_recipe(Path(path), given, without_output=only)
        if path
        else recipe.make_recipe(given, without_output=only)
    )
    if only:
        estimate = cost.estimate_cost(wanted)
        _print(parsed, estimate.to_dict(), report.describe_estimate(estimate))
    elif wanted.thin:
        added = thin.export_thin(wanted)
        _print(parsed, added.to_dict(), report.describe_thin(added))
    else:
        result = pipeline.export(wanted)
        _print(parsed, result.to_dict(), report.describe_export(result))
    return 0


def _run_direction(parsed: argparse.Namespace) -> int:
    from bake import api, coefficients, extraction, report, separation

    given = {k: v for k, v in vars(parsed).items() if k not in ("run", "command", "json")}
    if given["layers"] is not None:
        given["layers"] = coefficients.parse_layers(given["layers"])
    direction = api.extract_direction(given.pop("model"), **given)
    found = separation.read_separation(direction)
    text = f"{report.describe_direction(direction, found)}\n\nwritten to {parsed.output}"
    _print(parsed, {"output": parsed.output, **extraction.plain_values(direction)}, text)
    return 0


def _run_calibrate(parsed: argparse.Namespace) -> int:
    from bake import api, report

    norms = api.calibrate(
        parsed.model,
        output=parsed.output,
        prompts=parsed.prompts,
        site=parsed.site,
        statistic=parsed.statistic,
        revision=parsed.revision,
        device_map=parsed.device_map,
        max_memory=parsed.max_memory,
    )
    text = f"{report.describe_norms(norms)}\n\nwritten to {parsed.output}"
    _print(parsed, {"output": parsed.output, **norms.to_dict()}, text)
    return 0


def _run_inspect(parsed: argparse.Namespace) -> int:
    from bake import api, report

    if parsed.all:
        entries = api.inspect_all()
        values = {"architectures": [entry.to_dict() for entry in entries]}
        _print(parsed, values, report.describe_catalogue(entries))
        return 0
    anatomy = api.inspect(parsed.model, revision=parsed.revision)
    _print(parsed, anatomy.to_dict(), report.describe_anatomy(anatomy))
    return 0


def _run_sweep(parsed: argparse.Namespace) -> int:
    from bake import trial

    words = ("run", "command", "json")
    options = {key: value for key, value in vars(parsed).items() if key not in words}
    for one, many in (("band", "bands"), ("site", "sites"), ("law", "laws")):
        options[many] = tuple(options.pop(one))
    found = trial.sweep(trial.TrialOptions(**options))
    _print(parsed, found.to_dict(), trial.describe(found))
    return 0


def _run_verify(parsed: argparse.Namespace) -> int:
    from bake import api, report

    if parsed.endpoint:
        checked = api.verify_endpoint(parsed.endpoint, parsed.model, directory=parsed.directory)
        _print(parsed, checked.to_dict(), checked.describe())
        return 0 if checked.verdict == "baked" else EquivalenceError.exit_code
    if parsed.model:
        raise BakeError("--model is what a server calls the model; it goes with --endpoint URL")
    verification = api.verify(
        parsed.directory,
        base=parsed.base,
        revision=parsed.revision,
        device_map=parsed.device_map,
        max_memory=parsed.max_memory,
    )
    equivalence = verification.equivalence
    _print(parsed, verification.to_dict(), report.describe_equivalence(equivalence))
    equivalence.raise_if_failed()
    return 0


def _run_publish(parsed: argparse.Namespace) -> int:
    from bake import api
    from bake.hub.strengths import parse_strengths

    publication = api.publish(
        parsed.directory,
        parsed.repo_id,
        public=parsed.public,
        revision=parsed.revision,
        create_pr=parsed.create_pr,
        commit_message=parsed.commit_message,
        accept_licence=parsed.accept_licence,
        verify_remote=parsed.verify_remote,
        strengths=parse_strengths(parsed.strengths) if parsed.strengths is not None else (),
        base=parsed.base,
    )
    _print(parsed, publication.to_dict(), publication.describe())
    return 0


def _run_prompts_list(parsed: argparse.Namespace) -> int:
    from bake import prompt_sets, report

    sets = prompt_sets.list_sets()
    _print(parsed, {"sets": [found.to_dict() for found in sets]}, report.describe_sets(sets))
    return 0


def _run_prompts_show(parsed: argparse.Namespace) -> int:
    from bake import prompt_sets, report

    shown = prompt_sets.show_set(parsed.name, parsed.limit)
    _print(parsed, shown.to_dict(), report.describe_set(shown))
    return 0


def _run_diff(parsed: argparse.Namespace) -> int:
    from bake import api, compare

    found = api.diff(
        parsed.base,
        parsed.baked,
        base_revision=parsed.base_revision,
        revision=parsed.revision,
    )
    _print(parsed, found.to_dict(), compare.describe(found))
    return 0


def _run_reproduce(parsed: argparse.Namespace) -> int:
    from bake import api, reproduction

    found = api.reproduce(
        parsed.model, base=parsed.base, revision=parsed.revision, calibrate=parsed.calibrate
    )
    _print(parsed, found.to_dict(), reproduction.describe(found))
    found.raise_if_different()
    return 0


def _run_rescale(parsed: argparse.Namespace) -> int:
    from bake import api

    found = api.rescale(parsed.directory, multiplier=parsed.multiplier)
    text = (
        f"{found.directory}: m = {found.before:g} is now m = {found.multiplier:g}; new bytes in "
        f"{', '.join(found.files)}\nnot verified at this strength: bake verify {found.directory}"
    )
    _print(parsed, found.to_dict(), text)
    return 0


def _run_undo(parsed: argparse.Namespace) -> int:
    from bake import api

    found = api.undo(
        parsed.model, output=parsed.output, overwrite=parsed.overwrite, revision=parsed.revision
    )
    text = (
        f"{found.output}: {found.base} with its {found.tensors} tensors; {found.dropped} of the bake's "
        f"dropped, {len(found.restored)} patched ones restored; "
        f"{len(found.whole_files)} weight files as they were, byte for byte"
    )
    _print(parsed, found.to_dict(), text)
    return 0


def _run_demo(parsed: argparse.Namespace) -> int:
    from bake.demo import showcase

    result = showcase.run(Path(parsed.output) if parsed.output else None, parsed.overwrite)
    _print(parsed, result.to_dict(), showcase.describe(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
