"""`bake sweep --judge`: a served model scores what arms wrote; answers are kept, and how far they agree.

A loopback server answers as servers do. A real one is tried in `tests/engines/test_endpoint.py`.
"""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from bake.cli.main import main
from bake.errors import BakeError
from bake.sweeps.judge import make_judge, mean_scores, measure_agreement, read_score

QUESTION = "Is the text about the weather?"
SMALL = [
    *("sweep", "bake-demo", "--direction", "bake-demo", "--multipliers=1"),
    *("--control-seeds", "0", "--samples", "2", "--new-tokens", "12"),
]


class Loopback:
    """A chat server that answers by a function of (text, seed), and remembers what it was asked."""

    def __init__(self, answer):
        self.asked, self.keys = [], []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append((self.path, body))
                outer.keys.append(self.headers.get("Authorization"))
                content = body["messages"][0]["content"]
                text = content.partition("<text>\n")[2].partition("\n</text>")[0]
                status, said = 200, answer(text, body.get("seed"))
                if isinstance(said, tuple):
                    status, said = said
                values = {"choices": [{"message": {"role": "assistant", "content": said}}]}
                data = json.dumps(values if status == 200 else {"error": said}).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def do_GET(self):
                self.send_error(404)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def serve():
    """Return a function: what answers → a running server."""
    running = []

    def start(answer):
        running.append(Loopback(answer))
        return running[-1]

    yield start
    for each in running:
        each.server.shutdown()
        each.server.server_close()


@pytest.fixture
def sweep(tmp_path, capsys):
    """Return a function: the server's address, more words → (exit code, stderr, report)."""
    openings = tmp_path / "openings.txt"
    openings.write_text("The morning was\nIn the garden the old\nAt noon the\n")
    output = tmp_path / "sweep"

    def run(url, *words):
        judge = ("--judge", url, "--judge-model", "big", "--question", QUESTION)
        code = main([*SMALL, "--openings", str(openings), "-o", str(output), *judge, *words])
        report = output / "report.json"
        found = json.loads(report.read_text()) if report.exists() else None
        return code, capsys.readouterr(), found

    run.output = output
    return run


def test_replies_are_scored_and_compared(serve, sweep):
    # What counts the letters "e" tells one text from another, and the seeds apart.
    server = serve(lambda text, seed: f"I say {min(text.count('e') + seed, 10)}.")
    code, printed, report = sweep(server.url, "--html")
    assert code == 0
    assert len(server.asked) == 2 * 3 * 2 * 2  # arms × openings × samples × repeats
    log = (sweep.output / "measurements.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in log[1:]]
    rollouts = [entry["value"] for entry in entries if entry["stage"] == "rollouts"]
    judged = [entry["value"] for entry in entries if entry["stage"].startswith("judge ")]
    assert len(rollouts) == len(judged) == 3
    for point in report["points"]:
        answers = [row for value in judged for row in value[point["name"]]["answers"]]
        scores = [float(said.split()[2].rstrip(".")) for row in answers for said in row]
        assert point["judged"]["value"] == pytest.approx(sum(scores) / len(scores))
    assert len({point["judged"]["value"] for point in report["points"]}) == 2
    assert report["judge"]["question"] == QUESTION
    assert report["judge"]["agree"] == 1.0  # Seeds differ by one point, which is near.
    assert report["judge"]["chance"] < 1.0
    assert "asked again, the judge says the same to within 1 of 10 in 100% of cases" in printed.out
    assert QUESTION in (sweep.output / "index.html").read_text()


def test_the_judge_sees_the_reply_and_nothing_else(serve, sweep):
    server = serve(lambda _text, _seed: "5")
    sweep(server.url)
    assert {path for path, _ in server.asked} == {"/v1/chat/completions"}
    for _, body in server.asked:
        (message,) = body["messages"]
        assert QUESTION in message["content"]
        assert "The morning was" not in message["content"]
        assert body["model"] == "big"
    assert {body["seed"] for _, body in server.asked} == {0, 1}


def test_what_was_judged_is_not_judged_again(serve, sweep):
    first = serve(lambda text, _seed: str(len(text) % 11))
    _, _, report = sweep(first.url)
    second = serve(lambda _text, _seed: "0")
    _, printed, again = sweep(second.url)
    assert second.asked == []
    assert again == report
    assert "judged replies: 3 of 3 measured before" in printed.err
    sweep(second.url, "--judge-repeats", "1")  # Asked otherwise it is another matter.
    assert len(second.asked) == 12


def test_a_key_is_sent_and_written_nowhere(serve, sweep, monkeypatch):
    monkeypatch.setenv("BAKE_JUDGE_KEY", "hf_secret")
    server = serve(lambda _text, _seed: "5")
    _, printed, _ = sweep(server.url)
    assert set(server.keys) == {"Bearer hf_secret"}
    written = b"".join(path.read_bytes() for path in sweep.output.rglob("*") if path.is_file())
    assert b"hf_secret" not in written + printed.out.encode() + printed.err.encode()
    assert b"127.0.0.1" not in written


def test_a_judge_that_says_no_number_has_no_score(serve, sweep):
    _, printed, report = sweep(serve(lambda _text, _seed: "I would rather not say.").url)
    assert [point.get("judged") for point in report["points"]] == [None, None]
    assert report["judge"]["unanswered"] == 1.0
    assert "100% of its answers hold no number" in printed.out


def test_a_server_that_takes_no_seed_is_asked_without(serve, sweep):
    def answer(_text, seed):
        return "5" if seed is None else (400, "unknown field: seed")

    code, _, report = sweep(serve(answer).url)
    assert code == 0
    assert report["points"][0]["judged"]["value"] == 5


def test_a_server_that_refuses_is_one_line_and_the_sweep_is_kept(serve, sweep):
    refusing = serve(lambda _text, _seed: (500, "out of memory"))
    code, printed, report = sweep(refusing.url)
    assert code == 1
    assert printed.err.splitlines()[-1].endswith("refuses model 'big' (HTTP 500: out of memory)")
    assert report["complete"] is False
    assert report["points"][1]["fluency_ratio"]["value"] > 0
    code, printed, report = sweep(serve(lambda _text, _seed: "3").url)
    assert code == 0
    assert "sampled text: 3 of 3 measured before" in printed.err


def test_no_server_at_all(sweep):
    code, printed, _ = sweep("http://127.0.0.1:9/v1")
    assert code == 1
    assert "no server answers at http://127.0.0.1:9/v1" in printed.err
    assert "correct --judge" in printed.err


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("7", 7),
        ("**8**", 8),
        ("Score: 6/10", 6),
        ("6 / 10", 6),
        ("<think>Perhaps 3? No.</think>\n9", 9),
        ("It deserves a 4.5.", 4.5),
        ("10", 10),
        ("11", None),
        ("-3", None),
        ("none", None),
        ("", None),
    ],
)
def test_a_number_is_read_from_what_is_said(answer, score):
    assert read_score(answer) == score


def test_agreement_is_told_from_chance():
    judged = {"arm": {"answers": [["1", "2"], ["9", "9"], ["5", "8"], ["2", "no"]]}}
    found = measure_agreement(judged)
    assert found.agree == pytest.approx(2 / 3)
    assert found.chance == pytest.approx(1 / 2)  # 1 and 9, 9 and 8
    assert found.unanswered == pytest.approx(1 / 8)
    assert mean_scores(judged["arm"]) == [1.5, 9, 6.5, 2]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((None, "m", None, 2), "give --judge URL"),
        ((None, None, "q", 2), "give --judge URL"),
        (("http://h", None, "q", 2), "--judge needs --judge-model NAME"),
        (("http://h", "m", " ", 2), "--judge needs --judge-model NAME"),
        (("http://h", "m", "q", 0), "--judge-repeats is 1 or more"),
        (("ftp://h", "m", "q", 2), "is no http address"),
    ],
)
def test_a_judge_is_all_of_it_or_none(options, said):
    with pytest.raises(BakeError, match=said):
        make_judge(*options)
