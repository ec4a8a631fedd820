//! The table of scenarios: what is done to the cluster.

use std::time::Duration;

use anyhow::{Context, Result};

use crate::{
    network::{AWAY, CLIENTS, NODES, Network, address},
    nodes::{Nodes, Queue},
    system::System,
};

/// One scenario.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scenario {
    pub(crate) name: &'static str,
    pub(crate) commands: Commands,
    pub(crate) clients: Clients,
    pub(crate) fault: Fault,
    /// How many seconds the fault lasts.
    pub(crate) lasts: u64,
    /// Whether the clients reach a majority of nodes all the time, so that they should continue.
    pub(crate) goes_on: bool,
    /// Whether it is one of the few that are always run.
    pub(crate) is_selected: bool,
}

/// The kind of queues for commands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Commands {
    Classic,
    Quorum,
}

/// Where clients run, and which nodes they connect to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Clients {
    /// At any node.
    Anywhere,
    /// The producer starts at this node, and the others never connect to it.
    ProducerAt(&'static str),
    /// The instances of services start at this node, and the others never connect to it.
    InstancesAt(&'static str),
    /// Nobody connects to the node that leads this queue.
    NotAtLeaderOf(&'static str),
    /// All run beside the node that is cut off.
    Away,
    /// Half of them do.
    HalfAway,
}

/// A node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum At {
    Node(&'static str),
    /// The leader, or the node, of the first queue whose name begins like this.
    LeaderOf(&'static str),
}

/// A fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The node is killed, and restarted.
    Kill(At),
    /// The node is cut off from the other nodes, and the clients see all nodes.
    FromNodes(At),
    /// The node is cut off from everything.
    FromEverybody(At),
    /// The node and the clients beside it are cut off from the rest.
    Minority(At),
    /// Two nodes don't see each other, and the third sees both.
    Bridge(&'static str, &'static str),
    /// What the node sends to the other nodes is lost.
    Unheard(At),
    /// What the other nodes send to it is lost.
    Deaf(At),
    /// All links have a delay and lose some frames.
    Slow { milliseconds: u64, lost_of_1000: u32 },
    /// The node is killed, forgotten by the cluster, and replaced by an empty one.
    Lost(&'static str),
    /// One node after the other is restarted.
    RollingRestart,
    /// The leaders are spread again.
    Rebalance,
    /// An operator closes every connection.
    CloseConnections,
    /// The node has a memory alarm.
    Alarm(&'static str),
}

/// A fault in progress, at named nodes.
#[derive(Clone, Debug)]
pub(crate) struct Begun {
    fault: Fault,
    /// The node, if it is at one.
    pub(crate) node: Option<&'static str>,
}

const N1: &str = NODES[0];
const N2: &str = NODES[1];
const N3: &str = NODES[2];

/// A scenario that lasts 10 s, on quorum queues, with clients anywhere.
const fn scenario(name: &'static str, fault: Fault) -> Scenario {
    Scenario {
        name,
        commands: Commands::Quorum,
        clients: Clients::Anywhere,
        fault,
        lasts: 10,
        goes_on: true,
        is_selected: false,
    }
}

impl Scenario {
    const fn classic(self) -> Self {
        Self { commands: Commands::Classic, ..self }
    }

    const fn clients(self, clients: Clients) -> Self {
        Self { clients, ..self }
    }

    const fn lasts(self, lasts: u64) -> Self {
        Self { lasts, ..self }
    }

    /// Meanwhile, no majority or no service can be reached.
    const fn stands_still(self) -> Self {
        Self { goes_on: false, ..self }
    }

    const fn selected(self) -> Self {
        Self { is_selected: true, ..self }
    }
}

/// All of them, in the order in which they are run.
pub(crate) const SCENARIOS: &[Scenario] = &[
    scenario("kill_n1", Fault::Kill(At::Node(N1))),
    scenario("kill_n2", Fault::Kill(At::Node(N2))),
    scenario("kill_n3", Fault::Kill(At::Node(N3))),
    // A classic queue is on one node: with that, its service stands still, and so do the others.
    scenario("kill_n1_classic", Fault::Kill(At::Node(N1))).classic().stands_still(),
    scenario("kill_n2_classic", Fault::Kill(At::Node(N2))).classic().stands_still().selected(),
    scenario("kill_n3_classic", Fault::Kill(At::Node(N3))).classic().stands_still(),
    scenario("results_queue_on_a_dead_node", Fault::Kill(At::Node(N3)))
        .clients(Clients::ProducerAt(N3))
        .lasts(30)
        .selected(),
    scenario("instances_on_a_dead_node", Fault::Kill(At::Node(N3)))
        .clients(Clients::InstancesAt(N3))
        .lasts(20)
        .selected(),
    scenario("journal_cut_clients_elsewhere", Fault::FromNodes(At::LeaderOf("journal")))
        .clients(Clients::NotAtLeaderOf("journal"))
        .selected(),
    scenario("isolate_n2", Fault::FromNodes(At::Node(N2))).selected(),
    scenario("isolate_n2_classic", Fault::FromNodes(At::Node(N2))).classic().stands_still(),
    scenario("isolate_n3_30s", Fault::FromNodes(At::Node(N3))).lasts(30),
    scenario("isolate_n1_from_everybody", Fault::FromEverybody(At::Node(N1))),
    scenario("isolate_n2_from_everybody_classic", Fault::FromEverybody(At::Node(N2)))
        .classic()
        .stands_still(),
    scenario("journal_cut", Fault::FromNodes(At::LeaderOf("journal"))),
    scenario("journal_cut_30s", Fault::FromNodes(At::LeaderOf("journal"))).lasts(30),
    scenario("journal_cut_from_everybody", Fault::FromEverybody(At::LeaderOf("journal"))),
    scenario("requests_cut", Fault::FromNodes(At::LeaderOf("requests"))),
    scenario("requests_cut_from_everybody", Fault::FromEverybody(At::LeaderOf("requests"))),
    scenario("results_cut", Fault::FromNodes(At::LeaderOf("results."))),
    scenario("results_cut_from_everybody", Fault::FromEverybody(At::LeaderOf("results."))),
    scenario("finish_cut", Fault::FromNodes(At::LeaderOf("finish.stock."))),
    scenario("finish_cut_from_everybody", Fault::FromEverybody(At::LeaderOf("finish.stock."))),
    scenario("clients_with_the_minority", Fault::Minority(At::Node(N1)))
        .clients(Clients::Away)
        .stands_still()
        .selected(),
    scenario("half_of_the_clients_with_the_minority", Fault::Minority(At::LeaderOf("journal")))
        .clients(Clients::HalfAway),
    scenario("bridge", Fault::Bridge(N1, N2)),
    scenario("bridge_30s", Fault::Bridge(N1, N2)).lasts(30),
    scenario("unheard", Fault::Unheard(At::LeaderOf("journal"))),
    scenario("deaf", Fault::Deaf(At::LeaderOf("journal"))),
    scenario("delay_and_loss", Fault::Slow { milliseconds: 30, lost_of_1000: 10 }),
    scenario("lost_and_replaced", Fault::Lost(N3)),
    scenario("rolling_restart", Fault::RollingRestart).lasts(0),
    scenario("rolling_restart_classic", Fault::RollingRestart).classic().lasts(0).stands_still(),
    scenario("leaders_rebalanced", Fault::Rebalance).lasts(3),
    scenario("connections_closed", Fault::CloseConnections).lasts(3).selected(),
    // RabbitMQ blocks the publishers of all nodes.
    scenario("memory_alarm", Fault::Alarm(N2)).stands_still(),
];

impl Commands {
    /// The value for `dtc topology apply --commands`.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Classic => "classic",
            Self::Quorum => "quorum",
        }
    }
}

impl Clients {
    /// Starts two workers, two instances of each service, and a producer.
    pub(crate) fn start(
        self,
        network: &Network,
        system: &mut System,
        queues: &[Queue],
        rate: f64,
    ) -> Result<()> {
        let anywhere = any_of(&NODES);
        let elsewhere = |node: &str| {
            any_of(&NODES.into_iter().filter(|other| *other != node).collect::<Vec<_>>())
        };
        let (rest, producer, instances) = match self {
            Self::Anywhere | Self::Away | Self::HalfAway => {
                (anywhere.clone(), anywhere.clone(), anywhere)
            }
            Self::ProducerAt(node) => (elsewhere(node), beginning_at(node), elsewhere(node)),
            Self::InstancesAt(node) => (elsewhere(node), elsewhere(node), beginning_at(node)),
            Self::NotAtLeaderOf(name) => {
                let urls = elsewhere(leader(name, queues)?);
                (urls.clone(), urls.clone(), urls)
            }
        };
        // The second of each kind is away, if half of them are.
        let host = |number: usize| match self {
            Self::Away => AWAY,
            Self::HalfAway if number == 2 => AWAY,
            Self::HalfAway
            | Self::Anywhere
            | Self::ProducerAt(_)
            | Self::InstancesAt(_)
            | Self::NotAtLeaderOf(_) => CLIENTS,
        };
        for number in [1, 2] {
            system.worker(network, host(number), &rest, &format!("w{number}"))?;
            for service in crate::system::SERVICES {
                system.instance(network, host(number), &instances, service, number)?;
            }
        }
        system.wait_until_ready()?;
        if self == Self::HalfAway {
            system.producer(network, host(1), &producer, "here", rate / 2.0)?;
            system.producer(network, host(2), &producer, "away", rate / 2.0)?;
        } else {
            system.producer(network, host(1), &producer, "t", rate)?;
        }
        Ok(())
    }
}

impl Fault {
    /// Begins the fault.
    pub(crate) fn begin(
        self,
        network: &Network,
        nodes: &mut Nodes,
        queues: &[Queue],
    ) -> Result<Begun> {
        let node = match self {
            Self::Kill(at)
            | Self::FromNodes(at)
            | Self::FromEverybody(at)
            | Self::Minority(at)
            | Self::Unheard(at)
            | Self::Deaf(at) => Some(at.node(queues)?),
            Self::Lost(node) | Self::Alarm(node) => Some(node),
            Self::Bridge(..)
            | Self::Slow { .. }
            | Self::RollingRestart
            | Self::Rebalance
            | Self::CloseConnections => None,
        };
        let others = || NODES.into_iter().filter(|other| Some(*other) != node);
        match (self, node) {
            (Self::Kill(_) | Self::Lost(_), Some(node)) => nodes.kill(node)?,
            (Self::FromNodes(_), Some(node)) => others().for_each(|other| network.cut(node, other)),
            (Self::FromEverybody(_), Some(node)) => {
                others().chain([CLIENTS, AWAY]).for_each(|other| network.cut(node, other));
            }
            (Self::Minority(_), Some(node)) => {
                for other in others().chain([CLIENTS]) {
                    network.cut(node, other);
                    network.cut(AWAY, other);
                }
                network.cut(node, CLIENTS);
            }
            (Self::Unheard(_), Some(node)) => {
                others().for_each(|other| network.cut_one_way(node, other));
            }
            (Self::Deaf(_), Some(node)) => {
                others().for_each(|other| network.cut_one_way(other, node));
            }
            (Self::Alarm(_), Some(node)) => {
                nodes.ctl(network, node, &["set_vm_memory_high_watermark", "0.00001"])?;
            }
            (Self::Bridge(one, other), _) => network.cut(one, other),
            (Self::Slow { milliseconds, lost_of_1000 }, _) => {
                let delay = Duration::from_millis(milliseconds);
                for one in NODES {
                    for other in NODES.into_iter().chain([CLIENTS, AWAY]) {
                        network.slow(one, other, delay, lost_of_1000);
                    }
                }
            }
            (Self::RollingRestart, _) => {
                for name in NODES {
                    nodes.stop(name)?;
                    nodes.start(network, name)?;
                    nodes.wait_until_up(name)?;
                }
            }
            (Self::Rebalance, _) => {
                nodes.tool(network, N1, "rabbitmq-queues", &["rebalance", "all"])?;
            }
            (Self::CloseConnections, _) => close_connections(network, nodes)?,
            (
                Self::Kill(_)
                | Self::Lost(_)
                | Self::FromNodes(_)
                | Self::FromEverybody(_)
                | Self::Minority(_)
                | Self::Unheard(_)
                | Self::Deaf(_)
                | Self::Alarm(_),
                None,
            ) => {}
        }
        Ok(Begun { fault: self, node })
    }
}

impl Begun {
    /// Ends the fault; afterwards all nodes are up.
    pub(crate) fn heal(
        &self,
        network: &Network,
        nodes: &mut Nodes,
        system: &System,
        commands: Commands,
    ) -> Result<()> {
        network.heal();
        match (self.fault, self.node) {
            (Fault::Kill(_), Some(node)) => {
                nodes.start(network, node)?;
                nodes.wait_until_up(node)
            }
            (Fault::Lost(_), Some(node)) => replace(network, nodes, node, system, commands),
            (Fault::Alarm(_), Some(node)) => {
                let words = ["set_vm_memory_high_watermark", "absolute", "1GB"];
                nodes.ctl(network, node, &words).map(drop)
            }
            _ => Ok(()),
        }
    }
}

/// What an operator does about a node that is lost for good.
fn replace(
    network: &Network,
    nodes: &mut Nodes,
    node: &str,
    system: &System,
    commands: Commands,
) -> Result<()> {
    let other = NODES.into_iter().find(|other| *other != node).context("another node")?;
    let name = format!("rabbit@{node}");
    nodes.ctl(network, other, &["forget_cluster_node", &name])?;
    // What was only on this node is declared again.
    system.declare(network, CLIENTS, &format!("amqp://{}", address(other)), commands.name())?;
    nodes.clear(node)?;
    nodes.start(network, node)?;
    nodes.wait_until_up(node)?;
    nodes.tool(network, other, "rabbitmq-queues", &["grow", &name, "all"])?;
    for queue in nodes.queues(network, &system.namespace)? {
        if queue.kind == "stream" {
            let stream = format!("{}.{}", system.namespace, queue.name);
            nodes.tool(network, other, "rabbitmq-streams", &["add_replica", &stream, &name])?;
        }
    }
    Ok(())
}

/// Closes every connection of clients.
pub(crate) fn close_connections(network: &Network, nodes: &Nodes) -> Result<()> {
    // The other nodes' connections are closed even if one node doesn't answer.
    let closing = NODES
        .map(|name| nodes.ctl(network, name, &["close_all_connections", "closed by the operator"]));
    closing.into_iter().try_for_each(|closed| closed.map(drop))
}

impl At {
    fn node(self, queues: &[Queue]) -> Result<&'static str> {
        match self {
            Self::Node(node) => Ok(node),
            Self::LeaderOf(name) => leader(name, queues),
        }
    }
}

fn leader(name: &str, queues: &[Queue]) -> Result<&'static str> {
    let queue = queues.iter().find(|queue| queue.name.starts_with(name));
    let queue = queue.with_context(|| format!("there is no queue `{name}`"))?;
    let node = NODES.into_iter().find(|node| *node == queue.node);
    node.with_context(|| format!("nobody leads `{}`", queue.name))
}

/// The address of the cluster, for clients.
pub(crate) fn any_of(nodes: &[&str]) -> String {
    let urls: Vec<_> = nodes.iter().map(|node| format!("amqp://{}", address(node))).collect();
    urls.join(",")
}

/// A client begins with a random address, and continues with the next: nearly all are of this node.
///
/// That suits nodes that are killed, and refuse at once; for a node that is cut off, each address
/// would take its time.
fn beginning_at(node: &str) -> String {
    let others = NODES.into_iter().filter(|other| *other != node);
    any_of(&std::iter::repeat_n(node, 60).chain(others).collect::<Vec<_>>())
}
