"""`bake verify --endpoint`: which model a server runs, told by the canary; one line for what is wrong.

A small loopback server answers as servers do; real ones are test_servers_for_real's.
"""

from __future__ import annotations

import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from bake.cli.main import main
from bake.engines.endpoint import _judge, check_endpoint, count_votes

BAKED, BASE = " light fell on the beautiful field", " light fell on the cold field"
CANARY = {"prompt": "The", "baked": BAKED, "base": BASE}


@pytest.fixture
def directory(tmp_path):
    """What an endpoint check reads of a baked directory: its bake.json."""
    path = tmp_path / "baked"
    path.mkdir()
    values = {
        "version": 1, "base": {"id": "b", "revision": None}, "site": "mlp_out", "slot": {},
        "layers": [], "hidden_size": 4, "plan": {}, "files": {}, "equivalence": {"canary": CANARY},
    }  # fmt: skip
    (path / "bake.json").write_text(json.dumps(values))
    return path


class Server:
    """A loopback server: {path: (status, JSON or text)}; it remembers what it was asked."""

    def __init__(self, answers):
        self.asked, self.refuses, self.stock = [], None, False
        self.continues = None
        self.tells = None
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                length = int(self.headers["Content-Length"])
                body = json.loads(self.rfile.read(length))
                outer.asked.append((self.path, body))
                if outer.stock and "repetition_penalty" in body:
                    answers["/v1/completions"] = (
                        422, {"detail": "Unexpected keys in the request: {'repetition_penalty'}"}
                    )  # fmt: skip
                elif outer.stock:
                    answers["/v1/completions"] = (200, {"choices": [{"text": BAKED}]})
                if outer.continues is not None:
                    text = outer.continues(body["prompt"])
                    told = outer.tells(body["prompt"]) if outer.tells is not None else None
                    choice = {"text": text, **({"logprobs": told} if told else {})}
                    answers["/v1/completions"] = (200, {"choices": [choice]})
                if outer.refuses is not None:
                    value = body.get("logprobs")
                    refused = any(value is known for known in outer.refuses)
                    answers["/v1/completions"] = (
                        (400, {"error": "logprobs must be something else"})
                        if refused
                        else (200, {"choices": [{"text": BAKED}]})
                    )
                self.answer()

            def do_GET(self):
                self.answer()

            def answer(self):
                status, content = answers.get(self.path, (404, {"detail": "Not Found"}))
                body = content if isinstance(content, str) else json.dumps(content)
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def serve():
    """Return a function: answers → a running Server."""
    running = []

    def start(text=None, logprobs=None, **others):
        answers = {f"/v1/{path}": answer for path, answer in others.items()}
        if text is not None:
            answers["/v1/completions"] = (200, {"choices": [{"text": text, "logprobs": logprobs}]})
        running.append(Server(answers))
        return running[-1]

    yield start
    for server in running:
        server.close()


@pytest.fixture
def verify(directory, capsys):
    """Return a function: URL, options → (exit code, stdout, stderr)."""

    def call(url, *options, model="m", where=directory):
        command = ["verify", str(where), "--endpoint", url, "--model", model, *options]
        code = main(command)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.mark.parametrize(
    ("text", "verdict", "code"), [(BAKED, "baked", 0), (BASE, "base", 3), (" Hello", "neither", 3)]
)
def test_verdicts(serve, verify, text, verdict, code):
    server = serve(text)
    found, out, _ = verify(server.url, "--json")
    assert (found, json.loads(out)["verdict"]) == (code, verdict)
    _, out, _ = verify(server.url)
    assert out.splitlines()[1].startswith(f"{verdict}: ")
    assert repr(text) in out


def test_the_canary_is_asked_greedily_at_the_completions_endpoint(serve, verify):
    server = serve(BAKED)
    for url in (server.url, f"{server.url}/v1", f"{server.url}/v1/"):
        assert verify(url)[0] == 0
    path, body = server.asked[0]
    assert [asked for asked, _ in server.asked] == [path] * 3 == ["/v1/completions"] * 3
    assert (body["model"], body["prompt"], body["temperature"]) == ("m", "The", 0)


@pytest.mark.parametrize(
    "given",
    [
        {"token_logprobs": [None, -0.5, -1.5]},
        {"content": [{"id": 3, "logprob": -0.5}, {"id": 4, "logprob": -1.5}]},
    ],
)
def test_log_probabilities_where_the_server_gives_them(serve, verify, given):
    server = serve(BAKED, given)
    _, out, _ = verify(server.url, "--json")
    assert json.loads(out)["log_probability"] == -1.0
    assert "mean log-probability of its tokens: -1.000" in verify(server.url)[1]


def test_a_server_that_wants_a_switch_or_none_is_asked_again(verify):
    for refused in ([1], [1, True]):
        server = Server({})
        server.refuses = refused
        try:
            code, _, errors = verify(server.url)
            assert code == 0, errors
            asked = [body.get("logprobs") for _, body in server.asked]
            assert asked == [*refused, True if refused == [1] else None]
        finally:
            server.close()


def test_repetition_is_not_penalised_where_a_server_can_be_told(serve, verify):
    """vLLM takes Qwen's 1.05 from generation_config.json; OpenAI's own API has no such parameter."""
    server = serve(BAKED)
    assert verify(server.url)[0] == 0
    assert [body.get("repetition_penalty") for _, body in server.asked] == [1.0]
    server = serve(BAKED)
    server.stock = True
    code, _, errors = verify(server.url)
    assert code == 0, errors
    assert [body.get("repetition_penalty") for _, body in server.asked] == [1.0, None]
    assert [body.get("logprobs") for _, body in server.asked] == [1, 1]


@pytest.mark.parametrize("logprobs", [None, {}, {"token_logprobs": None}, {"content": [1]}, [0.1]])
def test_a_server_without_log_probabilities_is_judged_by_its_text(serve, verify, logprobs):
    code, out, _ = verify(serve(BAKED, logprobs).url)
    assert code == 0
    assert "gives no log-probabilities: judged by the text alone" in out


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        (BAKED.lstrip(), "baked"),  # Some servers strip.
        (BAKED + " and more", "baked"),  # Some write on.
        (BAKED[:-8], "baked"),  # Some stop early.
        (" light fell on the beautiful house", "baked"),  # A later near-tie flipped.
        (" light fell on the", "neither"),  # Too short to tell.
        (" light fell on the bed", "neither"),  # A first letter alone is chance.
        ("", "neither"),
        (BASE[:-3], "base"),
    ],
)
def test_what_makes_a_match(text, verdict):
    assert _judge(text, BAKED, BASE) == verdict


def test_a_continuation_that_begins_the_other_is_no_match_for_it():
    assert _judge(" light", " light", " light fell") == "neither"
    assert _judge(" light fell", " light", " light fell") == "base"


def test_of_a_published_bake_only_its_record_is_fetched(serve, verify, directory, monkeypatch):
    asked = []

    def fetch(model_id, **options):
        asked.append((model_id, options["revision"], options["allow_patterns"]))
        return str(directory)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    found, out, _ = verify(serve(BAKED).url, "--revision", "m1.5", where="org/steered")
    assert (found, out.splitlines()[1][:5]) == (0, "baked")
    assert asked == [("org/steered", "m1.5", ["bake.json"])]


class TestBadInput:
    """One line that names the thing and the remedy, exit 1."""

    def refuse(self, result):
        code, out, errors = result
        assert (code, out) == (1, "")
        (line,) = errors.splitlines()
        return line

    def test_a_dead_url(self, verify):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        line = self.refuse(verify(f"http://127.0.0.1:{port}/v1"))
        assert "no server answers at" in line
        assert "--endpoint" in line

    def test_no_url(self, verify):
        assert "is no http address" in self.refuse(verify("localhost:8000"))

    def test_a_wrong_model_name_lists_the_right_ones(self, serve, verify):
        server = serve(
            completions=(404, {"error": {"message": "The model `m` does not exist."}}),
            models=(200, {"data": [{"id": "org/right"}, {"id": "org/other"}]}),
        )
        line = self.refuse(verify(server.url))
        assert "has no model 'm'" in line
        assert "it has org/right, org/other" in line

    def test_a_wrong_model_name_where_nothing_is_listed(self, serve, verify):
        server = serve(completions=(500, "m is not a local folder\nand more"))
        line = self.refuse(verify(server.url))
        assert "refuses model 'm' (HTTP 500: m is not a local folder and more)" in line

    def test_a_chat_only_server(self, serve, verify):
        line = self.refuse(verify(serve().url))
        assert "does not exist on this server" in line
        assert "completions endpoint" in line

    @pytest.mark.parametrize("answer", ["<html>", "[]", "{}", '{"choices": []}'])
    def test_another_kind_of_server(self, serve, verify, answer):
        line = self.refuse(verify(serve(completions=(200, answer)).url))
        assert "OpenAI-compatible" in line

    def test_a_directory_without_a_canary(self, directory, serve, verify):
        values = json.loads((directory / "bake.json").read_text())
        values["equivalence"]["canary"] = None
        (directory / "bake.json").write_text(json.dumps(values))
        server = serve(BAKED)
        assert "has no canary" in self.refuse(verify(server.url))
        assert not server.asked

    def test_a_directory_that_bake_did_not_make(self, serve, verify, tmp_path):
        line = self.refuse(verify(serve(BAKED).url, where=tmp_path))
        assert "has no bake.json" in line

    def test_options_that_belong_together(self, directory, capsys):
        for options, code, named in (
            (["--endpoint", "http://x"], 2, "needs --model NAME"),
            (["--model", "m"], 1, "goes with --endpoint URL"),
        ):
            assert main(["verify", str(directory), *options]) == code
            assert named in capsys.readouterr().err


# How each server is started: (module that must be there, arguments; {port}, {model}).
FORKS = [
    {"prompt": f"Text {number} goes on", "baked": " warmly", "base": " cold"} for number in range(8)
]


@pytest.mark.parametrize(
    ("baked", "base", "verdict"),
    [
        (8, 0, "baked"),
        (5, 2, "baked"),
        (0, 8, "base"),
        (2, 6, "base"),
        (4, 3, "neither"),
        (1, 0, "neither"),
    ],
)
def test_forks_decide_by_a_vote(baked, base, verdict, serve):
    """Whatever the long text says: a quantised model writes another one after a few words."""
    server = serve("")
    said = [" warmly, and"] * baked + ["cold as"] * base + [" the"] * (8 - baked - base)
    answers = dict(zip((fork["prompt"] for fork in FORKS), said, strict=True))
    server.continues = lambda prompt: answers.get(prompt, " something else")
    found = check_endpoint(server.url, "m", CANARY, FORKS)
    assert found.verdict == verdict
    assert found.votes == {"baked": baked, "base": base, "other": 8 - baked - base}
    assert "perhaps quantised" in found.describe()
    assert all(body["max_tokens"] < 10 for _, body in server.asked[1:])


def test_word_for_word_nothing_is_said_of_quantisation(serve):
    server = serve("")
    server.continues = lambda prompt: BAKED if prompt == CANARY["prompt"] else " warmly"
    found = check_endpoint(server.url, "m", CANARY, FORKS)
    assert found.verdict == "baked"
    assert "quantised" not in found.describe()
    assert "of 8 places where base and bake part: 8 as baked" in found.describe()


def test_a_bake_without_forks_is_judged_by_its_text(serve):
    found = check_endpoint(serve(BAKED).url, "m", CANARY)
    assert (found.verdict, found.votes) == ("baked", {})


def test_most_votes_are_not_enough():
    assert count_votes({"baked": 3, "base": 0, "other": 4}) == "neither"
    assert count_votes({"baked": 4, "base": 2, "other": 0}) == "neither"
    assert count_votes({"baked": 0, "base": 2, "other": 4}) == "base"
    assert count_votes({"baked": 0, "base": 1, "other": 5}) == "neither"


TILTED = [
    {**fork, "tilt_base": -2.0 - number / 4, "tilt_baked": 3.0 + number / 2}
    for number, fork in enumerate(FORKS)
]


def completions_form(warm, cold):
    """As OpenAI, vLLM and llama-cpp-python tell it: a token with its space."""
    return {"top_logprobs": [{" warmly": warm, " cold": cold, " cold ": cold - 4, "the": -9.0}]}


def chats_form(warm, cold):
    """As llama-server and mlx_lm tell it."""
    pairs = ((" warmly", warm), ("cold", cold), (" the", -9.0))
    told = [{"token": token, "logprob": value, "bytes": []} for token, value in pairs]
    return {"content": [{"token": " warmly", "logprob": warm, "top_logprobs": told}]}


def vocabulary_s_form(warm, cold):
    """As mlx_lm tells it: the entry of the vocabulary, in which a space is another letter."""
    pairs = (("\u0120warmly", warm), ("\u2581cold", cold), ("the", -9.0))
    told = [{"id": 5, "token": token, "logprob": value} for token, value in pairs]
    return {"content": [{**told[0], "top_logprobs": told}]}


@pytest.mark.parametrize("form", [completions_form, chats_form, vocabulary_s_form])
@pytest.mark.parametrize(
    ("push", "verdict"),
    [(1.0, "baked"), (0.8, "baked"), (0.0, "base"), (-0.2, "base"), (0.5, "neither")],
)
def test_log_probabilities_say_how_much_of_the_push_is_served(push, verdict, form, serve):
    """The words are all another's, as where quantisation has moved what is nearly as likely."""
    server = serve("")
    tilts = {
        fork["prompt"]: fork["tilt_base"] + push * (fork["tilt_baked"] - fork["tilt_base"])
        for fork in TILTED
    }
    server.continues = lambda prompt: " neither"
    server.tells = lambda prompt: form(tilts[prompt] - 1, -1.0) if prompt in tilts else None
    found = check_endpoint(server.url, "m", CANARY, TILTED)
    assert found.verdict == verdict
    assert found.votes["other"] == 8
    assert found.share.push == pytest.approx(push)
    assert found.share.off == pytest.approx(0, abs=1e-9)
    assert f"it has {push:.0%} of the push" in found.describe()


def test_log_probabilities_of_another_model_are_neither_s(serve):
    server = serve("")
    tilts = {fork["prompt"]: 12.0 * (-1) ** number for number, fork in enumerate(TILTED)}
    server.continues = lambda prompt: " neither"
    server.tells = lambda prompt: completions_form(tilts.get(prompt, 0.0) - 1, -1.0)
    found = check_endpoint(server.url, "m", CANARY, TILTED)
    assert found.share.off > 1
    assert found.verdict == "neither"


def test_words_that_contradict_the_log_probabilities_leave_it_open(serve):
    server = serve("")
    server.continues = lambda prompt: " cold"
    server.tells = lambda prompt: completions_form(3.0, 0.0)
    found = check_endpoint(server.url, "m", CANARY, TILTED)
    assert (found.share.verdict, found.votes["base"]) == ("baked", 8)
    assert found.verdict == "neither"


@pytest.mark.parametrize(
    "told",
    [
        {"top_logprobs": [None]},
        {"top_logprobs": [{" warmly": "high", " cold": -1e9}]},
        {"top_logprobs": [{"a": -1.0, "b": -2.0}]},
        {"content": [{"top_logprobs": [{"token": 5, "logprob": -1.0}, "x"]}]},
        {"content": ["x"]},
        [],
    ],
)
def test_log_probabilities_that_tell_nothing_are_left_out(told, serve):
    server = serve("")
    server.continues = lambda prompt: " warmly"
    server.tells = lambda prompt: told
    found = check_endpoint(server.url, "m", CANARY, TILTED)
    assert (found.share, found.verdict) == (None, "baked")


def test_a_token_that_is_not_told_is_at_most_as_likely_as_the_last(serve):
    server = serve("")
    server.continues = lambda prompt: " warmly"
    server.tells = lambda prompt: {"top_logprobs": [{" warmly": -0.1, " the": -5.0}]}
    found = check_endpoint(server.url, "m", CANARY, TILTED)
    assert found.verdict == "baked"
    assert found.share.push > 0.65


def test_forks_of_older_bakes_are_counted_by_their_words(serve):
    server = serve("")
    server.continues = lambda prompt: " warmly"
    server.tells = lambda prompt: completions_form(-0.1, -5.0)
    assert check_endpoint(server.url, "m", CANARY, FORKS).share is None


def test_alternatives_are_asked_for_as_servers_want_it(serve):
    """OpenAI counts them in `logprobs`; mlx_lm switches that, and counts in `top_logprobs`."""
    server = serve("")
    server.refuses = [20, 10, 5, 1]
    check_endpoint(server.url, "m", CANARY, TILTED)
    assert [body.get("logprobs") for _, body in server.asked[:2]] == [1, True]
    asked = [(body["logprobs"], body.get("top_logprobs")) for _, body in server.asked[2:7]]
    assert asked == [(20, None), (10, None), (5, None), (1, None), (True, 10)]


def test_a_refusal_that_is_not_about_the_name_is_told(serve, verify):
    """llama-server takes any name, and lists its file."""
    server = serve(
        completions=(400, {"error": {"message": "the prompt is empty"}}),
        models=(200, {"data": [{"id": "file.gguf"}]}),
    )
    code, _, errors = verify(server.url)
    assert (code, "HTTP 400: the prompt is empty" in errors) == (1, True)


def test_tilts_that_no_model_has_are_left_out(serve):
    """bake.json is a stranger's: squares of such numbers are beyond what a float holds."""
    server = serve("")
    server.continues = lambda prompt: " warmly"
    server.tells = lambda prompt: completions_form(-0.1, -5.0)
    wild = [{**fork, "tilt_base": -1e300, "tilt_baked": 1e300} for fork in TILTED]
    found = check_endpoint(server.url, "m", CANARY, wild)
    assert (found.share, found.verdict) == (None, "baked")
