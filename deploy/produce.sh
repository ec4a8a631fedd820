#!/bin/sh
# produce.sh FIFO: submits five orders a second, and prints what became of each, until told to stop.
#
# The orders go through a FIFO, made here, so that `dtc submit` takes this process's place and hears
# its signals: it then submits no more, waits for what it has submitted, and ends.

set -eu

orders=$1
began=$(date +%s)

produce() {
    number=0
    while :; do
        number=$((number + 1))
        printf '{"id":"order-%s-%s","involved_services":["inventory","payments","shipping"],"data":{"amount":%s}}\n' \
            "$began" "$number" $((number % 100 + 1))
        sleep 0.2
    done
}

rm -f -- "$orders"
mkfifo -- "$orders"
produce >"$orders" &
exec dtc submit --wait --timeout 25s --output ndjson "$orders"
