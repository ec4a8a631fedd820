//! One scenario from its beginning to its verdict.

use std::{
    fs,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};

use crate::{
    journal,
    network::{CLIENTS, NODES, Network},
    nodes::{Nodes, PORT, Queue, tail, until},
    oracle::{self, Facts, Journals, Times},
    scenarios::{Scenario, any_of, close_connections},
    system::{SERVICES, System, locked},
    watchers::Watchers,
};

/// How many transactions are submitted per second.
const RATE: f64 = 35.0;
/// How many results there must be before the fault.
const WARM: usize = 20;
/// How long that may take.
const WARM_IN: Duration = Duration::from_secs(30);
/// How long everything runs before the fault.
const BEFORE: Duration = Duration::from_secs(3);
/// How long transactions are submitted after healing.
const AFTER: Duration = Duration::from_secs(8);
/// Within what time the first new commit must come, after a fault with a reachable majority, and
/// after healing: with a `net_ticktime` of 10 s, nodes detect a lost node within that and a
/// quarter.
const COMMIT_LIMIT: Duration = Duration::from_secs(15);
/// Within what time it should come after healing.
const HEALING_GOAL: Duration = Duration::from_secs(3);
/// The log message of a node that has lost its replica of a stream.
const NO_REPLICA: &str = "does not have a running replica on the local node";
/// How often a result may be published on average: again after each lost link, but not endlessly.
const PUBLISHED_MAX: u64 = 5;
/// How many lines of a log are shown.
const SHOWN: usize = 6;
/// How many lines are kept.
const KEPT: usize = 2000;

/// What an operator does about a replica of a stream that stays down.
#[derive(Clone, Copy)]
enum Remedy {
    Restart,
    NewReplica,
}

impl Remedy {
    /// The commands of `rabbitmq-streams`.
    const fn name(self) -> &'static str {
        match self {
            Self::Restart => "restart_stream",
            Self::NewReplica => "delete_replica and add_replica",
        }
    }
}

/// A cluster, and its directories.
pub(crate) struct Stage {
    pub(crate) network: Network,
    pub(crate) nodes: Nodes,
    /// A directory that is removed when this process ends.
    pub(crate) scratch: PathBuf,
    /// A directory that is kept, for what explains a failure.
    pub(crate) kept: PathBuf,
    /// Within what time after healing everything must be answered and quiet.
    pub(crate) quiet_within: Duration,
}

/// The verdict about a run of a scenario.
#[derive(Debug, Default)]
pub(crate) struct Verdict {
    /// What was missing when everything should have been quiet.
    pub(crate) hang: Option<String>,
    /// The violations of the rules.
    pub(crate) violations: Vec<String>,
    /// The first new commit came too late, or never.
    pub(crate) stood_still: Option<String>,
    /// It came later than it should, which may be the machine's fault.
    pub(crate) late: Option<String>,
    /// What the broker did, and `dtc` can't help: reported, but no failure.
    pub(crate) broker: Vec<String>,
    /// The broker had left the journal without a majority of its replicas, so nothing could
    /// continue.
    pub(crate) is_journal_down: bool,
    /// Why the scenario couldn't be completed.
    pub(crate) broken: Option<String>,
    pub(crate) times: Times,
    /// From healing until everything was answered and quiet.
    pub(crate) quiet_after: Option<Duration>,
}

impl Verdict {
    /// Whether the scenario passes: lateness is reported, but no failure.
    pub(crate) fn is_good(&self) -> bool {
        self.problems().next().is_none()
    }

    /// All problems that make it fail.
    pub(crate) fn problems(&self) -> impl Iterator<Item = &String> {
        let Self { hang, violations, stood_still, broken, .. } = self;
        hang.iter().chain(violations).chain(stood_still).chain(broken)
    }

    /// The verdict in one word.
    pub(crate) fn word(&self) -> &'static str {
        if self.broken.is_some() {
            "BROKEN"
        } else if !self.violations.is_empty() {
            "VIOLATION"
        } else if self.hang.is_some() {
            "HANG"
        } else if self.stood_still.is_some() {
            "STOOD STILL"
        } else if self.late.is_some() {
            "late"
        } else {
            "ok"
        }
    }
}

impl Stage {
    /// Forms the cluster.
    pub(crate) fn form(&mut self) -> Result<()> {
        self.nodes.form(&self.network).context("the cluster doesn't form")
    }

    /// Checks that the network can do what the scenarios need: cut, delay, and heal.
    pub(crate) fn check_network(&self) -> Result<()> {
        const DELAY: Duration = Duration::from_millis(300);
        let [one, other, third] = NODES;
        let network = &self.network;
        let reaches = |from, to| network.reach(from, to, PORT);
        ensure!(reaches(one, other)?.is_some(), "{one} doesn't reach {other}");
        network.cut(one, other);
        ensure!(reaches(one, other)?.is_none(), "a cut lets through what {one} sends");
        ensure!(reaches(third, one)?.is_some(), "a cut is between two, and {third} suffers");
        network.heal();
        network.cut_one_way(other, one);
        ensure!(reaches(one, other)?.is_none(), "a cut lets through what {other} answers");
        network.heal();
        network.slow(one, other, DELAY, 0);
        let slow = reaches(one, other)?.context("a slow link lets nothing through")?;
        ensure!(slow >= 2 * DELAY, "a slow link isn't slow: {slow:?}");
        network.slow(one, other, Duration::ZERO, 1000);
        ensure!(reaches(one, other)?.is_none(), "what should be lost comes through");
        network.heal();
        ensure!(reaches(one, other)?.is_some(), "what was healed isn't whole");
        Ok(())
    }

    /// The version of RabbitMQ.
    pub(crate) fn version(&self) -> Result<String> {
        self.nodes.version()
    }

    /// Runs a scenario as run number `number`, and prints what explains a failure.
    pub(crate) fn play(&mut self, scenario: &Scenario, number: usize) -> Verdict {
        let mut verdict = Verdict::default();
        let namespace = format!("r{number}");
        let directory = self.scratch.join(&namespace);
        let played = self.well().and_then(|()| {
            let mut system = System::new(&directory, &namespace)?;
            let played = self.play_in(scenario, number, &mut system, &mut verdict);
            if played.is_err() || !verdict.is_good() {
                self.explain(scenario, number, &system);
            } else if verdict.late.is_some() || !verdict.broker.is_empty() {
                self.keep_logs(scenario, number, &system);
            }
            drop(system);
            played
        });
        self.network.heal();
        if let Err(error) = played {
            verdict.broken = Some(format!("{error:#}"));
        }
        drop(fs::remove_dir_all(&directory));
        verdict
    }

    /// Forms the cluster again unless it is whole.
    fn well(&mut self) -> Result<()> {
        if self.nodes.are_well(&self.network) {
            return Ok(());
        }
        println!("    a new cluster is formed");
        self.form()
    }

    fn play_in(
        &mut self,
        scenario: &Scenario,
        number: usize,
        system: &mut System,
        verdict: &mut Verdict,
    ) -> Result<()> {
        let (network, nodes) = (&self.network, &mut self.nodes);
        let urls = any_of(&NODES);
        system.declare(network, CLIENTS, &urls, scenario.commands.name())?;
        let journal = journal_of(system);
        let watchers = Watchers::start(network, nodes, &journal, system.directory())?;
        let queues = nodes.queues(network, &system.namespace)?;
        scenario.clients.start(network, system, &queues, RATE)?;
        let warm = until(WARM_IN, || Ok(system.answered() >= WARM))?;
        ensure!(warm, "{} results after {WARM_IN:?} without any fault", system.answered());
        // By now the queues of clients exist, too.
        let queues = nodes.queues(network, &system.namespace)?;
        // So that no two runs of a scenario hit the same moment.
        thread::sleep(BEFORE + Duration::from_millis(number as u64 * 370 % 2000));

        let fault = system.now();
        let begun = scenario.fault.begin(network, nodes, &queues)?;
        let lasts = Duration::from_secs(scenario.lasts);
        thread::sleep(lasts.saturating_sub(system.now() - fault));
        let during = (system.answered(), system.unanswered());
        begun.heal(network, nodes, system, scenario.commands)?;
        let healed = system.now();
        thread::sleep(AFTER);
        system.stop_producing();
        let place = begun.node.map_or_else(String::new, |node| format!(" at {node}"));
        println!(
            "    {:?}{place}, {:.1?} long; {} answered and {} waiting at its end",
            scenario.fault,
            healed - fault,
            during.0,
            during.1
        );
        println!("    before it {}", places(&queues));

        let limit = (healed + self.quiet_within).saturating_sub(system.now());
        let mut waiting = wait_until_quiet(network, nodes, system, limit)?;
        if !waiting.is_empty() && self.restart_journal(system, verdict)? {
            waiting = wait_until_quiet(&self.network, &self.nodes, system, self.quiet_within)?;
        }
        if waiting.is_empty() {
            verdict.quiet_after = Some(system.now() - healed);
        } else {
            let (told, is_in_limbo) = self.unstick(system, &waiting)?;
            if is_in_limbo {
                verdict.broker.push(format!("no channel has what queues count as unacked: {told}"));
            } else {
                verdict.hang = Some(told);
            }
        }
        let (network, nodes) = (&self.network, &self.nodes);
        verdict.violations.extend(system.died().into_iter().map(|it| format!("died: {it}")));
        let journals = self.read_journals(system, verdict)?;
        // Until then they may repair what nobody else does.
        let restarts = watchers.restarts().into_iter().map(|it| format!("a watcher said: {it}"));
        verdict.broker.extend(restarts);
        drop(watchers);
        verdict.violations.extend(set_aside(nodes, network, system));
        verdict.violations.extend(system.end());
        let submitted = locked(&system.record).submitted.len() as u64;
        let published = system.results_published();
        if published > submitted * PUBLISHED_MAX && !verdict.is_journal_down {
            let told = format!("{published} results were published for {submitted} transactions");
            verdict.violations.push(told);
        }
        let committed = SERVICES.iter().map(|it| ((*it).to_owned(), system.committed(it)));
        let facts = Facts { committed: committed.collect(), journals };
        let record = locked(&system.record);
        verdict.violations.extend(oracle::violations(&record, &facts));
        verdict.times = oracle::times(&record, fault, healed);
        drop(record);
        if !verdict.is_journal_down {
            judge_times(scenario, verdict);
        }
        if let Err(error) = system.delete(network, CLIENTS, &urls) {
            println!("    what was declared is left behind: {error:#}");
        }
        Ok(())
    }

    /// Restarts the journal as an operator must if the broker has left a majority of its replicas
    /// down: no client could do anything about that.
    fn restart_journal(&self, system: &System, verdict: &mut Verdict) -> Result<bool> {
        let (journals, problem) = read_journals(system, Duration::ZERO)?;
        let is_down = problem.is_some_and(|told| told.contains(NO_REPLICA));
        let majority = NODES.len() / 2 + 1;
        if !is_down || journals.len() >= majority {
            return Ok(false);
        }
        println!("    the journal can be read at {} of {} nodes", journals.len(), NODES.len());
        self.mend_replicas(Remedy::Restart, system, &[])?;
        verdict.is_journal_down = true;
        verdict.broker.push(format!(
            "the journal had no majority of its replicas for {:?} after healing, and nothing could be \
             decided; it was restarted",
            self.quiet_within
        ));
        Ok(true)
    }

    /// Prints what is stuck, closes all connections, and prints whether that helped.
    ///
    /// After a partition, queues may count messages as unacked that no channel has. If that is all,
    /// then no client waits for anything or could do anything about it.
    fn unstick(&self, system: &System, waiting: &[String]) -> Result<(String, bool)> {
        let (network, nodes) = (&self.network, &self.nodes);
        let within = self.quiet_within;
        println!("    STUCK {within:?} after healing: {}", waiting.join("; "));
        let held = stuck(network, nodes, &system.namespace);
        let has_nothing = held.as_ref().is_ok_and(|held| held.by_channels + held.ready == 0);
        print_held(held);
        let is_in_limbo = has_nothing
            && system.unanswered() + system.prepared() == 0
            && system.not_ready().is_empty();
        println!("    closing all connections, to see whether that helps");
        let closed = close_connections(network, nodes);
        if let Err(error) = &closed {
            println!("    {error:#}");
        }
        let started = system.now();
        let still = wait_until_quiet(network, nodes, system, within)?;
        let outcome = if still.is_empty() {
            format!(
                "went on within {:.0?} when all connections were closed",
                system.now() - started
            )
        } else {
            print_held(stuck(network, nodes, &system.namespace));
            let all = if closed.is_ok() { "all connections" } else { "what could be closed" };
            format!("closing {all} didn't help: {}", still.join("; "))
        };
        println!("    {outcome}");
        Ok((format!("{}; {outcome}", waiting.join("; ")), is_in_limbo))
    }

    /// The journal at each node.
    ///
    /// After a partition the broker may leave a replica down for good. An operator restarts the
    /// stream, and creates the replica again if that doesn't help.
    fn read_journals(&self, system: &System, verdict: &mut Verdict) -> Result<Journals> {
        let (mut journals, mut problem) = read_journals(system, self.quiet_within)?;
        for remedy in [Remedy::Restart, Remedy::NewReplica] {
            let Some(told) = problem.filter(|told| told.contains(NO_REPLICA)) else {
                return Ok(journals);
            };
            println!("    {told}");
            let unread: Vec<_> =
                NODES.into_iter().filter(|it| !journals.contains_key(*it)).collect();
            if let Err(error) = self.mend_replicas(remedy, system, &unread) {
                println!("    {error:#}");
            }
            (journals, problem) = read_journals(system, self.quiet_within)?;
            verdict.broker.push(format!(
                "a replica of the journal stayed down for {:?} and more; {}",
                self.quiet_within,
                match &problem {
                    Some(problem) => format!("{problem}, in spite of {}", remedy.name()),
                    None => format!("it came back with {}", remedy.name()),
                }
            ));
        }
        if let Some(problem) = problem {
            println!("    the journal can't be read: {problem}");
        }
        Ok(journals)
    }

    fn mend_replicas(&self, remedy: Remedy, system: &System, nodes: &[&str]) -> Result<()> {
        let name = journal_of(system);
        let at = NODES.into_iter().find(|node| !nodes.contains(node));
        let at = at.context("no node has a replica")?;
        let streams =
            |words: &[&str]| self.nodes.tool(&self.network, at, "rabbitmq-streams", words);
        match remedy {
            Remedy::Restart => streams(&["restart_stream", &name]).map(drop),
            Remedy::NewReplica => nodes.iter().try_for_each(|node| {
                let node = format!("rabbit@{node}");
                streams(&["delete_replica", &name, &node])?;
                streams(&["add_replica", &name, &node]).map(drop)
            }),
        }
    }

    /// Prints and keeps the logs of processes and nodes.
    fn explain(&self, scenario: &Scenario, number: usize, system: &System) {
        for (name, lines) in system.logs(SHOWN) {
            println!("    --- {name}\n{lines}");
        }
        self.keep_logs(scenario, number, system);
    }

    /// Keeps the logs of processes and nodes.
    fn keep_logs(&self, scenario: &Scenario, number: usize, system: &System) {
        let kept = self.kept.join(format!("{}-{number}", scenario.name));
        if let Err(error) = self.keep(&kept, system) {
            println!("    the logs can't be kept in {}: {error:#}", kept.display());
            return;
        }
        println!("    all logs are in {}", kept.display());
    }

    fn keep(&self, kept: &Path, system: &System) -> Result<()> {
        drop(fs::remove_dir_all(kept));
        fs::create_dir_all(kept)?;
        for entry in fs::read_dir(system.directory())? {
            let path = entry?.path();
            if path.is_file()
                && let Some(name) = path.file_name()
            {
                fs::copy(&path, kept.join(name))?;
            }
        }
        for node in NODES {
            let log = tail(&self.nodes.log(node), KEPT);
            fs::write(kept.join(format!("rabbit@{node}.log")), log)?;
        }
        let record = locked(&system.record);
        let submitted = record.submitted.iter().map(|(id, submitted)| {
            format!("{:.3} {id} {}\n", submitted.at.as_secs_f64(), submitted.services.join(","))
        });
        fs::write(kept.join("submitted"), submitted.collect::<String>())?;
        let results = record.results.iter().map(|it| {
            let unresolved = it.unresolved.join(",");
            let at = it.at.as_secs_f64();
            format!("{at:.3} {} {} {} {unresolved}\n", it.id, it.status, it.reason)
        });
        Ok(fs::write(kept.join("results"), results.collect::<String>())?)
    }
}

/// The name of a system's journal.
fn journal_of(system: &System) -> String {
    format!("{}.journal", system.namespace)
}

/// What is still missing after a limited time; empty if everything is answered and quiet.
fn wait_until_quiet(
    network: &Network,
    nodes: &Nodes,
    system: &System,
    limit: Duration,
) -> Result<Vec<String>> {
    let mut waiting = Vec::new();
    until(limit, || {
        waiting.clear();
        let (unanswered, prepared) = (system.unanswered(), system.prepared());
        if unanswered > 0 {
            waiting.push(format!("{unanswered} transactions without a result"));
        }
        if prepared > 0 {
            waiting.push(format!("{prepared} branches prepared"));
        }
        let late = system.not_ready();
        if !late.is_empty() {
            waiting.push(format!("not ready: {}", late.join(", ")));
        }
        // The quick checks come first: the broker takes a second to answer.
        if waiting.is_empty() {
            waiting.extend(unquiet_queues(network, nodes, system));
        }
        Ok(waiting.is_empty())
    })?;
    if !waiting.is_empty() {
        for queue in unquiet_queues(network, nodes, system) {
            if !waiting.contains(&queue) {
                waiting.push(queue);
            }
        }
    }
    Ok(waiting)
}

/// The queues with messages that they shouldn't have, or a note that none can be listed.
fn unquiet_queues(network: &Network, nodes: &Nodes, system: &System) -> Vec<String> {
    match nodes.queues(network, &system.namespace) {
        Ok(queues) => queues.iter().filter_map(unquiet).collect(),
        Err(error) => vec![format!("the broker doesn't tell of its queues: {error:#}")],
    }
}

/// The nodes of the important queues.
fn places(queues: &[Queue]) -> String {
    let matters = |queue: &&Queue| {
        let name = &queue.name;
        let first = |part: &str| name.starts_with(part);
        ["journal", "requests"].contains(&name.as_str())
            || ["prepare.", "finish.", "results.", "replies."].into_iter().any(first)
    };
    // The end of an exclusive queue's name is random.
    let short = |name: &str| name.splitn(4, '.').take(3).collect::<Vec<_>>().join(".");
    let all = queues.iter().filter(matters);
    let all: Vec<_> = all.map(|queue| format!("{} {}", short(&queue.name), queue.node)).collect();
    all.join(", ")
}

/// What a queue still holds, if it should be empty.
fn unquiet(queue: &Queue) -> Option<String> {
    let holds = queue.ready > 0 || queue.unacked > 0;
    let Queue { name, node, state, ready, unacked, .. } = queue;
    let told = format!("{name} at {node} ({state}): {ready} ready, {unacked} unacked");
    (holds && queue.kind != "stream" && name != "rejected").then_some(told)
}

/// The broker's counts of who waits for what.
#[derive(Default)]
struct Held {
    lines: Vec<String>,
    /// How many messages are not confirmed or not acknowledged on all channels.
    by_channels: u64,
    /// How many messages are ready in all queues that should be empty.
    ready: u64,
}

fn print_held(held: Result<Held>) {
    match held {
        Ok(held) => held.lines.iter().for_each(|line| println!("      {line}")),
        Err(error) => println!("      {error:#}"),
    }
}

/// The channels on which something is not confirmed or not acknowledged, with their connections'
/// names, and the queues with their consumers.
fn stuck(network: &Network, nodes: &Nodes, namespace: &str) -> Result<Held> {
    let node = nodes.one_up()?;
    let listed = |what: &str, columns: &str| {
        let words = [what, "--no-table-headers"].into_iter().chain(columns.split(' '));
        nodes.ctl(network, node, &words.collect::<Vec<_>>())
    };
    let connections = listed("list_connections", "pid client_properties")?;
    let name_of = |pid: &str| {
        let line = connections.lines().find(|line| line.starts_with(pid))?;
        let (_, rest) = line.split_once("connection_name")?;
        // The value is quoted, whatever precedes it.
        rest.trim_start_matches('"').split('"').nth(1).map(str::to_owned)
    };
    let columns = "connection number messages_unconfirmed messages_unacknowledged consumer_count";
    let mut held = Held::default();
    for line in listed("list_channels", columns)?.lines() {
        let fields: Vec<_> = line.split('\t').collect();
        let [connection, number, unconfirmed, unacked, consumers] = fields[..] else { continue };
        let count = |number: &str| number.parse::<u64>().unwrap_or(0);
        if count(unconfirmed) + count(unacked) > 0 {
            held.by_channels += count(unconfirmed) + count(unacked);
            let name = name_of(connection).unwrap_or_else(|| connection.to_owned());
            let node = connection.trim_start_matches("<rabbit@").split('.').next().unwrap_or("?");
            held.lines.push(format!(
                "{name} at {node}, channel {number}: {unconfirmed} unconfirmed, {unacked} unacked, \
                 {consumers} consumers"
            ));
        }
    }
    for queue in nodes.queues(network, namespace)? {
        if unquiet(&queue).is_some() {
            held.ready += queue.ready;
        }
        let Queue { name, kind, node, ready, unacked, consumers, state } = queue;
        held.lines.push(format!(
            "{kind} {name} at {node}: {ready} ready, {unacked} unacked, {consumers} consumers, {state}"
        ));
    }
    Ok(held)
}

/// The rejected messages: nothing that is sent here should be rejected.
fn set_aside(nodes: &Nodes, network: &Network, system: &System) -> Option<String> {
    // A broker that doesn't answer is detected by those who wait for its queues.
    let queues = nodes.queues(network, &system.namespace).ok()?;
    let queue = queues.iter().find(|queue| queue.name == "rejected" && queue.ready > 0)?;
    Some(format!("{} messages were rejected", queue.ready))
}

/// The journal at each node; read again while the replicas differ, since one may be behind. The
/// last problem is returned as well.
fn read_journals(system: &System, limit: Duration) -> Result<(Journals, Option<String>)> {
    let stream = format!("{}.journal", system.namespace);
    let (mut journals, mut problem) = (Journals::new(), None);
    until(limit, || {
        let reading = NODES.map(|node| {
            let stream = stream.clone();
            (node, thread::spawn(move || journal::read(node, &stream)))
        });
        problem = None;
        for (node, reading) in reading {
            match reading.join() {
                Ok(Ok(entries)) => drop(journals.insert(node.to_owned(), entries)),
                Ok(Err(error)) => problem = Some(format!("{error:#}")),
                Err(_) => problem = Some(format!("reading at {node} panicked")),
            }
        }
        let mut all = journals.values();
        let first = all.next();
        Ok(problem.is_none() && all.all(|it| Some(it) == first))
    })?;
    Ok((journals, problem))
}

/// Compares the times of the first new commits with the goals.
fn judge_times(scenario: &Scenario, verdict: &mut Verdict) {
    let told = |after: Option<Duration>, what: &str| match after {
        Some(after) => format!("the first new commit came {after:.1?} after {what}"),
        None => format!("no new commit came after {what}"),
    };
    let is_within = |after: Option<Duration>, goal| after.is_some_and(|after| after <= goal);
    let Times { first_after_fault: fault, first_after_healing: healing, longest_gap, .. } =
        verdict.times;
    if scenario.goes_on && !is_within(fault, COMMIT_LIMIT) {
        verdict.stood_still = Some(told(fault, "the fault"));
    } else if scenario.goes_on && longest_gap > COMMIT_LIMIT {
        verdict.stood_still = Some(format!("nothing was committed for {longest_gap:.1?}"));
    } else if !is_within(healing, COMMIT_LIMIT) {
        verdict.stood_still = Some(told(healing, "healing"));
    } else if !is_within(healing, HEALING_GOAL) {
        verdict.late = Some(told(healing, "healing"));
    }
}
