# Runs one RabbitMQ node and its epmd, as long as the process that started this script lives.
#
#   sh broker.sh DATA ROOT [COMMAND...]
#
# DATA is the node's directory. With a ROOT, the node runs in that chroot, and sees DATA as /mnt.
# The script prints what the node prints. It reads commands from standard input, one word per line:
#
#   terminate  asks the node to stop
#   (SIGTERM) kill kills everything (SIGKILL), and exits
#
# With a COMMAND, it only runs that command, where the node would run.
#
# If the input ends instead, the process that started this has died: the script kills everything and
# removes DATA.

data=$1
root=$2
exec 3<&0 </dev/null

# No other process sees the mounts; they end with the last process in their namespace.
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
# The end of the output shows the caller that the node has ended.
exec >/dev/null 2>&1

kill_all() {
    # Each leads a process group, except just after its start.
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
