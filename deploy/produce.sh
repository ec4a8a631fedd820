#!/bin/sh
# produce.sh FIFO: submits five orders a second, and prints the result of each, until it gets a
# signal.
#
# The orders go through a FIFO, which this script creates, so that `dtc submit` can replace this
# process and receive its signals: it then submits no more, waits for the results of what it has
# submitted, and exits.

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
