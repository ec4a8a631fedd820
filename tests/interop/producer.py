"""A producer of `dtc` in Python: publishes requests, several in a message, and prints a line of JSON for
each result.

    producer.py --broker URL [--namespace NAME] [--requested-at SECONDS] < transactions.json

It ends with 0 when all are answered, with 1 when some are not in time.
"""

import argparse
import json
import secrets
import sys
import time

import pika

# What a message may hold.
REQUESTS_MAX = 64
BODY_MAX = 256 * 1024


def batches(requests):
    """The bodies of the messages for these requests, which are JSON texts: arrays of as many as fit."""
    batch, size = [], 2
    for request in requests:
        if batch and (len(batch) == REQUESTS_MAX or size + len(request) + 1 > BODY_MAX):
            yield b"[" + b",".join(batch) + b"]"
            batch, size = [], 2
        batch.append(request)
        size += len(request) + 1
    # A request that is alone needs no array; either would do.
    yield batch[0] if len(batch) == 1 else b"[" + b",".join(batch) + b"]"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--broker", required=True)
    parser.add_argument("--namespace", default="dtc")
    parser.add_argument("--requested-at", type=int, default=None)
    parser.add_argument("--timeout", type=float, default=60.0)
    arguments = parser.parse_args()
    transactions = json.load(sys.stdin)

    connection = pika.BlockingConnection(pika.URLParameters(arguments.broker))
    # The results queue is bound before any request is published.
    reply = f"py-{secrets.token_hex(6)}"
    results = connection.channel()
    queue = f"{arguments.namespace}.results.{reply}"
    results.queue_declare(queue, exclusive=True)
    results.queue_bind(queue, f"{arguments.namespace}.results", f"{reply}.*")
    requests = connection.channel()
    requests.confirm_delivery()
    waiting = {transaction["id"] for transaction in transactions}
    texts = [json.dumps({**transaction, "reply": reply}).encode() for transaction in transactions]
    for body in batches(texts):
        requests.basic_publish(
            f"{arguments.namespace}.requests",
            "request",
            body,
            pika.BasicProperties(
                content_type="application/json",
                type="dtc.request.v1",
                delivery_mode=2,
                # A retry, after a time-out or a crash, has the same timestamp.
                timestamp=arguments.requested_at or int(time.time()),
            ),
            mandatory=True,
        )
    print("sent", file=sys.stderr, flush=True)
    until = time.monotonic() + arguments.timeout
    for method, _, body in results.consume(queue, inactivity_timeout=0.2):
        if method is not None:
            results.basic_ack(method.delivery_tag)
            for item in json.loads(body):
                # A result may arrive twice.
                if item["id"] in waiting:
                    waiting.discard(item["id"])
                    print(json.dumps(item), flush=True)
        if not waiting or time.monotonic() > until:
            break
    connection.close()
    sys.exit(1 if waiting else 0)


if __name__ == "__main__":
    main()
