#!/bin/sh
# Restarts a stream of dtc when RabbitMQ has left a replica of it down. See `--help`.

set -u

usage() {
    cat <<'HELP'
usage: watch-streams.sh [--every SECONDS] [--vhost NAME] [--once] [STREAM]...

Run it beside each node of a RabbitMQ cluster, as the node's user, where RabbitMQ's tools and the
node's Erlang cookie are: as a service of the host, or as a container of the same image beside the
node's. It does not need dtc. A look costs as much as any call of `rabbitmqctl`, some 0.7 s of CPU.
It uses `rabbitmqctl eval`, since no command reports the state of replicas; tested with RabbitMQ 4.3.6.
The functions that it calls there are not public: if a release lacks one, the script logs once which,
and what it does not find without it, and goes on.

A replica of a stream is down if its node runs and it does not. If one is down in two looks in a row,
`rabbitmq-streams restart_stream` starts it, which stops writes for about a second. If that doesn't
help, the script repeats it after 1, 2, 4, 8 and then every 16 minutes. The second node's watcher
waits one look more, and the third's two, so that only one of them restarts the stream.

  STREAM            the streams to watch (dtc.journal dtc.journal.packed dtc.unresolved dtc.audit);
                    one that doesn't exist is left alone
  --every SECONDS   how long to wait between two looks, in seconds (15)
  --vhost NAME      where the streams are (/)
  --once            look once, print the replicas that are down, and exit: 0 if there are none, 1 if
                    there are some, 69 if that isn't known: the node doesn't answer, or RabbitMQ lacks
                    a function that is asked for
  --help            print this text

The environment variables of RabbitMQ's tools apply: RABBITMQ_NODENAME names a node that isn't
rabbit@<this host>.
HELP
}

every=15
vhost=/
once=
# How many looks in a row must find the same replicas down before a restart.
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
            case $every in '' | *[!0-9]* | 0*) wrong "--every must be a number of seconds, not \`$every\`" ;; esac
            shift
            ;;
        --vhost)
            vhost=${2-}
            [ -n "$vhost" ] || wrong '--vhost must be a name'
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

# The names as an Erlang list.
listed=$(printf '<<"%s">>,' "$@")
listed=${listed%,}

told=$(mktemp) || exit 73
child=
trap 'rm -f "$told"' EXIT
trap 'end 130' INT
trap 'end 143' TERM

# end STATUS: exits, and ends a tool that is still running.
end() {
    if [ -n "$child" ]; then kill "$child" 2>/dev/null; fi
    exit "$1"
}

# tool SECONDS COMMAND...: runs it for so long at most; its output is in $told. A shell handles a
# signal while a command runs only if it waits for it by `wait`.
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

# Asks the node: $told gets a line `down STREAM NODE` for each replica that is down, and then a line
# `looked BEFORE`, where BEFORE is how many running nodes sort before this one. If the release of a
# node lacks a function, $told gets a line `lacks NODE FUNCTION`; without one of this node's own, no
# other line.
#
# It asks each running node what RabbitMQ itself asks when a client consumes the stream there:
# whether the node knows a running replica of its own. A node that can't answer doesn't count as one
# whose replica is down.
look() {
    tool "$limit" rabbitmqctl --quiet eval "
        Lacks = fun(N, M, F, A) -> io:format(\"lacks ~s ~s:~s/~b~n\", [N, M, F, A]) end,
        Look = fun() ->
            Running = rabbit_nodes:list_running(),
            Down = fun(Stream) ->
                case rabbit_amqqueue:lookup(rabbit_misc:r(<<\"$vhost\">>, queue, Stream)) of
                    {ok, Q} ->
                        #{name := Id, nodes := Members} = amqqueue:get_type_state(Q),
                        IsDown = fun(N) ->
                            case catch erpc:call(N, rabbit_stream_coordinator, local_pid, [Id], 10000) of
                                {error, _} -> true;
                                {'EXIT', {{exception, undef, [{M, F, As, _} | _]}, _}} ->
                                    Lacks(N, M, F, length(As)),
                                    false;
                                _ -> false
                            end
                        end,
                        [N || N <- Members, lists:member(N, Running), IsDown(N)];
                    _ -> []
                end
            end,
            [io:format(\"down ~s ~s~n\", [Stream, N]) || Stream <- [$listed], N <- Down(Stream)],
            io:format(\"looked ~b~n\", [length([N || N <- Running, N < node()])])
        end,
        Own = [{rabbit_nodes, list_running, 0}, {rabbit_amqqueue, lookup, 1},
            {rabbit_misc, r, 3}, {amqqueue, get_type_state, 1}],
        Lacking = [It || {M, F, A} = It <- Own,
            element(1, code:ensure_loaded(M)) =:= error orelse not erlang:function_exported(M, F, A)],
        case Lacking of
            [] -> Look();
            _ -> [Lacks(node(), M, F, A) || {M, F, A} <- Lacking]
        end.
    "
}

down() {
    sed -n 's/^down //p' "$told"
}

has_looked() {
    grep -q '^looked [0-9]' "$told"
}

# A line `NODE FUNCTION` for each function that a node's release lacks.
lacking() {
    sed -n 's/^lacks //p' "$told" | sort -u
}

# What it means that each of them is missing.
meaning() {
    if has_looked; then
        what='a replica that is down there is not found, and its stream is not restarted'
    else
        what='no replica that is down is found, and no stream is restarted'
    fi
    lacking | while read -r node function; do
        echo "RabbitMQ at $node has no $function: $what; use a watcher that is tested with this" \
            "release, and until then look at \`rabbitmq-streams stream_status STREAM\`"
    done
}

if [ -n "$once" ]; then
    look
    if [ -n "$(lacking)" ]; then
        meaning | sed 's/^/watch-streams.sh: /' >&2
    elif ! has_looked; then
        echo "watch-streams.sh: the node doesn't tell which replicas run: $(head -n 1 "$told")" >&2
        exit 69
    fi
    down
    if [ -n "$(down)" ]; then exit 1; fi
    if [ -n "$(lacking)" ]; then exit 69; fi
    exit 0
fi

say "INFO watching $*, every $every s"
# What the last look found, and how many looks in a row found it.
found=
count=0
# The last pause after a restart, and when it is over.
pause=0
wait_until=0
unable=
# What was missing when that was last logged.
lacked=
while :; do
    look
    if [ "$(lacking)" != "$lacked" ] && { has_looked || [ -n "$(lacking)" ]; }; then
        meaning | while read -r line; do say "WARN $line"; done
        lacked=$(lacking)
        if [ -z "$lacked" ]; then say 'INFO RabbitMQ has every function that is asked for now'; fi
    fi
    if ! has_looked; then
        if [ -z "$unable" ] && [ -z "$(lacking)" ]; then
            say "WARN the node doesn't tell which replicas run; it is asked again: $(head -n 1 "$told")"
        fi
        if [ -z "$(lacking)" ]; then unable=yes; fi
        count=0 found=
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
