"""What base and bake write: which openings, and where a text ends."""

import json

from bake.anatomy.base import open_base
from bake.cli.main import main
from bake.io.shipped import DEMO_NAME
from bake.models.forward import continue_greedily, load_model
from bake.proof.observation import WRITTEN
from bake.proof.samples import choose_openings, collect_samples, decode_written
from bake.texts.prompts import read_prompts


def test_openings_of_one_length_share_a_batch(open_tiny):
    tokenizer = open_tiny("llama").tokenizer
    chosen = choose_openings(tokenizer)
    assert len(chosen) == 3
    assert len({len(opening.ids) for opening in chosen}) == 1
    assert {opening.text for opening in chosen} <= set(read_prompts("openings"))


def test_a_chat_model_is_asked(open_tiny):
    tokenizer = open_tiny("llama").tokenizer
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<a>"
    try:
        chosen = choose_openings(tokenizer)
    finally:
        tokenizer.chat_template = None
    assert {opening.text for opening in chosen} <= set(read_prompts("requests"))
    assert tokenizer.decode(list(chosen[0].ids)).endswith(f"{chosen[0].text}<a>")


def test_text_ends_before_the_first_special_token(open_tiny):
    tokenizer = open_tiny("llama").tokenizer
    ids = tokenizer("abc", add_special_tokens=False)["input_ids"]
    assert decode_written(tokenizer, [*ids, tokenizer.eos_token_id, *ids]) == "abc"


def test_nothing_written_is_no_sample(open_tiny):
    tokenizer = open_tiny("llama").tokenizer
    assert collect_samples(tokenizer, choose_openings(tokenizer), [], []) == ()


def test_a_bake_records_what_the_written_checkpoint_writes(tmp_path, capsys):
    output = tmp_path / "out"
    assert main(["export", DEMO_NAME, "--direction", DEMO_NAME, "-o", str(output)]) == 0
    printed = capsys.readouterr().out
    samples = json.loads((output / "bake.json").read_text())["equivalence"]["samples"]
    assert len(samples) == 3
    assert any(sample["base"] != sample["baked"] for sample in samples)
    base = open_base(DEMO_NAME)
    openings = choose_openings(base.tokenizer)
    for name, folder in (("base", base.checkpoint.directory), ("baked", output)):
        loaded = load_model(folder, dtype="float32")
        written = continue_greedily(loaded, [opening.ids for opening in openings], WRITTEN)
        texts = [decode_written(base.tokenizer, ids) for ids in written]
        assert [sample[name] for sample in samples] == texts
    for sample in samples:
        assert f"> {sample['opening']}" in printed
        assert " ".join(sample["baked"].split()) in printed
