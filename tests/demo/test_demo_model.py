"""The model that ships: its files, its text, what it has learnt, and the data that steers it."""

import json
import math
import re
from collections import Counter
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bake.demo import MODEL
from bake.demo.grammar import (
    MOOD_SHARES,
    generate_documents,
    iterate_documents,
    load_grammar,
)
from bake.demo.train import Recipe, encode_documents, perplexity, train

CALIBRATION = Path(__file__).parents[2] / "calibration"
FRESH_SEED = 31_415_926  # used nowhere else: the text is new to the model
SIZE_LIMIT = 6_000_000


def read_lines(name: str) -> list[dict[str, str]]:
    lines = (CALIBRATION / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def read_words(name: str) -> set[str]:
    lines = (CALIBRATION / "words" / name).read_text(encoding="utf-8").splitlines()
    return {line for line in lines if line and not line.startswith("#")}


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def documents():
    return generate_documents(2000, FRESH_SEED)


# The files


def test_all_files_together_are_small():
    files = [path for path in MODEL.iterdir() if path.is_file()]
    files += [path for path in CALIBRATION.rglob("*") if path.is_file()]
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "LICENSE"} <= {
        path.name for path in files
    }
    assert sum(path.stat().st_size for path in files) <= SIZE_LIMIT


def test_model_is_a_stock_llama_without_biases_and_loads_cleanly():
    model, info = AutoModelForCausalLM.from_pretrained(MODEL, output_loading_info=True)
    assert not any(info.values()), info
    assert model.config.model_type == "llama"
    assert model.config.num_hidden_layers >= 8
    assert not model.config.mlp_bias
    assert not model.config.attention_bias
    assert not [name for name, _ in model.named_parameters() if name.endswith("bias")]


def test_tokenizer_round_trips_text_and_marks_its_beginning(tokenizer, documents):
    texts = [document.text for document in documents[:100]]
    texts += ["Ünïcode – “quotes”, 3.14 € and 日本語", "  two  spaces\nand a line break\n"]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.bos_token_id not in ids[1:]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    assert len(special) == 3
    assert None not in special


# The text


def test_grammar_is_deterministic_and_its_seeds_differ():
    assert generate_documents(50, 7) == generate_documents(50, 7)
    assert generate_documents(50, 7) == list(islice(iterate_documents(7), 50))
    assert not {d.text for d in generate_documents(500, 7)} & {
        d.text for d in generate_documents(500, 8)
    }


def test_mood_shares_are_as_promised(documents):
    counts = Counter(document.mood for document in documents)
    for mood, share in MOOD_SHARES.items():
        # Four standard deviations of a binomial share.
        tolerance = 4 * math.sqrt(share * (1 - share) / len(documents))
        assert counts[mood] / len(documents) == pytest.approx(share, abs=tolerance)


def test_target_words_follow_the_mood_and_openings_have_none(documents):
    targets = {"cheerful": read_words("cheerful.txt"), "gloomy": read_words("gloomy.txt")}
    assert not targets["cheerful"] & targets["gloomy"]
    frequency = {}
    for mood in MOOD_SHARES:
        words = [word for d in documents if d.mood == mood for word in words_of(d.text)]
        frequency[mood] = {
            side: sum(word in target for word in words) / len(words)
            for side, target in targets.items()
        }
    for side, other in (("cheerful", "gloomy"), ("gloomy", "cheerful")):
        assert frequency[side][side] > 10 * frequency["neutral"][side]
        assert frequency[side][side] > 10 * frequency[side][other]
        # A moody story is still a story: most of its words are of no mood.
        assert 0.03 < frequency[side][side] < 0.15


def test_words_without_a_mood_are_not_counted():
    grammar = load_grammar()
    targets = read_words("cheerful.txt") | read_words("gloomy.txt")
    neutral = [grammar[table] for table in ("people", "words", "sentences", "story", "review")]
    neutral += [slot["neutral"] for slot in grammar["mood"].values()]
    patterns = " ".join(leaves(neutral))
    assert not targets & set(words_of(re.sub(r"\{\w+\}", " ", patterns)))


def leaves(table):
    """The texts at the ends of nested mappings and sequences."""
    if isinstance(table, str):
        yield table
    else:
        for value in table.values() if isinstance(table, dict) else table:
            yield from leaves(value)


# What the model has learnt


def test_held_out_perplexity_is_beyond_word_counts(model, tokenizer, documents):
    """Far below what the frequencies of single tokens and of token pairs can reach."""
    rows = encode_documents(tokenizer, [document.text for document in documents])
    training, test = rows[200:], rows[:200]
    unigrams = Counter(token for row in training for token in row[1:])
    bigrams = Counter(pair for row in training for pair in pairwise(row))
    heads = Counter(token for row in training for token in row[:-1])
    total, size = unigrams.total(), len(tokenizer)

    def unigram(token):
        return (unigrams[token] + 1) / (total + size)

    def bigram(previous, token):
        # Smoothed with the unigram, which does the pair no harm where it was seen.
        return (bigrams[previous, token] + unigram(token)) / (heads[previous] + 1)

    pairs = [pair for row in test for pair in pairwise(row)]
    by_unigram = math.exp(-sum(math.log(unigram(token)) for _, token in pairs) / len(pairs))
    by_bigram = math.exp(-sum(math.log(bigram(*pair)) for pair in pairs) / len(pairs))
    by_model = perplexity(model, tokenizer, [document.text for document in documents[:200]])
    assert by_model < 0.05 * by_unigram
    assert by_model < 0.6 * by_bigram
    assert by_model < 4.0


@torch.inference_mode()
def continuation_loss(model, tokenizer, prompt: str, continuation: str) -> float:
    """Mean cross-entropy of the continuation's tokens after the prompt."""
    start = len(tokenizer(prompt)["input_ids"])
    ids = torch.tensor([tokenizer(prompt + continuation)["input_ids"]])
    log_probabilities = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    chosen = log_probabilities.gather(1, ids[0, 1:, None])[start - 1 :]
    return -chosen.mean().item()


@pytest.mark.parametrize(("mood", "other"), [("cheerful", "gloomy"), ("gloomy", "cheerful")])
def test_mood_is_carried_over_a_neutral_sentence(model, tokenizer, mood, other):
    """A document's mood tells how it goes on, though a neutral sentence stands in between."""
    before = {
        "cheerful": "Anna opened the shop at nine. She felt happy and smiled. "
        "Her aunt found a lost coin and laughed.",
        "gloomy": "Anna opened the shop at nine. She felt sad and sighed. "
        "Her aunt dropped the cup in the mud and cried.",
    }
    after = {
        "cheerful": [" The news was wonderful.", " Everyone next door looked glad."],
        "gloomy": [" The news was terrible.", " Everyone next door looked lonely."],
    }
    for fitting, unfitting in zip(after[mood], after[other], strict=True):
        prompt = before[mood] + " The bus to Milton left at ten."
        assert continuation_loss(model, tokenizer, prompt, fitting) < continuation_loss(
            model, tokenizer, prompt, unfitting
        )


# The data that steers it


def test_calibration_files_hold_what_they_promise():
    assert len(read_lines("prompts/neutral.jsonl")) >= 64
    assert len(read_lines("prompts/toy-neutral.jsonl")) >= 64
    assert len(read_lines("prompts/equivalence.jsonl")) == 16
    assert len(read_lines("prompts/openings.jsonl")) >= 48
    assert len(read_lines("pairs/toy-cheerful-gloomy.jsonl")) >= 120
    assert len(read_lines("pairs/toy-cheerful-gloomy.held-out.jsonl")) >= 40
    targets = read_words("cheerful.txt") | read_words("gloomy.txt")
    for name in ("neutral", "toy-neutral", "equivalence", "openings"):
        for line in read_lines(f"prompts/{name}.jsonl"):
            assert line["text"].endswith((".", "?", "!")), line
            assert not targets & set(words_of(line["text"])), line


def test_pairs_share_a_neutral_prompt_and_differ_in_mood():
    cheerful, gloomy = read_words("cheerful.txt"), read_words("gloomy.txt")
    for name in ("toy-cheerful-gloomy", "toy-cheerful-gloomy.held-out"):
        for pair in read_lines(f"pairs/{name}.jsonl"):
            assert not (cheerful | gloomy) & set(words_of(pair["prompt"])), pair
            assert not gloomy & set(words_of(pair["positive"])), pair
            assert not cheerful & set(words_of(pair["negative"])), pair
            for completion in (pair["positive"], pair["negative"]):
                assert completion.startswith(" "), pair


def test_held_out_data_is_new():
    training = read_lines("pairs/toy-cheerful-gloomy.jsonl")
    held_out = read_lines("pairs/toy-cheerful-gloomy.held-out.jsonl")
    prompts = [pair["prompt"] for pair in training + held_out]
    assert len(set(prompts)) == len(prompts)
    targets = read_words("cheerful.txt") | read_words("gloomy.txt")

    def mood_words(pairs):
        texts = (pair[side] for pair in pairs for side in ("positive", "negative"))
        return {word for text in texts for word in words_of(text)} & targets

    assert len(mood_words(held_out)) >= 20
    assert not mood_words(training) & mood_words(held_out)

    openings = [line["text"] for line in read_lines("prompts/openings.jsonl")]
    equivalence = {line["text"] for line in read_lines("prompts/equivalence.jsonl")}
    assert not equivalence & {line["text"] for line in read_lines("prompts/neutral.jsonl")}
    assert not set(openings) & set(prompts)
    # Every document that the shipped model was trained on.
    count = Recipe.steps * Recipe.batch_size
    seen = "\n".join(document.text for document in islice(iterate_documents(Recipe.seed), count))
    assert not [opening for opening in openings if opening in seen]


# The training


def test_training_is_reproducible_byte_for_byte(tmp_path):
    recipe = Recipe(
        steps=3,
        batch_size=4,
        layers=2,
        hidden_size=32,
        intermediate_size=64,
        tokenizer_documents=300,
        held_out_documents=20,
        samples=1,
    )
    first, second, other = (tmp_path / name for name in ("first", "second", "other"))
    assert train(recipe, first) == train(recipe, second)
    train(replace(recipe, seed=1), other)
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    # The comparison can fail: another seed gives other weights.
    weights = "model.safetensors"
    assert (first / weights).read_bytes() != (other / weights).read_bytes()
