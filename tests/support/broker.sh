# Runs one RabbitMQ node and its epmd, for as long as whoever started it lives.
#
#   sh broker.sh DATA ROOT [COMMAND...]
#
# DATA is the node's directory; with a ROOT, the node is that one's, and DATA is what it sees as
# /mnt. What the node prints is what this prints. Commands come on standard input, a word a line:
#
#   terminate  asks the node to stop
#   kill       kills everything (-9), and ends
#
# With a COMMAND, nothing else is done than to run that one, where the node would run.
#
# If the input ends instead, then who started this has died: everything is killed, and DATA removed.

data=$1
root=$2
exec 3<&0 </dev/null

# The mounts are seen by nobody else, and go with the last process that has them.
# shellcheck disable=SC2016 # the inner shell expands them
enter='mount --rbind /proc "$1/proc" && mount --rbind /dev "$1/dev" &&
    mount --bind "$2" "$1/mnt" && cd / && root=$1 && shift 2 && exec chroot "$root" "$@"'
node() {
    if [ -z "$root" ]; then
        exec setsid "$@"
    elif [ "$(id -u)" = 0 ]; then
        exec setsid unshare --mount sh -c "$enter" enter "$root" "$data" "$@"
    else
        exec setsid unshare --map-root-user --mount sh -c "$enter" enter "$root" "$data" "$@"
    fi
}

if [ $# -gt 2 ]; then
    shift 2
    node "$@"
fi

node epmd -address 127.0.0.1 -port "$ERL_EPMD_PORT" >/dev/null 2>&1 3<&- &
epmd=$!
node /usr/lib/rabbitmq/bin/rabbitmq-server 3<&- &
node=$!
# The output's end is to tell that the node has gone.
exec >/dev/null 2>&1

kill_all() {
    # Each leads a group, unless it was started this very moment.
    for process in "-$node" "$node" "-$epmd" "$epmd"; do
        kill -s KILL -- "$process"
    done
    wait
}

while read -r word <&3; do
    case $word in
        terminate) kill -TERM "$node" ;;
        kill)
            kill_all
            exit 0
            ;;
    esac
done
kill_all
rm -rf -- "$data"
