"""Prompts: what files may hold, which tokens are content, how batches are padded."""

import contextlib
import json
import shutil

import pytest
import torch
from conftest import PROMPTS, byte_tokenizer
from transformers import AddedToken

from bake.errors import CheckpointError, PromptError
from bake.texts.prompts import (
    Encoded,
    encode,
    load_tokenizer,
    make_batches,
    read_prompts,
    without_prefix,
)
from bake.texts.rows import read_rows


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def texts_of(lengths):
    return [
        Encoded(
            tuple(range(3, 3 + n)), (False, *[True] * (n - 1)), tuple((i, i + 1) for i in range(n))
        )
        if n
        else Encoded((), (), ())
        for n in lengths
    ]


def test_jsonl_prompts(prompts_file):
    assert read_prompts(prompts_file) == PROMPTS


def test_plain_text_prompts_are_one_a_line(tmp_path):
    path = write(tmp_path / "prompts.txt", "First one.\n\n  \nThe second, “quoted”.\n")
    assert read_prompts(path) == ["First one.", "The second, “quoted”."]


def test_blank_lines_of_jsonl_are_skipped_and_keep_their_numbers(tmp_path):
    path = write(tmp_path / "p.jsonl", '{"text": "a"}\n\n{"text": "b"}\n')
    assert read_rows(path) == [("p.jsonl:1", {"text": "a"}), ("p.jsonl:3", {"text": "b"})]


@pytest.mark.parametrize("name", ["neutral", "equivalence", "openings"])
def test_shipped_sets_have_names(name):
    assert len(read_prompts(name)) >= 10


def test_shipped_sets_share_no_prompt():
    assert not set(read_prompts("neutral")) & set(read_prompts("equivalence"))


def test_missing_file_names_the_shipped_sets(tmp_path):
    with pytest.raises(PromptError, match=r"'.*nowhere.txt'; .*one of: .*neutral"):
        read_prompts(tmp_path / "nowhere.txt")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{text: a}", "p.jsonl:2 is not JSON"),
        ('"just a string"', "p.jsonl:2 is not a JSON object"),
        ('{"prompt": "a"}', "p.jsonl:2 has no 'text' string"),
        ('{"text": 5}', "p.jsonl:2 has no 'text' string"),
    ],
)
def test_malformed_line_is_named(tmp_path, line, message):
    path = write(tmp_path / "p.jsonl", json.dumps({"text": "fine"}) + "\n" + line + "\n")
    with pytest.raises(PromptError, match=message):
        read_prompts(path)


@pytest.mark.parametrize(("name", "content"), [("p.jsonl", ""), ("p.txt", "\n  \n")])
def test_file_without_a_prompt_is_refused(tmp_path, name, content):
    with pytest.raises(PromptError, match="holds no prompts"):
        read_prompts(write(tmp_path / name, content))


def test_file_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "p.txt"
    path.write_bytes(b"\xff\xfe\x00broken")
    with pytest.raises(PromptError, match="cannot be read as UTF-8"):
        read_prompts(path)


def test_directory_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="has no tokenizer that transformers can load"):
        load_tokenizer(tmp_path)


def test_tokenizer_of_a_checkpoint_loads(llama):
    assert load_tokenizer(llama)("ab")["input_ids"] == byte_tokenizer()("ab")["input_ids"]


def test_position_0_and_special_tokens_are_no_content():
    (text,) = encode(byte_tokenizer(), ["ab</s>c<pad>"])
    assert text.ids == (1, *text.ids[1:3], 2, text.ids[4], 0)
    assert text.content == (False, True, True, False, True, False)
    assert text.offsets == ((0, 0), (0, 1), (1, 2), (2, 6), (6, 7), (7, 12))


def test_position_0_is_no_content_without_a_special_token_either():
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = None
    (text,) = encode(tokenizer, ["abc"])
    assert len(text.ids) == 3
    assert text.content == (False, True, True)


def test_chat_template_tokens_are_no_content():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("<|turn|>", special=True)])
    (text,) = encode(tokenizer, ["a<|turn|>b"])
    assert len(text.ids) == 4
    assert text.content == (False, True, False, True)


def test_long_texts_are_cut():
    short, cut = encode(byte_tokenizer(), ["a" * 9, "a" * 30], max_tokens=10)
    assert len(short.ids) == len(cut.ids) == 10
    assert cut.ids == short.ids
    assert len(encode(byte_tokenizer(), ["a" * 600])[0].ids) == 512


def test_empty_text_has_no_content():
    (text,) = encode(byte_tokenizer(), [""])
    assert text.ids == (1,)
    assert not any(text.content)


@pytest.mark.parametrize("budget", [1, 10, 24, 50, 10_000])
def test_batches_cover_every_text_once_within_the_budget(budget):
    lengths = [3, 9, 4, 9, 1, 20, 5, 3]
    batches = make_batches(texts_of(lengths), batch_tokens=budget)
    seen = [index for batch in batches for index in batch.indices]
    assert sorted(seen) == list(range(len(lengths)))
    for batch in batches:
        # One text that is longer than the whole budget still has to run, alone.
        assert batch.input_ids.numel() <= budget or len(batch.indices) == 1
        assert [int(row.sum()) for row in batch.attention_mask] == [
            lengths[i] for i in batch.indices
        ]


def test_budget_decides_how_many_batches_there_are():
    texts = texts_of([5] * 12)
    assert [len(make_batches(texts, batch_tokens=n)) for n in (5, 10, 20, 60)] == [12, 6, 3, 1]


def test_batches_do_not_mix_lengths_needlessly():
    batches = make_batches(texts_of([20, 2, 19, 3]), batch_tokens=40)
    assert [sorted(batch.indices) for batch in batches] == [[1, 3], [0, 2]]


def test_empty_texts_are_left_out():
    (batch,) = make_batches(texts_of([0, 4, 0]))
    assert batch.indices == (1,)
    assert make_batches(texts_of([0])) == []


@pytest.mark.parametrize(
    ("side", "ids", "mask", "positions", "content"),
    [
        ("right", [3, 4, 0, 0], [1, 1, 0, 0], [0, 1, 0, 0], [False, True, False, False]),
        ("left", [0, 0, 3, 4], [0, 0, 1, 1], [0, 0, 0, 1], [False, False, False, True]),
    ],
)
def test_padding_side(side, ids, mask, positions, content):
    (batch,) = make_batches(texts_of([4, 2]), padding_side=side)
    assert batch.indices == (1, 0)
    assert batch.input_ids.tolist() == [ids, [3, 4, 5, 6]]
    assert batch.attention_mask.tolist() == [mask, [1, 1, 1, 1]]
    assert batch.position_ids.tolist() == [positions, [0, 1, 2, 3]]
    assert batch.content_mask.tolist() == [content, [False, True, True, True]]


def test_inputs_are_what_a_forward_takes():
    (batch,) = make_batches(texts_of([3]))
    inputs = batch.inputs()
    assert sorted(inputs) == ["attention_mask", "input_ids", "position_ids"]
    assert all(tensor.dtype == torch.long for tensor in inputs.values())


def test_what_editors_and_languages_put_into_files(tmp_path):
    """A byte order mark, Windows line ends, and U+2028, which is no line end inside a JSON string."""
    path = tmp_path / "p.jsonl"
    path.write_bytes('\ufeff{"text": "one\u2028line"}\r\n{"text": "two"}\r\n'.encode())
    assert read_prompts(path) == ["one\u2028line", "two"]
    path = tmp_path / "p.txt"
    path.write_bytes("\ufeffone\r\ntwo\r\n".encode())
    assert read_prompts(path) == ["one", "two"]


def test_a_text_that_begins_with_the_beginning_of_sequence_gets_no_other_one():
    tokenizer = byte_tokenizer()
    assert tokenizer("<s>abc")["input_ids"][:2] == [1, 1]  # What the tokenizer does by itself.
    plain, marked = encode(tokenizer, ["abc", "<s>abc"])
    assert marked.ids == plain.ids
    assert marked.content == plain.content
    assert marked.offsets == ((0, 0), (3, 4), (4, 5), (5, 6))
    cut, marked_cut = encode(tokenizer, ["a" * 30, "<s>" + "a" * 30], max_tokens=10)
    assert marked_cut.ids == cut.ids
    assert without_prefix(tokenizer, "<s>abc") == "abc"


def test_a_tokenizer_that_puts_nothing_first_leaves_the_text_as_it_is():
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = None
    (text,) = encode(tokenizer, ["<s>ab"])
    assert text.ids[0] == 1
    assert text.offsets == ((0, 3), (3, 4), (4, 5))
    assert without_prefix(tokenizer, "<s>ab") == "<s>ab"


def copy_model(llama, tmp_path, **config):
    directory = tmp_path / "copy"
    shutil.copytree(llama, directory)
    values = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**values, **config}))
    return directory


def test_a_tokenizer_beyond_the_embedding_names_both_sizes(llama, tmp_path):
    with pytest.raises(CheckpointError, match=r"tokenizer has 259 tokens and .*embedding 100 rows"):
        load_tokenizer(copy_model(llama, tmp_path, vocab_size=100))


def test_an_added_token_beyond_the_embedding_is_said_and_its_text_refused(llama, tmp_path, capsys):
    directory = copy_model(llama, tmp_path)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("<image>", special=True)])
    tokenizer.save_pretrained(directory)
    loaded = load_tokenizer(directory)
    assert "tokenizer has 260 tokens" in (said := capsys.readouterr().err)
    assert "embedding 259 rows" in said
    assert len(encode(loaded, ["fine"])) == 1
    with pytest.raises(
        CheckpointError, match=r"makes token 259 \(<image>\) of 'a<image>'.*259 rows"
    ):
        encode(loaded, ["a<image>"])


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"model": 5}', "[" * 5000, '{"model": {"type": "BPE"}}']
)
def test_a_broken_tokenizer_is_one_line(llama, tmp_path, content):
    directory = copy_model(llama, tmp_path)
    (directory / "tokenizer.json").write_text(content)
    says = r"has no tokenizer that transformers can load|tokenizer\.json (is not|cannot be read)"
    with pytest.raises(CheckpointError, match=says) as caught:
        load_tokenizer(directory)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "5",
        '{"tokenizer_class": 5}',
        '{"added_tokens_decoder": [1]}',
        '{"bos_token": {"a": 1}}',
    ],
)
def test_a_tokenizer_config_of_wrong_types_is_one_line_or_none(llama, tmp_path, content):
    directory = copy_model(llama, tmp_path)
    (directory / "tokenizer_config.json").write_text(content)
    with contextlib.suppress(CheckpointError):  # Anything else is a traceback.
        load_tokenizer(directory)


def test_a_panic_of_the_tokenizers_library_is_one_line():
    class PanicException(BaseException):
        """Named as the one that Rust's panics become, which is no Exception."""

    class Panicking:
        is_fast = True
        all_special_ids = all_special_tokens = ()
        added_tokens_decoder: dict = {}  # noqa: RUF012

        def __call__(self, *_, **__):
            raise PanicException("called `Option::unwrap()` on a `None` value\nat src/lib.rs")

    with pytest.raises(
        CheckpointError, match=r"fails \(called `Option::unwrap\(\)` on a `None` value\)"
    ):
        encode(Panicking(), ["a"])
