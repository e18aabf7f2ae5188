"""A Hub that fails at random: what is there is whole or as before, and running again finishes it.

One shard is the base's, on the same Hub: it is copied there, or sent where copying is refused.
"""

import random
import time
from collections import Counter

import pytest
from loopback_hub import Reply
from publishing import REPO_ID, sent_weights, write_output
from test_copies import BASE, BIG, FILES, record

from bake.errors import HubError
from bake.hub import publish

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")

RUNS = 50
CHANCE = 0.15  # of a request's failing; some fifteen are made in a publish that nothing disturbs
AT_THE_COMMIT = 0.6


class Weather:
    """What befalls requests: nothing, a 500, a hang-up before or after the work, a slow answer, a rival."""

    def __init__(self, hub, seed):
        self.hub, self.seed, self.seen, self.counts = hub, seed, set(), Counter()

    def __call__(self, request):
        # By request and not by time: uploads run in threads.
        request_line = f"{request.method} {request.path}"
        self.counts[request_line] += 1
        dice = random.Random(f"{self.seed} {request_line} {self.counts[request_line]}")
        committing = "/commit/" in request.path
        if dice.random() >= (AT_THE_COMMIT if committing else CHANCE):
            return None
        kinds = ["error", "hang up", "lost answer", "slow"] + ["rival"] * committing
        kind = dice.choice(kinds)
        self.seen.add(kind)
        if kind == "error":
            return Reply.json({"error": "internal"}, 500)
        if kind == "hang up":
            raise ConnectionError
        if kind == "lost answer":
            self.hub.answer_quietly(request)
            raise ConnectionError
        if kind == "slow":
            time.sleep(0.005)
        if kind == "rival":
            self.hub.add_files(REPO_ID, {".gitignore": b"%d\n" % dice.getrandbits(32)})
        return None


@pytest.mark.usefixtures("unhurried")
def test_whole_or_as_before_and_finished_by_running_again(hub, tmp_path):
    base = make_base(hub)
    first = write_output(tmp_path / "first", FILES, **record(base))
    files = {**FILES, "config.json": b"{}\n", "model-00002-of-00002.safetensors": b"PUSH" * 100}
    del files["figures/dose.png"]
    second = write_output(tmp_path / "second", files, **record(base))
    whole = {name: (first / name).read_bytes() for name in (*FILES, "bake.json")}
    wanted = {name: (second / name).read_bytes() for name in (*files, "bake.json")}
    said, befallen, at_once, copied = [], set(), 0, 0
    for seed in range(RUNS):
        hub.repos.clear()
        hub.requests.clear()
        assert make_base(hub) == base
        replacing = seed % 2 == 1
        if replacing:
            publish(first, REPO_ID)
        states = [whole if replacing else {}, wanted]
        hub.before_request = weather = Weather(hub, seed)
        for attempt in range(30):
            try:
                publish(second, REPO_ID)
            except HubError as error:
                said.append(str(error))
                assert visible(hub) in states
            else:
                at_once += attempt == 0
                break
        else:
            pytest.fail(f"seed {seed} never finished")
        hub.before_request = None
        befallen |= weather.seen
        assert visible(hub) == wanted
        titles = [commit.title for commit in hub.commits(REPO_ID)]
        copied += BIG not in sent_weights(hub, REPO_ID).values()
        assert titles.count("Publish the baked model") == 1 + replacing, seed
    assert befallen == {"error", "hang up", "lost answer", "slow", "rival"}
    assert all("\n" not in line for line in said)
    assert len(said) >= RUNS / 2  # or the weather would have been too fine to show anything
    assert at_once >= 1
    assert copied == RUNS


def make_base(hub):
    """Put the base on the Hub, and return its commit."""
    hub.create_repo(BASE)
    return hub.add_files(BASE, {"model.safetensors": BIG, "config.json": b"{}"}).oid


def visible(hub):
    """The files that anybody sees on main; nothing where there is no repository."""
    if REPO_ID not in hub.repos:
        return {}
    return {name: body for name, body in hub.files(REPO_ID).items() if not name.startswith(".")}
