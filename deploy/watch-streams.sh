#!/bin/sh
# Restarts a stream of dtc's when RabbitMQ has left a replica of it down. `--help` says how.

set -u

usage() {
    cat <<'HELP'
usage: watch-streams.sh [--every SECONDS] [--vhost NAME] [--once] [STREAM]...

Run it beside each node of a RabbitMQ cluster, as the node's user, where RabbitMQ's tools and the
node's Erlang cookie are: as a service of the host, or as a container of the same image beside the
node's. It needs nothing of dtc's. A look costs what any call of `rabbitmqctl` costs, some 0.7 s of CPU.
It asks by `rabbitmqctl eval` what no command of the tools tells, and was tried with RabbitMQ 4.3.6.

A replica of a stream is down if its node runs and it does not. One that is down two looks in a row
is started by `rabbitmq-streams restart_stream`, which stops writes for about a second. If that
doesn't help, it is done again after 1, 2, 4, 8 and then every 16 minutes. The second node's watcher
waits one look more, and the third's two: so one of them restarts the stream and not all.

  STREAM            the streams to be watched (dtc.journal dtc.journal.packed dtc.unresolved
                    dtc.audit); one that doesn't exist is left alone
  --every SECONDS   how long to wait between two looks (15)
  --vhost NAME      where the streams are (/)
  --once            looks once, prints the replicas that are down, and ends: 0 if there are none, 1 if
                    there are some, 69 if the node doesn't tell
  --help            this text

The variables of RabbitMQ's tools hold here too: RABBITMQ_NODENAME names a node that isn't
rabbit@<this host>.
HELP
}

every=15
vhost=/
once=
# How many looks in a row must find the same replicas down.
looks=2
# The first pause between two restarts that didn't help, and the longest, in seconds.
pause_first=60
pause_max=960
# How long one of RabbitMQ's tools may take, in seconds.
limit=60

wrong() {
    echo "watch-streams.sh: $1; see --help" >&2
    exit 2
}

while [ $# -gt 0 ]; do
    case $1 in
        --every)
            every=${2-}
            case $every in '' | *[!0-9]* | 0*) wrong "--every wants a number of seconds, not \`$every\`" ;; esac
            shift
            ;;
        --vhost)
            vhost=${2-}
            [ -n "$vhost" ] || wrong '--vhost wants a name'
            shift
            ;;
        --once) once=yes ;;
        --help | -h)
            usage
            exit 0
            ;;
        -*) wrong "unknown flag \`$1\`" ;;
        *) break ;;
    esac
    shift
done
if [ $# -eq 0 ]; then set -- dtc.journal dtc.journal.packed dtc.unresolved dtc.audit; fi
for name in "$vhost" "$@"; do
    case $name in *[!A-Za-z0-9._/:-]*) wrong "\`$name\` has a character that is not watched for" ;; esac
done

say() {
    echo "$(date -u +%Y-%m-%dT%H:%M:%SZ) $*" >&2
}

# The names as a list of Erlang's.
listed=$(printf '<<"%s">>,' "$@")
listed=${listed%,}

told=$(mktemp) || exit 73
child=
trap 'rm -f "$told"' EXIT
trap 'end 130' INT
trap 'end 143' TERM

# end STATUS: what was asked for ends, too.
end() {
    if [ -n "$child" ]; then kill "$child" 2>/dev/null; fi
    exit "$1"
}

# tool SECONDS COMMAND...: for so long at most; what it prints is in $told. A shell hears no signal
# while it waits for a command, unless by `wait`.
tool() {
    timeout -k 5 "$@" >"$told" 2>&1 &
    child=$!
    wait "$child"
    status=$?
    child=
    return "$status"
}

rest() {
    sleep "$every" &
    child=$!
    wait "$child"
    child=
}

# Has the node look: $told has a line `down STREAM NODE` for each replica that is down, and then a line
# `looked BEFORE`, with how many nodes that run come before this one.
#
# Each node that runs is asked what it asks itself when somebody consumes the stream there: whether it
# knows of a replica of its own that runs. One that can't answer now is no node whose replica is down.
look() {
    tool "$limit" rabbitmqctl --quiet eval "
        Running = rabbit_nodes:list_running(),
        Down = fun(Stream) ->
            case rabbit_amqqueue:lookup(rabbit_misc:r(<<\"$vhost\">>, queue, Stream)) of
                {ok, Q} ->
                    #{name := Id, nodes := Members} = amqqueue:get_type_state(Q),
                    IsDown = fun(N) ->
                        case catch erpc:call(N, rabbit_stream_coordinator, local_pid, [Id], 10000) of
                            {error, _} -> true;
                            _ -> false
                        end
                    end,
                    [N || N <- Members, lists:member(N, Running), IsDown(N)];
                _ -> []
            end
        end,
        [io:format(\"down ~s ~s~n\", [Stream, N]) || Stream <- [$listed], N <- Down(Stream)],
        io:format(\"looked ~b~n\", [length([N || N <- Running, N < node()])]).
    "
}

down() {
    sed -n 's/^down //p' "$told"
}

has_looked() {
    grep -q '^looked [0-9]' "$told"
}

if [ -n "$once" ]; then
    look
    if ! has_looked; then
        echo "watch-streams.sh: the node doesn't tell which replicas run: $(head -n 1 "$told")" >&2
        exit 69
    fi
    down
    if [ -n "$(down)" ]; then exit 1; fi
    exit 0
fi

say "INFO watching $*, every $every s"
# What the last look found, and in how many looks.
found=
count=0
# The last pause after a restart, and when it is over.
pause=0
wait_until=0
unable=
while :; do
    look
    if ! has_looked; then
        if [ -z "$unable" ]; then
            say "WARN the node doesn't tell which replicas run; it is asked again: $(head -n 1 "$told")"
        fi
        unable=yes count=0 found=
        rest
        continue
    fi
    if [ -n "$unable" ]; then say 'INFO the node tells again which replicas run'; fi
    unable=
    if [ "$(down)" = "$found" ]; then count=$((count + 1)); else count=1; fi
    found=$(down)
    if [ -z "$found" ]; then
        if [ "$pause" -gt 0 ]; then say 'INFO all replicas run again'; fi
        pause=0 wait_until=0
        rest
        continue
    fi
    before=$(sed -n 's/^looked //p' "$told")
    if [ "$count" -lt $((looks + before)) ] || [ "$(date +%s)" -lt "$wait_until" ]; then
        rest
        continue
    fi
    for stream in $(echo "$found" | cut -d ' ' -f 1 | sort -u); do
        nodes=$(echo "$found" | sed -n "s|^$stream ||p" | tr '\n' ' ')
        say "WARN $stream has no running replica at ${nodes% }, though the node runs: it is restarted"
        tool "$limit" rabbitmq-streams --quiet restart_stream --vhost "$vhost" "$stream" ||
            say "ERROR $stream can't be restarted: $(head -n 1 "$told")"
    done
    pause=$((pause * 2))
    if [ "$pause" -lt "$pause_first" ]; then pause=$pause_first; fi
    if [ "$pause" -gt "$pause_max" ]; then pause=$pause_max; fi
    wait_until=$(($(date +%s) + pause))
    rest
done
