"""While requests wait, priorities and equal shares of the clients decide which runs next, and which has a place."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from messages import joined
from torch import Tensor, fx, nn
from waiting import wait_for

import torchsurgeon as ts
from torchsurgeon import wire
from torchsurgeon.errors import AdaptError, ModelFailedError, ProtocolError, ServerError
from torchsurgeon.serve import ModelRegistry, Server, create_app
from torchsurgeon.serve.admission import level_in
from torchsurgeon.serve.failure import BusyError, ExpiredError, GoneError
from torchsurgeon.serve.fairness import FairQueue, Place
from torchsurgeon.serve.intake import Intake
from torchsurgeon.serve.metrics import Metrics
from torchsurgeon.serve.outcome import Outcome
from torchsurgeon.serve.received import Received
from torchsurgeon.serve.tokens import Holder, Tokens
from torchsurgeon.serve.worker import Worker

FLOOD, POLITE, URGENT = "flooding-token-0123456789", "polite-token-0123456789", "urgent-token-0123456789"
HELD: list[threading.Event] = []
BEGUN = threading.Semaphore(0)
RAN: list[float] = []


# --- the order of what waits ---


def drained(queue: FairQueue[Any]) -> list[Any]:
    return [queue.take_first() for _ in range(len(queue))]


def test_clients_take_turns_however_many_requests_each_has_waiting() -> None:
    queue: FairQueue[str] = FairQueue()
    for i in range(6):
        queue.put(f"flood {i}", Place("flood", cost_s=1.0))
    queue.put("polite 0", Place("polite", cost_s=1.0))
    queue.put("polite 1", Place("polite", cost_s=1.0))
    assert drained(queue) == [
        *("flood 0", "polite 0", "flood 1", "polite 1", "flood 2", "flood 3", "flood 4", "flood 5"),
    ]


def test_one_client_is_served_in_the_order_in_which_it_asked() -> None:
    queue: FairQueue[int] = FairQueue()
    for i in range(20):
        queue.put(i, Place("one", cost_s=random.Random(i).random()))
    assert drained(queue) == list(range(20))


def test_shares_are_equal_in_seconds_and_not_in_requests() -> None:
    queue: FairQueue[tuple[str, float]] = FairQueue()
    takes_s = {"slow": 5.0, "quick": 1.0, "middle": 2.0}
    used_s = Counter[str]()
    for client, cost_s in takes_s.items():
        queue.put((client, cost_s), Place(client, cost_s=cost_s))
        queue.put((client, cost_s), Place(client, cost_s=cost_s))
    for _ in range(400):
        client, cost_s = queue.take_first()
        used_s[client] += cost_s
        # It always has two requests waiting.
        queue.put((client, cost_s), Place(client, cost_s=cost_s))
    assert max(used_s.values()) - min(used_s.values()) <= 2 * max(takes_s.values())


def test_what_requests_really_took_is_charged_where_it_was_expected_otherwise() -> None:
    queue: FairQueue[str] = FairQueue()
    really_s = {"liar": 4.0, "honest": 1.0}
    used_s = Counter[str]()
    for client in really_s:
        queue.put(client, Place(client, cost_s=1.0))
        queue.put(client, Place(client, cost_s=1.0))
    for _ in range(400):
        client = queue.take_first()
        used_s[client] += really_s[client]
        queue.charge(Place(client, cost_s=1.0), really_s[client])
        queue.put(client, Place(client, cost_s=1.0))
    assert abs(used_s["liar"] - used_s["honest"]) <= 4 * max(really_s.values())


def test_many_requests_that_take_longer_than_expected_are_put_back_once_one_has() -> None:
    queue: FairQueue[str] = FairQueue()
    really_s = {"liar": 5.0, "honest": 1.0}
    expected_s = {"liar": 0.001, "honest": 1.0}
    used_s = Counter[str]()
    for _ in range(50):
        queue.put("liar", Place("liar", cost_s=expected_s["liar"]))
    queue.put("honest", Place("honest", cost_s=1.0))
    for _ in range(50):
        client = queue.take_first()
        queue.put("honest", Place("honest", cost_s=1.0))
        used_s[client] += really_s[client]
        queue.charge(Place(client, cost_s=expected_s[client]), really_s[client])
        assert list(queue) == [entry.item for entry in sorted(queue._entries)]
    assert abs(used_s["liar"] - used_s["honest"]) <= 2 * max(really_s.values())


def test_who_asks_seldom_is_next_and_saves_nothing_up() -> None:
    queue: FairQueue[str] = FairQueue()
    for i in range(300):
        queue.put(f"flood {i}", Place("flood", cost_s=1.0))
    for _ in range(100):
        queue.take_first()
    for i in range(50):
        queue.put(f"late {i}", Place("late", cost_s=1.0))
    first = [queue.take_first().split()[0] for _ in range(40)]
    assert "late" in first[:2]
    assert Counter(first) == {"flood": 20, "late": 20}


def test_a_higher_priority_runs_first_and_shares_hold_within_one() -> None:
    queue: FairQueue[str] = FairQueue()
    for name, client, level in [
        ("low", "a", 2), ("a1", "a", 1), ("a2", "a", 1), ("b1", "b", 1), ("high", "b", 0), ("b2", "b", 1),
    ]:  # fmt: skip
        queue.put(name, Place(client, level, 1.0))
    # The first client has used up a part of its share by its request of low priority.
    assert drained(queue) == ["high", "b1", "a1", "a2", "b2", "low"]


@pytest.mark.parametrize("seed", range(20))
def test_how_many_come_first_is_known_before_a_request_is_queued(seed: int) -> None:
    numbers = random.Random(seed)
    queue: FairQueue[int] = FairQueue()
    for i in range(60):
        place = Place(numbers.choice("abc"), numbers.randrange(3), numbers.random())
        ahead = queue.ahead_of(place)
        queue.put(i, place)
        assert list(queue).index(i) == ahead
        if numbers.random() < 0.3:
            queue.take_first()


def test_the_client_with_the_most_waiting_makes_room_with_its_last_request() -> None:
    queue: FairQueue[str] = FairQueue()
    for i in range(5):
        queue.put(f"flood {i}", Place("flood", cost_s=1.0))
    assert queue.evict_for(Place("flood")) is None
    evicted = []
    for i in range(4):
        evicted.append(queue.evict_for(Place("polite", cost_s=1.0)))
        if evicted[-1] is not None:
            queue.put(f"polite {i}", Place("polite", cost_s=1.0))
    # Then the polite one would have as many as the other.
    assert evicted == ["flood 4", "flood 3", None, None]
    assert len(queue) == 5
    # Who was refused is not charged, so its next request does not wait for longer than before.
    assert queue.ahead_of(Place("flood")) <= 5


def test_a_lower_priority_makes_room_and_the_servers_own_jobs_never_do() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.put("profile", Place(None, 2))
    queue.put("low", Place("a", 2))
    queue.put("normal", Place("b", 1))
    assert queue.evict_for(Place("c", 2)) is None
    assert queue.evict_for(Place("c", 1)) == "low"
    assert queue.evict_for(Place("c", 1)) is None
    assert queue.evict_for(Place("c", 0)) == "normal"
    assert queue.evict_for(Place("c", 0)) is None
    assert list(queue) == ["profile"]


def test_accounts_are_bounded_and_end_when_nothing_waits() -> None:
    queue: FairQueue[int] = FairQueue()
    queue.put(-1, Place("stays", 2, 1.0))
    for i in range(10_000):
        queue.put(i, Place(str(i), 1, 1.0))
        queue.take_first()
    assert len(queue._finish_s) <= 1025
    assert "stays" in queue._finish_s
    queue.take_first()
    assert not queue._finish_s


class Group:
    """What a worker asks of jobs that run together: up to four of a kind, and each as long as the others."""

    def limit(self, kind: object) -> int:
        return 4

    def limit_of_several(self) -> int:
        return 4

    def joins(self, kind: object, other: object) -> bool:
        return False

    def weights(self, loads: Any) -> list[float]:
        return [1.0] * len(loads)


def test_a_batch_takes_requests_of_several_clients_each_in_its_turn() -> None:
    taken: list[list[str]] = []

    class Together(Group):
        def answer_together(self, loads: Any) -> list[Any]:
            taken.append(list(loads))
            return list(loads)

    worker = Worker("test", 1, Together())
    free = threading.Event()
    busy = worker.submit(lambda: free.wait(20))
    asked = [
        worker.submit(lambda: None, kind="k", load=name, place=Place(name[0], cost_s=1.0))
        for name in ("a0", "a1", "a2", "a3", "a4", "a5", "b0", "b1", "c0")
    ]
    while worker.waiting != 9:
        time.sleep(0.001)
    free.set()
    assert busy.result(20)
    for one in asked:
        one.result(20)
    worker.close()
    assert taken == [["a0", "b0", "c0", "a1"], ["b1", "a2", "a3", "a4"]]


class Failing(Group):
    """A group of jobs that raises what it is told to, for one of them or for all."""

    def answer_together(self, loads: Sequence[Any]) -> list[Any]:
        time.sleep(0.01)
        if "all" in loads:
            raise ValueError
        return [ValueError() if load == "one" else load for load in loads]


@pytest.mark.parametrize("end", ["answered", "fails", "one of a batch fails", "a batch fails", "cancelled", "evicted"])
def test_however_a_request_ends_its_client_is_charged_for_what_it_took(end: str) -> None:
    worker, free, last = Worker("test", 1, Failing()), threading.Event(), threading.Event()

    def job() -> None:
        time.sleep(0.01)
        if end == "fails":
            raise ValueError

    busy = worker.submit(lambda: free.wait(20))
    loads = {"one of a batch fails": ("one", "fine"), "a batch fails": ("all", "fine")}.get(end, ("alone",))
    kind = "kind" if len(loads) > 1 else None
    asked = [worker.submit(job, kind=kind, load=load, place=Place("client", cost_s=100.0)) for load in loads]
    # The accounts are kept while something waits.
    holding, waiting = worker.submit(lambda: last.wait(20)), worker.submit(lambda: None)
    accounts = worker._waiting._finish_s
    assert accounts["client"] == pytest.approx(100.0 * len(loads))
    if end == "cancelled":
        assert asked[0].cancel()
    elif end == "evicted":
        assert worker.evict_for(Place("urgent", level=0), ValueError())
    free.set()
    assert busy.result(20)
    wait_for(holding.running)
    took_s = accounts["client"]
    last.set()
    waiting.result(20)
    worker.close()
    assert all(one.done() for one in asked)
    if end in ("cancelled", "evicted"):
        assert took_s == pytest.approx(0.0, abs=1e-6)
    else:
        assert 0.009 < took_s < 50.0


# --- who asks, and for which priority ---


def test_a_client_counts_by_its_token_or_else_by_its_address() -> None:
    def share(client: str, holder: str = "") -> str:
        return Received(memoryview(b""), None, 0.0, 0.0, client, holder=holder).share

    assert share("192.0.2.7:1") == share("192.0.2.7:2") != share("192.0.2.8:1")
    assert share("192.0.2.7:1", "cameras") == share("192.0.2.9:1", "cameras") == "cameras"
    # A network of IPv6 has 2^64 addresses.
    assert share("[2001:db8::1]:1") == share("[2001:db8::2%eth0]:2") != share("[2001:db8:0:1::1]:1")
    assert share("[::ffff:192.0.2.7]:1") != share("[::ffff:192.0.2.8]:1")
    assert share("") == share("nothing known") == ""


def test_a_priority_above_what_is_allowed_counts_as_what_is_allowed() -> None:
    assert [level_in(name, 0) for name in (b"high", b"normal", b"low", None)] == [0, 1, 2, 1]
    assert [level_in(name, 1) for name in (b"high", b"normal", b"low", None)] == [1, 1, 2, 1]
    assert [level_in(name, 2) for name in (b"high", b"normal", b"low", None)] == [2, 2, 2, 2]
    for bad in (b"", b"HIGH", b"0", b"higher", b"\xff"):
        with pytest.raises(ProtocolError, match="Torchsurgeon-Priority must be one of high, normal, low; got"):
            level_in(bad, 0)


def test_lines_of_tokens_name_clients_and_what_they_may_ask_for(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text(f"{FLOOD}\n# {POLITE}\n{POLITE}  priority=low name=cameras\n{URGENT}\tpriority=high\n")
    tokens = Tokens(file)
    assert tokens.holder_of(f"Bearer {FLOOD}".encode()) == Holder("line-1", None)
    assert tokens.holder_of(f"Bearer {POLITE}".encode()) == Holder("cameras", 2)
    assert tokens.holder_of(f"Bearer {URGENT}".encode()) == Holder("line-4", 0)
    assert tokens.holder_of(f"Bearer {URGENT}\tpriority=high".encode()) is None
    assert tokens.own_priorities() == {"cameras": "low", "line-4": "high"}


@pytest.mark.parametrize("rest", ["urgent", "priority=urgent", "priority=", "name=", "name=a/b", "names=a", "= ="])
def test_a_line_that_says_anything_else_is_refused_without_being_quoted(tmp_path: Path, rest: str) -> None:
    file = tmp_path / "tokens"
    file.write_text(f"{FLOOD}\n{POLITE} {rest}\n")
    with pytest.raises(ServerError, match=r"line 2 of .* has something else") as refused:
        Tokens(file)
    assert POLITE not in str(refused.value)


# --- a server ---


def hold(x: Tensor) -> Tensor:
    """Note the request by its first number, and take as long as the test wants, so that it is never quick."""
    RAN.append(float(x[0, 0]))
    BEGUN.release()
    time.sleep(2e-3)
    for event in HELD:
        event.wait(20)
    return x * 1


fx.wrap("hold")


class Held(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(hold(x))


def test_clients_share_what_a_batch_took_as_their_requests_would_take_alone() -> None:
    class Together:
        def limit(self, kind: object) -> int:
            return 1

        def limit_of_several(self) -> int:
            return 4

        def joins(self, kind: object, other: object) -> bool:
            return True

        def weights(self, loads: Any) -> list[float]:
            return list(loads)

        def answer_together(self, loads: Any) -> list[Any]:
            time.sleep(0.01)
            return list(loads)

    worker, free, last = Worker("test", 1, Together()), threading.Event(), threading.Event()
    busy = worker.submit(lambda: free.wait(20))
    for client, weight in (("early", 3.0), ("late", 1.0)):
        worker.submit(lambda: None, kind=client, load=weight, place=Place(client, cost_s=0.0))
    holding, waiting = worker.submit(lambda: last.wait(20)), worker.submit(lambda: None)
    free.set()
    assert busy.result(20)
    wait_for(holding.running)
    accounts = worker._waiting._finish_s
    assert accounts["early"] == pytest.approx(3 * accounts["late"])
    assert accounts["early"] + accounts["late"] >= 0.009
    last.set()
    waiting.result(20)
    worker.close()


def test_requests_weigh_as_much_as_they_take_alone() -> None:
    intake = Intake("net", lambda request: pytest.fail("nothing is run"), lambda requests: [])

    def request(kind: bytes) -> Received:
        found = Received(memoryview(bytearray(kind)), len(kind), 0.0, 0.0)
        found.kind = kind
        return found

    early, late = request(b"early"), request(b"late")
    assert intake.weights([early, late, late]) == [1.0, 1.0, 1.0]
    intake.took([early], 0.3)
    assert intake.weights([early, late, late]) == [1.0, 1.0, 1.0]
    intake.took([late], 0.1)
    assert intake.weights([early, late, late]) == [0.3, 0.1, 0.1]
    intake.worker.close()


LAYERS: Counter[str] = Counter()


def slow(x: Tensor) -> Tensor:
    """A layer that takes a millisecond for each sample, and counts them for the client that the values name."""
    time.sleep(1e-3 * len(x))
    LAYERS["attacker" if x[0, 0] > 0 else "other"] += len(x)
    return x * 1


def picky(x: Tensor) -> Tensor:
    if x[0, 0] > 1:
        raise IndexError
    return x * 1


fx.wrap("slow")
fx.wrap("picky")


class Slow(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return picky(slow(slow(slow(slow(x)))))


def share_of_attacker(end: str) -> float:
    """How many times as many layers run for a client whose requests end so as for one that is answered."""
    registry = ModelRegistry(profiler=None, concurrency=1)
    served = registry.add("net", Slow().eval(), torch.zeros(1, 4))
    values = {"attacker": torch.full((16, 4), 2.0 if end == "fails" else 1.0), "other": torch.zeros(1, 4)}
    stopping = threading.Event()
    LAYERS.clear()

    def ask(client: str) -> None:
        message = wire.encode_request({"x": values[client]})
        while not stopping.is_set():
            request = Received(memoryview(joined(message)), message.header_bytes, 0.0, time.perf_counter())
            request.holder = client
            if client == "attacker" and end == "expires":
                # It is stopped before its last layers.
                request.due_s = time.perf_counter() + 0.05
            try:
                answer = registry.submit(served, request)
                if client == "attacker" and end == "is left":
                    while not (answer.running() or answer.done()):
                        time.sleep(1e-3)
                    time.sleep(0.04)
                    request.gone = True
                answer.result(20)
            except (BusyError, ExpiredError, GoneError, ModelFailedError):
                time.sleep(1e-3)

    threads = [threading.Thread(target=ask, args=(client,)) for client in ("attacker", "other") for _ in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(1.2)
    stopping.set()
    for thread in threads:
        thread.join(20)
    registry.close()
    return LAYERS["attacker"] / max(LAYERS["other"], 1)


@pytest.mark.parametrize("end", ["fails", "expires", "is left"])
def test_no_client_gets_more_by_requests_that_are_not_answered(end: str) -> None:
    # What a request costs beside its layers, which a busy machine makes dear, counts in both.
    assert share_of_attacker(end) < 2.5 * share_of_attacker("is answered")


@pytest.fixture(params=["direct", "asgi"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    registry = ModelRegistry(profiler=None, max_queue=6, concurrency=1)
    registry.add("net", Held().eval(), torch.ones(1, 4))
    app = create_app(registry)
    file = tmp_path / "tokens"
    file.write_text(f"{FLOOD} name=flood\n{POLITE} name=polite\n{URGENT} name=urgent priority=high\n")
    app.tokens = Tokens(file)
    with Server(app, direct=request.param == "direct") as server:
        yield server
    registry.close()


@pytest.fixture
def held() -> Iterator[threading.Event]:
    """Requests that run stay in their first layer until this is set."""
    event = threading.Event()
    HELD.append(event)
    while BEGUN.acquire(blocking=False):
        pass
    RAN.clear()
    yield event
    event.set()
    HELD.clear()


def begin(
    server: Server, number: float, token: str | None = None, source: str = "127.0.0.1", **headers: str
) -> http.client.HTTPConnection:
    data = [number, 1.0, 1.0, 1.0]
    body = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": data}]}).encode()
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20, source_address=(source, 0))
    connection.request("POST", "/v2/models/net/infer", body, headers)
    return connection


def end(connection: http.client.HTTPConnection) -> tuple[int, dict[str, str], Any]:
    with contextlib.closing(connection):
        response = connection.getresponse()
        told = {name.lower(): value for name, value in response.getheaders()}
        return response.status, told, json.loads(response.read())


def queued(server: Server, count: int) -> Callable[[], bool]:
    return lambda: server.app.registry.get("net").worker.waiting == count


def flood(server: Server, token: str | None = FLOOD) -> list[http.client.HTTPConnection]:
    """Have a request of the flooding client run, and six wait, each known to be there before the next one comes."""
    found = [begin(server, 0, token)]
    assert BEGUN.acquire(timeout=20)
    for i in range(1, 7):
        found.append(begin(server, i, token))
        wait_for(queued(server, i))
    return found


def test_a_flooding_client_takes_no_place_and_no_turn_from_a_polite_one(server: Server, held: threading.Event) -> None:
    outcomes: list[Outcome] = []
    metrics = Metrics(server.app.registry, lambda: 0)
    server.app.listeners += [outcomes.append, metrics]
    flooding = flood(server)
    polite = begin(server, 100, POLITE)
    # The last one of the flooding client's makes room.
    status, headers, body = end(flooding.pop())
    assert (status, int(headers["retry-after"]) >= 1) == (503, True)
    assert "makes room for a client that has fewer of them waiting" in body["error"]
    # Another one finds no place, since nobody has more waiting than its client.
    status, headers, body = end(begin(server, 7, FLOOD))
    assert (status, int(headers["retry-after"]) >= 1) == (503, True)
    assert "no other client has more of them waiting" in body["error"]
    told = metrics.text()[0].decode()
    assert 'torchsurgeon_queue_clients{model="net"} 2.0' in told
    assert 'torchsurgeon_queue_by_priority{model="net",priority="normal"} 6.0' in told
    held.set()
    assert [end(one)[0] for one in (polite, *flooding)] == [200] * 7
    # It waited for the one that ran, and for one turn of the other client at most.
    assert RAN.index(100.0) <= 2
    wait_for(lambda: len(outcomes) == 9)
    assert Counter(one.error for one in outcomes) == {"": 7, "DisplacedError": 1, "BusyError": 1}
    assert 'torchsurgeon_errors_total{kind="DisplacedError",model="net"} 1.0' in metrics.text()[0].decode()
    assert server.app.registry.get("net").worker._slow == 0


def test_the_higher_priority_runs_first_as_far_as_the_token_allows(server: Server, held: threading.Event) -> None:
    asked = [begin(server, 0, FLOOD)]
    assert BEGUN.acquire(timeout=20)
    for number, token, priority in [
        (1, FLOOD, "low"),
        (2, FLOOD, "high"),  # counts as normal
        (3, FLOOD, "normal"),
        (4, URGENT, "normal"),
        (5, URGENT, "high"),
    ]:
        asked.append(begin(server, number, token, **{"Torchsurgeon-Priority": priority}))
        wait_for(queued(server, len(asked) - 1))
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)) as link:
        link.request("GET", "/v2/load", headers={"Authorization": f"Bearer {POLITE}"})
        load = json.loads(link.getresponse().read())["models"]["net"]
    assert load["waiting_by_priority"] == {"high": 1, "normal": 3, "low": 1}
    assert load["waiting_clients"] == 2
    held.set()
    assert [end(one)[0] for one in asked] == [200] * 6
    assert (RAN[0], RAN[1], RAN[-1]) == (0.0, 5.0, 1.0)
    assert RAN.index(2.0) < RAN.index(3.0)


def test_a_high_priority_finds_a_place_where_everyone_has_one(server: Server, held: threading.Event) -> None:
    asked = [begin(server, 0, FLOOD)]
    assert BEGUN.acquire(timeout=20)
    for number in range(1, 7):
        token, priority = (FLOOD, "normal") if number % 2 else (POLITE, "low")
        asked.append(begin(server, number, token, **{"Torchsurgeon-Priority": priority}))
        wait_for(queued(server, number))
    urgent = []
    # First the clients with the most waiting make room, and then the lowest priority does.
    for number, refused in ((10, 6), (11, 5), (12, 4)):
        urgent.append(begin(server, number, URGENT, **{"Torchsurgeon-Priority": "high"}))
        status, _, body = end(asked[refused])
        assert (status, "or for a higher priority" in body["error"]) == (503, True)
    held.set()
    assert [end(one)[0] for one in (*urgent, *asked[:4])] == [200] * 7
    assert RAN[:5] == [0.0, 10.0, 11.0, 12.0, 1.0]


@pytest.mark.parametrize("priority", ["urgent", "0", "HIGH"])
def test_an_unknown_priority_is_refused_and_the_next_request_is_served(server: Server, priority: str) -> None:
    status, _, body = end(begin(server, 1, POLITE, **{"Torchsurgeon-Priority": priority}))
    assert status == 400
    assert body["error"] == f"Torchsurgeon-Priority must be one of high, normal, low; got {priority!r}"
    assert end(begin(server, 1, POLITE))[0] == 200


@pytest.fixture(params=["direct", "asgi"])
def open_server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """One that asks for no token."""
    registry = ModelRegistry(profiler=None, max_queue=6, concurrency=1)
    registry.add("net", Held().eval(), torch.ones(1, 4))
    with Server(create_app(registry), direct=request.param == "direct") as server:
        yield server
    registry.close()


def test_without_tokens_each_address_has_its_share_and_nobody_may_ask_for_more_than_normal(
    open_server: Server, held: threading.Event
) -> None:
    flooding = flood(open_server, None)
    polite = begin(open_server, 100, None, "127.0.0.2", **{"Torchsurgeon-Priority": "high"})
    assert end(flooding.pop())[0] == 503
    assert open_server.app.registry.get("net").worker.who_waits() == (2, {"high": 0, "normal": 6, "low": 0})
    held.set()
    assert [end(one)[0] for one in (polite, *flooding)] == [200] * 7
    assert RAN.index(100.0) <= 2


def test_the_operator_may_allow_everyone_more(open_server: Server, held: threading.Event) -> None:
    open_server.app.highest = 0
    flooding = flood(open_server, None)
    urgent = begin(open_server, 100, None, **{"Torchsurgeon-Priority": "high"})
    assert end(flooding.pop())[0] == 503
    held.set()
    assert [end(one)[0] for one in (urgent, *flooding)] == [200] * 7
    assert RAN[1] == 100.0


def test_a_deadline_counts_only_those_that_run_first(server: Server, held: threading.Event) -> None:
    flooding = flood(server)
    server.app.registry.get("net").intake._admission._each_s = 10.0
    # Behind all six it would take a minute. Behind the next one of the other client it takes ten seconds.
    polite = begin(server, 100, POLITE, **{"Torchsurgeon-Deadline-S": "25"})
    assert end(flooding.pop())[0] == 503
    status, _, body = end(begin(server, 7, FLOOD, **{"Torchsurgeon-Deadline-S": "25"}))
    assert (status, "cannot answer within" in body["error"]) == (503, True)
    held.set()
    assert [end(one)[0] for one in (polite, *flooding)] == [200] * 7


@pytest.mark.parametrize(("priority", "told"), [("low", b"low"), (None, None)])
def test_a_split_model_tells_its_priority(
    priority: str | None, told: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[bytes | None] = []
    monkeypatch.setattr("torchsurgeon.serve.app.level_in", lambda value, highest: found.append(value) or highest)
    registry = ModelRegistry(profiler=None)
    model, x = nn.Linear(4, 2).eval(), torch.ones(1, 4)
    registry.add("net", model, x)
    with (
        Server(create_app(registry), direct=False) as server,
        ts.SplitModule(
            model, x, server=server.url, name="net", partition=0, priority=priority, fallback="error"
        ) as split,
        torch.no_grad(),
    ):
        assert torch.equal(split(x), model(x))
    registry.close()
    assert found == [told]
    with pytest.raises(AdaptError, match="priority must be one of high, normal, low, or None; got 'urgent'"):
        ts.SplitModule(model, x, server="http://127.0.0.1:1", priority="urgent")
