//! Three RabbitMQ nodes, each on its host, and what an operator does with them.
//!
//! They run in a view of the chroot without copying it: it is bound read-only into this process's
//! mount namespace, with its own /mnt, /tmp and /etc/hosts for this run.

use std::{
    fs,
    net::{SocketAddr, TcpStream},
    os::unix::{fs::PermissionsExt, process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};

use crate::network::{NODES, Network, address, run};

/// How long a node may take to boot, and a cluster to form.
const BOOT: Duration = Duration::from_secs(150);
/// How long a node may take to stop.
const STOP: Duration = Duration::from_secs(60);
/// How long a command of an operator may take.
const COMMAND: Duration = Duration::from_secs(25);
/// How long to wait before checking again for something that isn't there yet.
const AGAIN_AFTER: Duration = Duration::from_millis(100);
/// The broker's port.
pub(crate) const PORT: u16 = 5672;
/// A file system large enough for one run.
const SIZE: &str = "size=6g";
const BIN: &str = "/usr/lib/rabbitmq/bin";
/// The script that an operator runs beside each node, and its path there.
const WATCHER: &str = include_str!("../../deploy/watch-streams.sh");
const WATCHER_FILE: &str = "watch-streams.sh";

/// The nodes.
pub(crate) struct Nodes {
    /// Their root of the file system.
    root: PathBuf,
    /// The directory that they see as /mnt.
    data: PathBuf,
    nodes: Vec<Node>,
}

/// A node's process, while it runs.
#[derive(Default)]
struct Node {
    child: Option<Child>,
}

/// A queue as the cluster reports it.
#[derive(Clone, Debug)]
pub(crate) struct Queue {
    /// Its name without the namespace.
    pub(crate) name: String,
    pub(crate) kind: String,
    /// The node of its leader, or of the queue.
    pub(crate) node: String,
    pub(crate) ready: u64,
    pub(crate) unacked: u64,
    pub(crate) consumers: u64,
    pub(crate) state: String,
}

impl Nodes {
    /// Mounts what the nodes need, without starting them.
    ///
    /// `chroot` has RabbitMQ, and is not changed. All mounts are in `directory`.
    pub(crate) fn mount(chroot: &Path, directory: &Path) -> Result<Self> {
        let (root, data) = (directory.join("root"), directory.join("data"));
        fs::create_dir(&root)?;
        fs::create_dir(&data)?;
        let hosts = directory.join("hosts");
        let lines = NODES.map(|node| format!("{} {node}\n", address(node))).concat();
        fs::write(&hosts, format!("127.0.0.1 localhost\n{lines}"))?;
        mount(&["--bind"], chroot, &root)?;
        mount(&["-o", "remount,bind,ro"], chroot, &root)?;
        mount(&["--rbind"], Path::new("/proc"), &root.join("proc"))?;
        mount(&["--rbind"], Path::new("/dev"), &root.join("dev"))?;
        fs::write(data.join(WATCHER_FILE), WATCHER)?;
        mount(&["--bind"], &data, &root.join("mnt"))?;
        mount(&["--bind"], &hosts, &root.join("etc/hosts"))?;
        mount(&["-t", "tmpfs"], Path::new("tmpfs"), &root.join("tmp"))?;
        let nodes = NODES.map(|_| Node::default());
        Ok(Self { root, data, nodes: nodes.into() })
    }

    /// Forms a cluster of empty nodes.
    pub(crate) fn form(&mut self, network: &Network) -> Result<()> {
        for name in NODES {
            self.kill(name)?;
            self.clear(name)?;
        }
        for name in NODES {
            self.start(network, name)?;
        }
        for name in NODES {
            self.wait_until_up(name)?;
        }
        let waited = until(BOOT, || Ok(self.knows_all(network)))?;
        ensure!(waited, "the nodes don't find each other within {BOOT:?}");
        Ok(())
    }

    /// Deletes all data of a node.
    pub(crate) fn clear(&self, name: &str) -> Result<()> {
        let directory = self.data.join(name);
        if directory.exists() {
            fs::remove_dir_all(&directory)?;
        }
        for part in ["home", "mnesia", "log", "generated"] {
            fs::create_dir_all(directory.join(part))?;
        }
        let cookie = directory.join("home/.erlang.cookie");
        fs::write(&cookie, "dtc-test-cluster")?;
        fs::set_permissions(&cookie, fs::Permissions::from_mode(0o400))?;
        fs::write(directory.join("plugins"), "[].")?;
        let peers = NODES.iter().enumerate().map(|(index, node)| {
            let number = index + 1;
            format!("cluster_formation.classic_config.nodes.{number} = rabbit@{node}\n")
        });
        let peers: String = peers.collect();
        let config = format!(
            "listeners.tcp.default = {PORT}\n\
             loopback_users = none\n\
             cluster_formation.peer_discovery_backend = classic_config\n\
             {peers}\
             net_ticktime = 10\n\
             consumer_disconnected_timeout = 5000\n\
             queue_leader_locator = balanced\n\
             log.file.level = info\n\
             vm_memory_high_watermark.absolute = 1GB\n\
             disk_free_limit.absolute = 50MB\n"
        );
        Ok(fs::write(directory.join("rabbitmq.conf"), config)?)
    }

    /// A command in a node's environment.
    fn at(&self, network: &Network, name: &str, program: &str) -> Command {
        let mnt = format!("/mnt/{name}");
        let variables = [
            ("PATH", format!("{BIN}:/usr/sbin:/usr/bin:/sbin:/bin")),
            ("LANG", "C.UTF-8".to_owned()),
            ("HOME", format!("{mnt}/home")),
            ("RABBITMQ_NODENAME", format!("rabbit@{name}")),
            ("RABBITMQ_CONFIG_FILE", format!("{mnt}/rabbitmq.conf")),
            ("RABBITMQ_MNESIA_BASE", format!("{mnt}/mnesia")),
            ("RABBITMQ_LOG_BASE", format!("{mnt}/log")),
            ("RABBITMQ_ENABLED_PLUGINS_FILE", format!("{mnt}/plugins")),
            ("RABBITMQ_GENERATED_CONFIG_DIR", format!("{mnt}/generated")),
            ("RABBITMQ_PID_FILE", format!("{mnt}/pid")),
            // Three nodes share few cores: none may busy-wait.
            (
                "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS",
                "+sbwt none +sbwtdcpu none +sbwtdio none +S 2:2 -kernel net_setuptime 2".to_owned(),
            ),
            ("RABBITMQ_CTL_ERL_ARGS", "+sbwt none +S 1:1".to_owned()),
        ];
        let mut command = network.at(name, "chroot");
        command.arg(&self.root).args(["env", "-i"]);
        command.args(variables.map(|(name, value)| format!("{name}={value}")));
        command.arg(program);
        command
    }

    /// Starts a node that is down.
    pub(crate) fn start(&mut self, network: &Network, name: &str) -> Result<()> {
        let output = fs::File::create(self.data.join(name).join("output"))?;
        let mut command = self.at(network, name, &format!("{BIN}/rabbitmq-server"));
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output).process_group(0);
        let child = command.spawn().context("the node can't be started")?;
        self.node(name).child = Some(child);
        Ok(())
    }

    /// Waits until a node accepts connections.
    pub(crate) fn wait_until_up(&mut self, name: &str) -> Result<()> {
        let started = Instant::now();
        while !is_up(name) {
            let child = self.node(name).child.as_mut().context("nobody started the node")?;
            let ended = child.try_wait()?;
            if ended.is_some() || started.elapsed() > BOOT {
                let output = fs::read_to_string(self.data.join(name).join("output"));
                bail!(
                    "{name} doesn't come up ({ended:?}):\n{}",
                    tail(&output.unwrap_or_default(), 30)
                );
            }
            thread::sleep(AGAIN_AFTER);
        }
        Ok(())
    }

    /// Kills a node: only what it has written remains.
    pub(crate) fn kill(&mut self, name: &str) -> Result<()> {
        let Some(mut child) = self.node(name).child.take() else { return Ok(()) };
        // The group is gone if the node has ended by itself.
        let _ = killpg(group(&child)?, Signal::SIGKILL);
        child.wait()?;
        Ok(())
    }

    /// Stops a node as an operator does, and waits for its end.
    pub(crate) fn stop(&mut self, name: &str) -> Result<()> {
        let Some(mut child) = self.node(name).child.take() else { return Ok(()) };
        nix::sys::signal::kill(group(&child)?, Signal::SIGTERM)?;
        let started = Instant::now();
        while child.try_wait()?.is_none() {
            if started.elapsed() > STOP {
                let _ = killpg(group(&child)?, Signal::SIGKILL);
                child.wait()?;
                bail!("{name} doesn't stop within {STOP:?}");
            }
            thread::sleep(AGAIN_AFTER);
        }
        // Its helpers end with it, but nobody waits for them.
        let _ = killpg(group(&child)?, Signal::SIGKILL);
        Ok(())
    }

    /// Whether every node runs, and all see each other.
    pub(crate) fn are_well(&mut self, network: &Network) -> bool {
        let running = |node: &mut Node| {
            node.child.as_mut().is_some_and(|child| matches!(child.try_wait(), Ok(None)))
        };
        self.nodes.iter_mut().all(running)
            && NODES.iter().all(|name| is_up(name))
            && self.knows_all(network)
            && self.all_coordinate_streams(network)
    }

    /// Whether the first node sees the others.
    fn knows_all(&self, network: &Network) -> bool {
        self.ctl(network, NODES[0], &["await_online_nodes", "3", "-t", "10"]).is_ok()
    }

    /// Whether all nodes take part in coordinating streams. A node that replaces a lost one does so
    /// only minutes later (RabbitMQ 4.3.6), and until then all streams stop with any other node.
    fn all_coordinate_streams(&self, network: &Network) -> bool {
        let asked = self.tool(network, NODES[0], "rabbitmq-streams", &["coordinator_status"]);
        // There is none until the first stream is declared.
        asked.map_or(true, |table| {
            let has_part = |name: &&str| {
                let node = format!("rabbit@{name} ");
                let states = ["leader", "follower"];
                let has_state = |line: &str| states.iter().any(|state| line.contains(state));
                table.lines().any(|line| line.contains(&node) && has_state(line))
            };
            NODES.iter().all(has_part)
        })
    }

    /// Runs `rabbitmqctl` at a node.
    pub(crate) fn ctl(&self, network: &Network, name: &str, words: &[&str]) -> Result<String> {
        self.tool(network, name, "rabbitmqctl", words)
    }

    /// Runs one of RabbitMQ's tools at a node; returns what it prints.
    pub(crate) fn tool(
        &self,
        network: &Network,
        name: &str,
        tool: &str,
        words: &[&str],
    ) -> Result<String> {
        let limit = COMMAND.as_secs().to_string();
        let mut command = self.at(network, name, "timeout");
        command.args(["-k", "1", &limit, &format!("{BIN}/{tool}"), "-q"]).args(words);
        let output = command.stdin(Stdio::null()).output().context("it can't be started")?;
        let printed = String::from_utf8_lossy(&output.stdout).into_owned();
        if !output.status.success() {
            let complaint = String::from_utf8_lossy(&output.stderr);
            let complaint = tail(complaint.trim_end(), 3);
            let words = words.join(" ");
            // After a partition, a node may answer in part, and then never again.
            let ended = match output.status.code() {
                Some(124) => format!("didn't end within {COMMAND:?}"),
                _ => format!("ended with {}", output.status),
            };
            bail!("`{tool} {words}` at {name} {ended}: {complaint}{}", tail(&printed, 3));
        }
        Ok(printed)
    }

    /// Starts a watcher of a stream beside a node, in its own process group.
    pub(crate) fn watcher(&self, network: &Network, name: &str, stream: &str) -> Command {
        let mut command = self.at(network, name, "sh");
        command.arg(format!("/mnt/{WATCHER_FILE}")).arg(stream).process_group(0);
        command
    }

    /// The queues of a namespace, as reported by the first node that is up.
    pub(crate) fn queues(&self, network: &Network, namespace: &str) -> Result<Vec<Queue>> {
        let columns = "name type leader pid messages_ready messages_unacknowledged consumers state";
        let words: Vec<_> =
            ["list_queues", "--no-table-headers"].into_iter().chain(columns.split(' ')).collect();
        let printed = self.ctl(network, self.one_up()?, &words)?;
        Ok(printed.lines().filter_map(|line| queue(line, namespace)).collect())
    }

    /// Runs a command where a node would run.
    pub(crate) fn try_out(&self, network: &Network) -> Result<()> {
        let name = NODES[0];
        let kept = self.data.join("tried");
        run(self.at(network, name, "touch").arg("/mnt/tried"))?;
        ensure!(kept.exists(), "what a node writes isn't seen");
        Ok(())
    }

    /// The version of RabbitMQ in the chroot.
    pub(crate) fn version(&self) -> Result<String> {
        let libraries = fs::read_dir(self.root.join("usr/lib/rabbitmq/lib"))?;
        let names = libraries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let mut versions =
            names.filter_map(|name| name.strip_prefix("rabbitmq_server-").map(str::to_owned));
        versions.next().context("no version in the chroot")
    }

    /// A node that accepts connections.
    pub(crate) fn one_up(&self) -> Result<&'static str> {
        NODES.into_iter().find(|name| is_up(name)).context("no node is up")
    }

    /// The end of a node's log.
    pub(crate) fn log(&self, name: &str) -> String {
        let path = self.data.join(name).join(format!("log/rabbit@{name}.log"));
        fs::read_to_string(path).unwrap_or_default()
    }

    fn node(&mut self, name: &str) -> &mut Node {
        let index = NODES.iter().position(|node| *node == name).unwrap_or_default();
        &mut self.nodes[index]
    }
}

/// The root of this run's mounts: it is gone with the last process that sees it.
pub(crate) fn scratch(directory: &Path) -> Result<()> {
    fs::create_dir_all(directory)?;
    mount(&["--make-rprivate"], Path::new(""), Path::new("/"))?;
    mount(&["-t", "tmpfs", "-o", SIZE], Path::new("tmpfs"), directory)
}

fn mount(flags: &[&str], what: &Path, place: &Path) -> Result<()> {
    let mut command = Command::new("mount");
    command.args(flags);
    if what != Path::new("") {
        command.arg(what);
    }
    run(command.arg(place)).map(drop)
}

/// Checked from the observer, which is never cut off.
fn is_up(name: &str) -> bool {
    let Ok(address) = format!("{}:{PORT}", address(name)).parse::<SocketAddr>() else {
        return false;
    };
    TcpStream::connect_timeout(&address, Duration::from_secs(2)).is_ok()
}

fn group(child: &Child) -> Result<Pid> {
    Ok(Pid::from_raw(i32::try_from(child.id())?))
}

/// A line of `list_queues`, if it is about this namespace.
fn queue(line: &str, namespace: &str) -> Option<Queue> {
    let fields: Vec<_> = line.split('\t').collect();
    let [name, kind, leader, pid, ready, unacked, consumers, state] = fields[..] else {
        return None;
    };
    let name = name.strip_prefix(namespace)?.strip_prefix('.')?;
    let place = if leader.is_empty() { pid } else { leader };
    let node = NODES.into_iter().find(|node| place.contains(&format!("rabbit@{node}")));
    Some(Queue {
        name: name.to_owned(),
        kind: kind.to_owned(),
        node: node.unwrap_or("?").to_owned(),
        ready: ready.parse().unwrap_or(0),
        unacked: unacked.parse().unwrap_or(0),
        consumers: consumers.parse().unwrap_or(0),
        state: state.to_owned(),
    })
}

/// The last lines of a text.
pub(crate) fn tail(text: &str, count: usize) -> String {
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

/// Polls until it is so, for a limited time.
pub(crate) fn until(limit: Duration, mut is_so: impl FnMut() -> Result<bool>) -> Result<bool> {
    let started = Instant::now();
    loop {
        if is_so()? {
            return Ok(true);
        }
        if started.elapsed() > limit {
            return Ok(false);
        }
        thread::sleep(AGAIN_AFTER);
    }
}
