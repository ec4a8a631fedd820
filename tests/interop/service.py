"""A service of `dtc` in Python, written from docs/protocol.md alone: its rules are quoted by number.

Its state is an SQLite file that all its instances share. The field of a transaction's data that has
the service's name tells it how to behave, so that tests can make it refuse, fail or wait; a real
service would do its work in `Store.prepare`, `commit` and `abort`.

One thread talks to the broker and decides; slow calls run in other threads, and return by
`add_callback_threadsafe`. So heartbeats continue while something is prepared.

**Invariant:** for one transaction, one call of the service's code runs at a time.
"""

import argparse
import json
import os
import re
import secrets
import signal
import sqlite3
import sys
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import pika
from pika.exceptions import AMQPChannelError, AMQPConnectionError, NackError, UnroutableError

BODY_MAX = 256 * 1024
REMEMBERED_MAX = 65_536
RETRY_PARKED_EVERY = 2.0
GATE_LIMIT = 60.0


class Store:
    """The prepared and committed branches, for all instances of the service."""

    def __init__(self, directory, service):
        os.makedirs(directory, exist_ok=True)
        self.path = os.path.join(directory, service + ".sqlite")
        self.service = service
        with self.open() as db:
            db.execute("PRAGMA journal_mode = WAL")
            db.executescript(
                """
                CREATE TABLE IF NOT EXISTS prepared (id TEXT, requested_at INTEGER, branch TEXT,
                    request_hash TEXT, deadline INTEGER, data TEXT, failures INTEGER DEFAULT 0,
                    PRIMARY KEY (id, requested_at, branch));
                CREATE TABLE IF NOT EXISTS committed (id TEXT, requested_at INTEGER, branch TEXT,
                    PRIMARY KEY (id, requested_at, branch));
                CREATE TABLE IF NOT EXISTS calls (instance TEXT, what TEXT, id TEXT, branch TEXT);
                """
            )

    def open(self):
        db = sqlite3.connect(self.path, timeout=30)
        db.execute("PRAGMA synchronous = FULL")
        return db

    def held(self, key=None):
        """Every prepared branch; of one transaction, if `key` names it."""
        query = "SELECT id, requested_at, branch, request_hash, deadline FROM prepared"
        with self.open() as db:
            if key is None:
                return db.execute(query).fetchall()
            return db.execute(query + " WHERE id = ? AND requested_at = ?", key).fetchall()

    def has_namesake(self, key):
        """Whether another transaction of this id is known."""
        query = "SELECT 1 FROM {} WHERE id = ? AND requested_at <> ?"
        with self.open() as db:
            return any(db.execute(query.format(t), key).fetchone() for t in ("prepared", "committed"))

    def is_committed(self, key):
        with self.open() as db:
            query = "SELECT 1 FROM committed WHERE id = ? AND requested_at = ?"
            return db.execute(query, key).fetchone() is not None

    # ---- The service's code ------------------------------------------------------------------

    def prepare(self, instance, branch, item):
        """Returns `(vote, message)`. What a commit needs is stored before it returns `prepared`."""
        key = (item["id"], item["requested_at"])
        self.called(instance, "prepare", key, branch)
        order = self.order(item["data"])
        wait_for(order.get("prepare_gate"))
        if order.get("fail_prepare"):
            raise RuntimeError("as the data says")
        if order.get("refuse"):
            return "refused", str(order["refuse"])
        if order.get("read_only"):
            return "read_only", None
        with self.open() as db:
            db.execute(
                "INSERT INTO prepared (id, requested_at, branch, request_hash, deadline, data)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                (*key, branch, item["request_hash"], item["deadline"], json.dumps(item["data"])),
            )
        return "prepared", None

    def commit(self, instance, key, branch):
        """A branch that is already committed, or unknown, is a success."""
        where = " WHERE id = ? AND requested_at = ? AND branch = ?"
        with self.open() as db:
            row = db.execute("SELECT data, failures FROM prepared" + where, (*key, branch)).fetchone()
        if row is None:
            return
        self.called(instance, "commit", key, branch)
        order = self.order(json.loads(row[0]))
        wait_for(order.get("commit_gate"))
        if row[1] < order.get("fail_commits", 0) or is_shut(order.get("commit_fails_until")):
            with self.open() as db:
                db.execute("UPDATE prepared SET failures = failures + 1" + where, (*key, branch))
            raise RuntimeError("as the data says")
        with self.open() as db:
            if db.execute("DELETE FROM prepared" + where, (*key, branch)).rowcount:
                db.execute("INSERT INTO committed VALUES (?, ?, ?)", (*key, branch))

    def abort(self, instance, key, branch):
        """An unknown branch is a success."""
        self.called(instance, "abort", key, branch)
        with self.open() as db:
            where = " WHERE id = ? AND requested_at = ? AND branch = ?"
            db.execute("DELETE FROM prepared" + where, (*key, branch))

    def order(self, data):
        order = data.get(self.service, {})
        return order if isinstance(order, dict) else {}

    def called(self, instance, what, key, branch):
        with self.open() as db:
            db.execute("INSERT INTO calls VALUES (?, ?, ?, ?)", (instance, what, key[0], branch))

    def show(self):
        """The whole state, for a test."""
        with self.open() as db:
            print(json.dumps({
                "prepared": db.execute("SELECT id, branch FROM prepared").fetchall(),
                "committed": db.execute("SELECT id, branch FROM committed ORDER BY id").fetchall(),
                "calls": db.execute("SELECT instance, what, id, branch FROM calls").fetchall(),
            }))


def is_shut(gate):
    return gate is not None and not os.path.exists(gate)


def wait_for(gate):
    until = time.monotonic() + GATE_LIMIT
    while is_shut(gate) and time.monotonic() < until:
        time.sleep(0.01)


class Holding:
    """A transaction that this instance works on.

    `stage` is `preparing`, `prepared`, `failed`, `finishing` or `backing_off`; `slot` is the delivery
    of its prepare, if it has one.
    """

    def __init__(self, stage, slot=None, request_hash=None, deadline=0):
        self.stage, self.slot = stage, slot
        self.request_hash, self.deadline = request_hash, deadline
        self.branch = None
        self.why_failed = None
        self.since = time.monotonic()
        self.voters = []
        self.finishers = []


class Session:
    """One instance over one connection. A new connection is a new instance: what the old one held is
    delivered again, and what it had prepared is in the store."""

    def __init__(self, store, arguments):
        self.store, self.arguments = store, arguments
        self.service, self.namespace = arguments.name, arguments.namespace
        self.instance = f"{arguments.label}-{secrets.token_hex(6)}"
        self.branches = 0
        self.holdings, self.waiting, self.seen = {}, [], {}
        self.remembered = OrderedDict()
        self.stopping_since = None
        self.is_cancelled = False
        self.pool = ThreadPoolExecutor(max_workers=arguments.max_concurrency + 8)

    # ---- The broker --------------------------------------------------------------------------

    def serve(self, is_told_to_stop):
        self.connection = pika.BlockingConnection(pika.URLParameters(self.arguments.broker))
        try:
            self.consume()
            self.look_through_store()
            print("ready", file=sys.stderr, flush=True)
            while not self.is_drained(is_told_to_stop()) and not self.is_cancelled:
                self.connection.process_data_events(time_limit=0.2)
            self.connection.close()
        finally:
            # No call may still run when the next instance starts.
            self.pool.shutdown(wait=True)

    def consume(self):
        self.out = self.connection.channel()
        self.sure = self.connection.channel()
        self.sure.confirm_delivery()
        # Rule 2: an instance consumes outcomes before it takes prepares.
        own = self.consuming()
        name = f"{self.namespace}.finish.{self.service}.{self.instance}"
        own.queue_declare(name, exclusive=True)
        for to in (self.instance, "all"):
            own.queue_bind(name, f"{self.namespace}.finish", f"{to}.{self.service}")
        own.basic_qos(prefetch_count=100)
        own.basic_consume(name, self.heard(self.own_received, name))
        shared = self.consuming()
        shared.basic_qos(prefetch_count=100)
        name = f"{self.namespace}.finish.{self.service}"
        shared.basic_consume(name, self.heard(self.shared_received, name))
        # Rule 1: the prefetch is the cap, and an unacknowledged delivery is a slot.
        self.prepares = self.consuming()
        self.prepares.basic_qos(prefetch_count=self.arguments.max_concurrency)
        name = f"{self.namespace}.prepare.{self.service}"
        self.consumer = self.prepares.basic_consume(name, self.heard(self.prepare_received, name))

    def consuming(self):
        """A channel whose consumers may be cancelled, as when their queue is replaced: then the instance
        starts over (rule 10)."""
        channel = self.connection.channel()

        def on_cancel(_):
            self.is_cancelled = True

        channel.add_on_cancel_callback(on_cancel)
        return channel

    def is_drained(self, is_told):
        if not is_told:
            return False
        if self.stopping_since is None:
            self.stopping_since = time.monotonic()
            self.prepares.basic_cancel(self.consumer)
        return not self.holdings or time.monotonic() - self.stopping_since > self.arguments.drain

    def heard(self, handle, queue):
        """Rule 10: a malformed message is set aside, with the reason, and then acknowledged."""

        def on_message(channel, method, properties, body):
            try:
                message = Message(channel, method, properties, body)
                handle(message)
            except Malformed as error:
                headers = {"reason": str(error), "queue": queue, "exchange": method.exchange,
                           "routing_key": method.routing_key}
                if properties.type:
                    headers["type"] = properties.type
                kept = pika.BasicProperties(headers=headers, delivery_mode=2)
                self.publish_surely("", f"{self.namespace}.rejected", body, kept,
                                    lambda: channel.basic_ack(method.delivery_tag))

        return on_message

    def publish(self, to, kind, item):
        body = json.dumps([item]).encode()
        properties = pika.BasicProperties(content_type="application/json", type=f"dtc.{kind}.v1")
        self.out.basic_publish(f"{self.namespace}.replies", f"{to}.{self.service}", body, properties)

    def publish_surely(self, exchange, key, body, properties, then):
        """Publishes until the broker has confirmed it, and then calls `then`."""
        try:
            self.sure.basic_publish(exchange, key, body, properties, mandatory=True)
        except (UnroutableError, NackError):
            again = lambda: self.publish_surely(exchange, key, body, properties, then)
            self.connection.call_later(1, again)
        else:
            then()

    def start(self, call, then):
        """Runs `call` in a thread, and `then` with its result, or the error, in this one."""
        connection = self.connection

        def run():
            try:
                ended = (call(), None)
            except Exception as error:  # The service's code may raise any exception.
                ended = (None, error)
            try:
                connection.add_callback_threadsafe(lambda: then(*ended))
            except AMQPConnectionError:
                pass  # The connection is lost: the broker delivers the message again.

        self.pool.submit(run)

    # ---- Prepare -----------------------------------------------------------------------------

    def prepare_received(self, message):
        if message.kind != "prepare":
            raise Malformed(f"the property `type` is `dtc.{message.kind}.v1`")
        worker = message.worker()
        if not message.items:
            raise Malformed("has no items: a prepare has at least one")
        # Rule 1: each item is handled by itself, and the last one settles the message.
        message.delivery.parts = len(message.items)
        for item in message.items:
            self.prepare(worker, message.delivery, message.redelivered, item)

    def prepare(self, worker, delivery, redelivered, item):
        key, request_hash = key_of(item), item["request_hash"]
        holding = self.holdings.get(key)
        if holding is not None and holding.slot is None:
            return self.waiting.append((worker, delivery, redelivered, item))
        if holding is not None:
            # Rule 4: it is prepared once, and voted on as often as it is delivered.
            self.vote_on_held(worker, key, request_hash)
            return self.ack(delivery)
        vote, fields = self.recalled(key, request_hash)
        if vote is None:
            found = self.store.held(key)
            if found:
                return self.prepare_of_stored(worker, delivery, redelivered, item, found)
            vote, fields = self.no_call_for(key, item["deadline"])
        if vote is not None:
            self.vote(worker, key, request_hash, vote, **fields)
            return self.ack(delivery)
        if self.free() == 0:
            # Rule 1: the broker counts messages. One of several items in a message waits here for a slot.
            return self.waiting.append((worker, delivery, redelivered, item))
        self.branches += 1
        holding = Holding("preparing", delivery, request_hash, item["deadline"])
        holding.branch = branch = f"{self.instance}.{self.branches}"
        holding.voters.append((worker, request_hash))
        self.holdings[key] = holding
        self.start(lambda: self.store.prepare(self.instance, branch, item),
                   lambda verdict, error: self.prepare_ended(key, verdict, error))

    def prepare_of_stored(self, worker, delivery, redelivered, item, found):
        """Rule 4: the vote for what another instance has prepared names that branch."""
        key, request_hash = key_of(item), item["request_hash"]
        branch = next((row[2] for row in found if row[3] == request_hash), None)
        if branch is None:
            self.refuse(worker, key, request_hash, "id_reused")
            return self.ack(delivery)
        self.vote(worker, key, request_hash, "prepared", branch=branch)
        if not redelivered:
            return self.ack(delivery)
        # It came from an instance that is gone, so its slot is taken here.
        holding = Holding("prepared", delivery, request_hash, item["deadline"])
        holding.branch = branch
        self.holdings[key] = holding

    def no_call_for(self, key, deadline):
        """Rule 5, for what isn't held: whether the service's code must not be called."""
        if key in self.remembered:
            return "refused", {"reason": self.reason("cancelled")}
        others = list(self.holdings) + list(self.remembered)
        if any(k[0] == key[0] and k != key for k in others) or self.store.has_namesake(key):
            return "refused", {"reason": self.reason("id_reused")}
        if time.time() * 1000 > deadline:
            return "refused", {"reason": self.reason("deadline")}
        return None, {}

    def recalled(self, key, request_hash):
        """The earlier answer or outcome, if it is remembered."""
        what, value = self.remembered.get(key, (None, None))
        if what is None and self.store.is_committed(key):
            what, value = "finished", "COMMITTED"
        if what == "finished":
            return "finished", {"outcome": value}
        if what == "refused":
            return "refused", {"reason": value}
        if what == "read_only" and value != request_hash:
            return "refused", {"reason": self.reason("id_reused")}
        return ("read_only", {}) if what == "read_only" else (None, {})

    def prepare_ended(self, key, verdict, error):
        holding = self.holdings[key]
        vote, text = verdict if error is None else ("failed", str(error))
        if vote == "prepared":
            holding.stage = "prepared"
        elif vote == "failed":
            holding.stage, holding.why_failed = "failed", text
        if holding.finishers:
            # The outcome came while it was being prepared.
            return self.apply(key)
        if vote in ("prepared", "failed"):
            holding.since = time.monotonic()
            for worker, request_hash in holding.voters:
                self.vote_on_held(worker, key, request_hash)
            holding.voters = []
            return None
        # Nothing is held: answer that, and free the slot.
        if vote == "refused":
            reason = self.reason("refused", text)
            self.remember(key, ("refused", reason))
            fields = {"reason": reason}
        else:
            self.remember(key, ("read_only", holding.request_hash))
            fields = {}
        self.remove(key)
        for worker, request_hash in holding.voters:
            self.vote(worker, key, request_hash, vote, **fields)
        return self.ack(holding.slot)

    def vote_on_held(self, worker, key, request_hash):
        holding = self.holdings[key]
        if holding.request_hash not in (None, request_hash):
            self.refuse(worker, key, request_hash, "id_reused")
        elif holding.stage == "prepared":
            self.vote(worker, key, request_hash, "prepared", branch=holding.branch)
        elif holding.stage == "failed":
            reason = self.reason("failed", holding.why_failed)
            self.vote(worker, key, request_hash, "failed", branch=holding.branch, reason=reason)
        elif (worker, request_hash) not in holding.voters:
            holding.voters.append((worker, request_hash))

    def refuse(self, worker, key, request_hash, code):
        self.vote(worker, key, request_hash, "refused", reason=self.reason(code))

    def vote(self, worker, key, request_hash, vote, **fields):
        self.publish(worker, "vote", {
            "id": key[0], "requested_at": key[1], "request_hash": request_hash,
            "service": self.service, "instance": self.instance, "vote": vote, **fields,
            "free": self.free()})

    def reason(self, code, message=None):
        reason = {"service": self.service, "code": code}
        return reason if message is None else {**reason, "message": message}

    def free(self):
        used = sum(1 for holding in self.holdings.values() if holding.slot is not None)
        return max(0, self.arguments.max_concurrency - used)

    # ---- Finish, cancel, query ---------------------------------------------------------------

    def own_received(self, message):
        self.command_received(message)
        self.ack(message.delivery)

    def shared_received(self, message):
        # Rule 8: a message from the durable queue is acknowledged when all of it is applied.
        if message.kind == "finish" and message.items:
            message.undone = len(message.items)
            self.command_received(message, message)
        else:
            self.own_received(message)

    def command_received(self, message, owed=None):
        if message.kind not in ("finish", "query", "cancel"):
            raise Malformed(f"the property `type` is `dtc.{message.kind}.v1`")
        worker = None if message.kind == "cancel" else message.worker()
        for item in message.items:
            if message.kind == "finish":
                self.finish(worker, item, owed)
            elif message.kind == "query":
                self.query(worker, item)
            else:
                self.cancel(item)

    def cancel(self, item):
        """Rule 6: it keeps a prepare from being started, and changes nothing that was."""
        key = key_of(item)
        holding = self.holdings.get(key)
        if (holding is None or holding.slot is None) and key not in self.remembered:
            self.remember(key, ("cancelled", None))

    def query(self, worker, item):
        """Rule 6: an instance that holds it votes again; one that doesn't know it doesn't answer."""
        key, request_hash = key_of(item), item["request_hash"]
        if key in self.holdings:
            return self.vote_on_held(worker, key, request_hash)
        found = self.store.held(key)
        if found:
            branch = next((row[2] for row in found if row[3] == request_hash), None)
            if branch is None:
                return self.refuse(worker, key, request_hash, "id_reused")
            return self.vote(worker, key, request_hash, "prepared", branch=branch)
        vote, fields = self.recalled(key, request_hash)
        if vote is not None:
            self.vote(worker, key, request_hash, vote, **fields)
        return None

    def finish(self, worker, item, owed):
        key = key_of(item)
        holding = self.holdings.setdefault(key, Holding("visiting"))
        holding.finishers.append((worker, item, owed))
        if holding.stage in ("visiting", "prepared", "failed", "backing_off"):
            self.apply(key)

    def apply(self, key):
        """Rule 7: the named branch is committed; every other one is undone."""
        holding = self.holdings[key]
        was = holding.stage
        holding.stage = "finishing"
        item = holding.finishers[0][1]
        outcome, named = item["outcome"], item.get("branch")
        left_by_failure = holding.branch if holding.why_failed is not None else None

        def call():
            branches = {row[2] for row in self.store.held(key)} | {left_by_failure} - {None}
            for branch in sorted(branches):
                if outcome == "COMMITTED" and branch == named:
                    self.store.commit(self.instance, key, branch)
                else:
                    self.store.abort(self.instance, key, branch)

        self.start(call, lambda _, error: self.applied(key, was, outcome, error))

    def applied(self, key, was, outcome, error):
        holding = self.holdings[key]
        if error is not None:
            return self.not_applied(key, holding, was, str(error))
        self.remember(key, ("finished", outcome))
        self.remove(key)
        for worker, request_hash in holding.voters:
            self.vote(worker, key, request_hash, "finished", outcome=outcome)
        for finisher in holding.finishers:
            self.done(*finisher, None)
        # Rule 3: only now, and on the channel of the delivery.
        if holding.slot is not None:
            self.ack(holding.slot)
        return None

    def not_applied(self, key, holding, was, error):
        """The worker decides when to retry; commands from the durable queue are retried here."""
        told = [it for it in holding.finishers if it[2] is None]
        holding.finishers = [it for it in holding.finishers if it[2] is not None]
        if holding.finishers:
            holding.stage = "backing_off"
            self.connection.call_later(RETRY_PARKED_EVERY, lambda: self.try_again(key, holding))
        elif holding.slot is None:
            self.remove(key)
        else:
            holding.stage = "failed" if holding.why_failed is not None else "prepared"
        for finisher in told:
            self.done(*finisher, error)

    def try_again(self, key, holding):
        if self.holdings.get(key) is holding and holding.stage == "backing_off":
            self.apply(key)

    def done(self, worker, item, owed, error):
        done = {"id": item["id"], "requested_at": item["requested_at"], "service": self.service,
                "instance": self.instance, "done": error is None, "free": self.free()}
        if error is not None:
            done["error"] = error
        if not item.get("parked"):
            self.publish(worker, "done", done)
            return self.settle(owed)
        # Rule 8: the done of a parked command is for any worker, and must arrive.
        body = json.dumps([{**done, "parked": True}]).encode()
        properties = pika.BasicProperties(
            content_type="application/json", type="dtc.done.v1", delivery_mode=2)
        key = f"any.{self.service}"
        exchange = f"{self.namespace}.replies"
        return self.publish_surely(exchange, key, body, properties, lambda: self.settle(owed))

    def settle(self, owed):
        if owed is None:
            return
        owed.undone -= 1
        if owed.undone == 0:
            self.ack(owed.delivery)

    # ---- Inquiries ---------------------------------------------------------------------------

    def look_through_store(self):
        """Rule 9: inquires about everything that has been in doubt for long, of any instance."""
        now = time.monotonic()
        doubted = {(row[0], row[1]) + tuple(row[2:]) for row in self.store.held()}
        for key, holding in self.holdings.items():
            if holding.stage == "failed":
                doubted.add((*key, holding.branch, holding.request_hash, holding.deadline))
        self.seen = {it: self.seen.get(it, now) for it in doubted}
        for it, since in self.seen.items():
            if now - since >= self.arguments.inquire_after:
                self.seen[it] = now
                fields = ("id", "requested_at", "branch", "request_hash", "deadline")
                self.publish("any", "inquiry", {
                    **dict(zip(fields, it)), "service": self.service, "instance": self.instance})
        self.connection.call_later(self.arguments.inquire_after / 4, self.look_through_store)

    # ---- Ending ------------------------------------------------------------------------------

    def ack(self, delivery):
        delivery.parts -= 1
        if delivery.parts == 0:
            delivery.channel.basic_ack(delivery.tag)

    def remember(self, key, what):
        self.remembered[key] = what
        while len(self.remembered) > REMEMBERED_MAX:
            self.remembered.popitem(last=False)

    def remove(self, key):
        del self.holdings[key]
        waiting, self.waiting = self.waiting, []
        for it in waiting:
            self.prepare(*it)


class Malformed(Exception):
    """A message is malformed."""


class Delivery:
    """A delivery, acknowledged on its channel when all its items are handled."""

    def __init__(self, channel, tag):
        self.channel, self.tag, self.parts = channel, tag, 1


class Message:
    """Checks that every item of a message has the fields of its kind."""

    NEEDS = {
        "prepare": {"request_hash": str, "data": dict, "deadline": int, "repeated": bool},
        "query": {"request_hash": str},
        "cancel": {},
        "finish": {"outcome": str},
    }

    def __init__(self, channel, method, properties, body):
        self.delivery = Delivery(channel, method.delivery_tag)
        self.redelivered = method.redelivered
        self.properties = properties
        self.kind = (properties.type or "").removeprefix("dtc.").removesuffix(".v1")
        self.undone = 0
        if self.kind not in self.NEEDS:
            raise Malformed(f"the property `type` is `{properties.type}`")
        if len(body) > BODY_MAX:
            raise Malformed(f"the body has {len(body)} bytes: must have at most {BODY_MAX}")
        try:
            self.items = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise Malformed(str(error)) from error
        if not isinstance(self.items, list):
            raise Malformed("must be an array of items")
        needs = {"id": str, "requested_at": int, **self.NEEDS[self.kind]}
        for item in self.items:
            for name, kind in needs.items():
                if not isinstance(item, dict) or not isinstance(item.get(name), kind):
                    raise Malformed(f"`{name}` is missing or no {kind.__name__}")
            if self.kind == "finish" and item["outcome"] not in ("COMMITTED", "ABORTED"):
                raise Malformed("`outcome` must be COMMITTED or ABORTED")

    def worker(self):
        worker = self.properties.reply_to or ""
        if not re.fullmatch("[A-Za-z0-9_-]{1,64}", worker):
            raise Malformed("the property `reply_to` must be the worker's id")
        return worker


def key_of(item):
    return item["id"], item["requested_at"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--broker", default=os.environ.get("DTC__BROKER__URL"))
    parser.add_argument("--namespace", default="dtc")
    parser.add_argument("--name", required=True)
    parser.add_argument("--label", default="py", help="what the instance's id begins with")
    parser.add_argument("--state", required=True)
    parser.add_argument("--max-concurrency", type=int, default=10)
    parser.add_argument("--inquire-after", type=float, default=10.0)
    parser.add_argument("--drain", type=float, default=25.0)
    parser.add_argument("--show", action="store_true", help="print what the store holds, and end")
    arguments = parser.parse_args()
    store = Store(arguments.state, arguments.name)
    if arguments.show:
        return store.show()
    stopping = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.append(True))
    while not stopping:
        try:
            Session(store, arguments).serve(lambda: bool(stopping))
        except (AMQPConnectionError, AMQPChannelError) as error:
            print(f"connecting again: {error!r}", file=sys.stderr, flush=True)
            time.sleep(0.5)
    return None


if __name__ == "__main__":
    main()
