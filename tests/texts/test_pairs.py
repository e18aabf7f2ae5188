"""Contrast pairs: files of every shape, chat templates, and which tokens a completion is made of."""

import json

import pytest
from conftest import PAIRS, byte_tokenizer

from bake.errors import DirectionError, PromptError
from bake.texts.pair_tokens import encode_pairs
from bake.texts.pairs import ContrastPair, read_pairs

CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% if enable_thinking is defined and not enable_thinking %}"
    "(no thoughts){% endif %}{% endif %}"
)
ASKED = [{"role": "user", "content": "How was it?"}]


def chat_tokenizer(template=CHAT):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def write(path, rows):
    path.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    return path


def read_row(tmp_path, **row):
    (pair,) = read_pairs(write(tmp_path / "one.jsonl", [json.dumps(row)]))
    return pair


def spell(text, positions=None):
    """The characters of tokens: a byte is a token."""
    tokens = byte_tokenizer().convert_ids_to_tokens(list(text.ids))
    chosen = range(len(tokens)) if positions is None else positions
    return "".join(tokens[p] for p in chosen).replace("Ġ", " ")


def test_pairs_file(pairs_file):
    assert read_pairs(pairs_file) == [ContrastPair(**pair) for pair in PAIRS]


def test_prompt_may_be_left_out_and_notes_do_no_harm(tmp_path):
    assert read_row(tmp_path, positive="a", negative="b", id="7") == ContrastPair("", "a", "b")


def test_shipped_pairs_have_names():
    shipped = read_pairs("toy-cheerful-gloomy")
    assert len(shipped) > 50
    assert all(pair.positive != pair.negative for pair in shipped)


def test_csv_is_read_like_jsonl(tmp_path):
    rows = ["negative,prompt,positive", 'bad,"It was, ",good', '"b\n1",,"a ""1"""']
    found = read_pairs(write(tmp_path / "p.csv", rows))
    assert found == [ContrastPair("It was, ", "good", "bad"), ContrastPair("", 'a "1"', "b\n1")]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["good,bad", "a,b"], "header row has good, bad; a pairs file has the columns positive"),
        (["positive,negative", "a,b", "a,b,c"], "p.csv:3 has not the header's 2 columns"),
        (["positive,negative", "a"], "p.csv:2 has not the header's 2 columns"),
        (
            ["positive,negative,promt", "a,b,c"],
            "p.csv:2: unknown column 'promt'; a pair has prompt",
        ),
        (["positive,negative"], "holds no pairs"),
    ],
)
def test_malformed_csv_is_named(tmp_path, rows, message):
    with pytest.raises(PromptError, match=message):
        read_pairs(write(tmp_path / "p.csv", rows))


@pytest.mark.parametrize(
    ("line", "error", "message"),
    [
        ("{positive: a}", PromptError, "p.jsonl:2 is not JSON"),
        ('["a", "b"]', PromptError, "p.jsonl:2 is not a JSON object"),
        ('{"positive": 5, "negative": "b"}', PromptError, "p.jsonl:2: .* must be strings"),
        ('{"positive": "a", "negative": null}', PromptError, "p.jsonl:2: .* must be strings"),
        ('{"positive": "a"}', PromptError, "p.jsonl:2: no 'negative' text"),
        ('{"positive": " ", "negative": "b"}', DirectionError, "p.jsonl:2: an empty completion"),
        ('{"positive": "a", "negative": "a"}', DirectionError, "p.jsonl:2: .* identical"),
        ('{"positive": "a", "negative": "b", "text": "c"}', PromptError, "unknown column 'text'"),
        (
            '{"positive": [{"role": "user"}], "negative": "b"}',
            PromptError,
            "p.jsonl:2: messages must be a list",
        ),
        (
            '{"messages": [], "prompt": "x", "positive": "a", "negative": "b"}',
            PromptError,
            "give messages or a prompt, not both",
        ),
        (
            '{"positive": [{"role": "user", "content": "a"}], "negative": "b"}',
            PromptError,
            "the last messages are of user and assistant",
        ),
        ('{"positive": [], "negative": []}', DirectionError, "p.jsonl:2: an empty completion"),
    ],
)
def test_malformed_pair_is_named(tmp_path, line, error, message):
    fine = json.dumps({"positive": "a", "negative": "b"})
    with pytest.raises(error, match=message):
        read_pairs(write(tmp_path / "p.jsonl", [fine, line]))


def test_file_without_pairs_is_refused(tmp_path):
    with pytest.raises(PromptError, match="holds no pairs"):
        read_pairs(write(tmp_path / "p.jsonl", ["", " "]))


def test_missing_file_names_the_shipped_sets(tmp_path):
    with pytest.raises(PromptError, match=r"nowhere\.jsonl'; .*toy-cheerful-gloomy"):
        read_pairs(tmp_path / "nowhere.jsonl")


def test_completion_and_shared_prefix_of_plain_texts():
    (pair,) = encode_pairs(byte_tokenizer(), [ContrastPair("It was ", "good.", "glum.")])
    assert [spell(t, p) for t, p in zip(pair.texts, pair.completions, strict=True)] == [
        "good.",
        "glum.",
    ]
    assert pair.shared == len("<It was g")  # <s> counts as one, and the completions begin alike.


def test_one_text_that_begins_the_other_keeps_a_token_of_its_own():
    (pair,) = encode_pairs(byte_tokenizer(), [ContrastPair("", "abc", "abcd")])
    assert pair.shared == 3
    assert len(pair.texts[0].ids) == 4


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "How was it?", "positive": " Good.", "negative": " Bad."},
        {"messages": ASKED, "positive": "Good.", "negative": "Bad."},
        {
            "positive": [*ASKED, {"role": "assistant", "content": "Good."}],
            "negative": [*ASKED, {"role": "assistant", "content": "Bad."}],
        },
    ],
    ids=["prompt", "messages", "lists"],
)
def test_replies_stand_where_the_model_would_write_them(tmp_path, row, capsys):
    (pair,) = encode_pairs(chat_tokenizer(), [read_row(tmp_path, **row)])
    assert "chat template is applied" in capsys.readouterr().err
    opening = "<s>[user]How was it?</s>[assistant](no thoughts)"
    assert [spell(text) for text in pair.texts] == [f"{opening}Good.", f"{opening}Bad."]
    assert spell(pair.texts[0], pair.completions[0]) == "Good."
    assert spell(pair.texts[0], range(pair.shared)) == opening
    assert pair.texts[0].ids.count(1) == 1  # The template's <s>, and none from the tokenizer.


def test_a_users_last_message_is_read_where_it_stands(tmp_path):
    first, second = ([{"role": "user", "content": text}] for text in ("hi you", "hi all"))
    pair = read_row(tmp_path, messages=ASKED, positive=first, negative=second)
    (encoded,) = encode_pairs(chat_tokenizer(), [pair])
    assert spell(encoded.texts[0]).endswith("[user]hi you</s>")
    assert spell(encoded.texts[0], encoded.completions[0]) == "hi you"


def test_template_can_be_left_out():
    pairs = [ContrastPair("It was ", "good.", "bad.")]
    plain = encode_pairs(byte_tokenizer(), pairs)
    assert encode_pairs(chat_tokenizer(), pairs, chat_template="never") == plain
    assert encode_pairs(chat_tokenizer(), pairs) != plain
    whole = [ContrastPair("", "All good.", "All bad.")]  # Nobody says these: they stay as they are.
    assert encode_pairs(chat_tokenizer(), whole) == encode_pairs(byte_tokenizer(), whole)


def test_conversation_without_a_template_is_refused(tmp_path):
    pair = read_row(tmp_path, messages=ASKED, positive="a", negative="b")
    with pytest.raises(PromptError, match="pair 1 is a conversation and no chat template"):
        encode_pairs(byte_tokenizer(), [pair])
    with pytest.raises(PromptError, match="pair 1 is a conversation and no chat template"):
        encode_pairs(chat_tokenizer(), [pair], chat_template="never")


def test_messages_that_a_template_refuses_are_named(tmp_path):
    refusing = "{{ raise_exception('no system role here') }}"
    pair = read_row(tmp_path, messages=ASKED, positive="a", negative="b")
    with pytest.raises(PromptError, match=r"pair 1: .*\(roles: user\): no system role here"):
        encode_pairs(chat_tokenizer(refusing), [pair])


def test_tokenizer_without_offsets_finds_the_same_completions():
    class Slow:
        """A byte tokenizer that keeps its offsets to itself."""

        def __init__(self):
            self.inner = byte_tokenizer()
            self.is_fast = False

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def __call__(self, texts, **options):
            return self.inner(texts, **{**options, "return_offsets_mapping": False})

    pairs = [ContrastPair(**pair) for pair in PAIRS]
    slow, fast = encode_pairs(Slow(), pairs), encode_pairs(byte_tokenizer(), pairs)
    assert not any(stop for _, stop in slow[0].texts[0].offsets)
    assert [pair.completions for pair in slow] == [pair.completions for pair in fast]


def test_long_pairs_lose_the_beginning_of_their_prompt(capsys):
    pairs = [ContrastPair("abcdefghij", "KLM", "NO"), ContrastPair("a", "b", "c")]
    long, short = encode_pairs(byte_tokenizer(), pairs, limit=8)
    assert [spell(text) for text in long.texts] == ["<s>ghijKLM", "<s>ghijNO"]
    assert spell(long.texts[0], long.completions[0]) == "KLM"
    assert long.shared == 5
    assert spell(short.texts[0]) == "<s>ab"
    assert capsys.readouterr().err.count("1 of 2 pairs cut to the model's 8 positions") == 1


def test_completions_longer_than_the_model_keep_their_end():
    (pair,) = encode_pairs(byte_tokenizer(), [ContrastPair("ab", "cdefghijkl", "x")], limit=5)
    assert [spell(text) for text in pair.texts] == ["<s>ijkl", "<s>abx"]
    assert spell(pair.texts[0], pair.completions[0]) == "ijkl"
