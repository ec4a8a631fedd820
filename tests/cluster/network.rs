//! The network: hosts in separate network namespaces, and the switch between them.
//!
//! [`HOSTS`] are three nodes, the clients, and clients that can be cut off together with a node.
//! The observer is this process itself: it reaches every node whatever is cut between the others.

use std::{
    io::{BufRead, BufReader, Write},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};

use crate::switch::{Link, Switch};

/// The hosts, in the order of their ports and addresses. The last one is the observer.
pub(crate) const HOSTS: [&str; 6] = [N1, N2, N3, CLIENTS, AWAY, OBSERVER];
/// The nodes of the cluster.
pub(crate) const NODES: [&str; 3] = [N1, N2, N3];
const N1: &str = "n1";
const N2: &str = "n2";
const N3: &str = "n3";
/// The host of workers, services and producers.
pub(crate) const CLIENTS: &str = "cl";
/// The host of those that are on the side of a minority.
pub(crate) const AWAY: &str = "cm";
const OBSERVER: &str = "ob";

/// Small enough for any path that an outer network may prescribe.
const MTU: u32 = 1400;

/// How long to try to connect.
const REACH: Duration = Duration::from_secs(2);

/// The hosts and the switch.
pub(crate) struct Network {
    switch: Switch,
    hosts: Vec<Host>,
}

/// A network namespace, and the process that keeps it alive.
struct Host {
    name: &'static str,
    /// Ends when the namespace's owner does.
    keeper: Child,
}

impl Network {
    /// Creates everything, in the network namespace of this process.
    pub(crate) fn start() -> Result<Self> {
        let devices: Vec<_> = HOSTS.iter().map(|name| device(name)).collect();
        let switch = Switch::start(&devices).context("no TAP device can be made")?;
        let mut hosts = Vec::new();
        for name in HOSTS.into_iter().filter(|name| *name != OBSERVER) {
            hosts.push(Host::start(name)?);
        }
        let network = Self { switch, hosts };
        for host in &network.hosts {
            let keeper = host.keeper.id().to_string();
            run(Command::new("ip").args(["link", "set", &device(host.name), "netns", &keeper]))?;
        }
        for name in HOSTS {
            network.configure(name)?;
        }
        Ok(network)
    }

    /// Gives a host its address, and the names of all others.
    fn configure(&self, name: &str) -> Result<()> {
        let (device, port) = (device(name), port(name));
        let mut batch = format!(
            "link set lo up\n\
             link set {device} address {mac} mtu {MTU}\n\
             addr add {address}/24 dev {device}\n\
             link set {device} up\n",
            mac = mac(port),
            address = address(name),
        );
        for other in HOSTS.into_iter().filter(|other| *other != name) {
            let mac = mac(self::port(other));
            let address = address(other);
            batch += &format!("neigh add {address} lladdr {mac} dev {device} nud permanent\n");
        }
        let mut child = self
            .at(name, "ip")
            .args(["-batch", "-"])
            .stdin(Stdio::piped())
            .spawn()
            .context("`ip` can't be started")?;
        child.stdin.take().context("a pipe")?.write_all(batch.as_bytes())?;
        ensure!(child.wait()?.success(), "`ip` refused to configure {name}");
        Ok(())
    }

    /// A command to run at this host.
    pub(crate) fn at(&self, host: &str, program: &str) -> Command {
        let Some(host) = self.hosts.iter().find(|it| it.name == host) else {
            return Command::new(program);
        };
        let mut command = Command::new("nsenter");
        command.args(["-t", &host.keeper.id().to_string(), "-n", "-u", "--", program]);
        command
    }

    /// Drops everything from one host to the other.
    pub(crate) fn cut_one_way(&self, from: &str, to: &str) {
        self.set(from, to, Link { cut: true, ..Link::default() });
    }

    /// Drops everything between two hosts.
    pub(crate) fn cut(&self, one: &str, other: &str) {
        self.cut_one_way(one, other);
        self.cut_one_way(other, one);
    }

    /// Delays everything between two hosts, and drops some of it.
    pub(crate) fn slow(&self, one: &str, other: &str, delay: Duration, lost_of_1000: u32) {
        let link = Link { cut: false, delay, lost_of_1000 };
        self.set(one, other, link);
        self.set(other, one, link);
    }

    fn set(&self, from: &str, to: &str, link: Link) {
        self.switch.set(port(from), port(to), link);
    }

    /// How long connecting from one host to a port of another takes; `None` if it fails in time.
    pub(crate) fn reach(&self, from: &str, to: &str, port: u16) -> Result<Option<Duration>> {
        let script = format!("exec 3<>/dev/tcp/{}/{port}", address(to));
        let started = Instant::now();
        let reached = self
            .at(from, "timeout")
            .args([&REACH.as_secs().to_string(), "bash", "-c", &script])
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .context("`timeout` can't be started")?;
        Ok(reached.success().then(|| started.elapsed()))
    }

    /// Removes all faults from the links.
    pub(crate) fn heal(&self) {
        self.switch.heal();
    }
}

impl Host {
    fn start(name: &'static str) -> Result<Self> {
        // The namespace ends with its last process, and this one ends when the pipe does.
        let script = "hostname \"$0\" && echo made && exec cat >/dev/null";
        let mut keeper = Command::new("unshare")
            .args(["--net", "--uts", "sh", "-c", script, name])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("`unshare` can't be started")?;
        let mut line = String::new();
        let output = keeper.stdout.take().context("a pipe")?;
        BufReader::new(output).read_line(&mut line)?;
        if line.trim_end() != "made" {
            bail!("no network namespace can be made");
        }
        Ok(Self { name, keeper })
    }
}

/// Runs a command, which must succeed.
pub(crate) fn run(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("{command:?} can't be started"))?;
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        let complaint = String::from_utf8_lossy(&output.stderr);
        let complaint = complaint.trim_end();
        bail!("{command:?} ended with {}: {complaint} {}", output.status, printed.trim_end());
    }
    Ok(printed)
}

/// The address of a host.
pub(crate) fn address(host: &str) -> String {
    format!("10.77.0.{}", port(host) + 1)
}

fn device(host: &str) -> String {
    format!("t-{host}")
}

/// The switch's port that a host is at, from 0.
fn port(host: &str) -> usize {
    HOSTS.iter().position(|name| *name == host).unwrap_or_default()
}

fn mac(port: usize) -> String {
    format!("02:00:00:00:00:{:02x}", port + 1)
}
