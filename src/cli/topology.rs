//! `dtc topology`: declares, compares, prints and deletes the exchanges and queues of one system.
//!
//! Its one table takes a dozen lines; comfy-table would take eight, and two crates.

use std::{
    fmt::Write as _,
    io::{self, Read, Write as _},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, anyhow};
use clap::{Args, Subcommand, ValueEnum};
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::{
    cli::{
        Exit, Failure,
        broker::{self, BrokerArguments, ConfigArgument, NamespaceArgument, exit_of, flag},
        escape, moment, pipeline, tell,
    },
    clock::Clock,
    config::{Config, ConfigFlag, duration},
    input::services,
    protocol::ids::ServiceName,
    transport::amqp::{
        connection::{Backoff, Broker, ConnectionError, close},
        error::Disposition,
        names::Names,
        topology::{
            Argument, Arguments, PrepareQueueKind, Queue, ServiceTopology, Topology,
            apply::{ApplyOptions, ApplyReport, JournalStart, TopologyError, apply_topology},
            check::check,
            delete,
            finding::{Fault, Finding, Subject},
            replace::{self, ReplaceError, ReplaceReport},
        },
    },
};

/// The message when only the shared exchanges and queues can be handled.
const NO_SERVICES: &str = "no service is named: only what all services share was looked at; name them by \
                           --services FILE\n";

/// How long a check is repeated while the broker, as it starts, ends its connections.
const STARTING_MAX: Duration = Duration::from_secs(5);

/// Declare, compare, print or delete the exchanges and queues on RabbitMQ
#[derive(Debug, Args)]
pub(super) struct TopologyArguments {
    #[command(subcommand)]
    command: TopologyCommand,
}

#[derive(Debug, Subcommand)]
enum TopologyCommand {
    Apply(ApplyArguments),
    Check(CheckArguments),
    Print(PrintArguments),
    Delete(DeleteArguments),
}

/// Declare the exchanges and queues that are missing; change none that exist
///
/// The command first compares everything. If an exchange or queue differs, it names each difference
/// with the value wanted and the value found, and declares nothing.
///
/// --replace gives a service new queues where the existing ones differ, and loses no message. Its
/// instances may continue, unless a quorum queue is replaced: then stop them first.
///
/// On a cluster all nodes should be up: a quorum queue gets its members when it is declared. A
/// queue whose node is down is named and left as it is.
///
/// Exit codes: 0 everything is as it should be; 1 something differs, or a queue is unavailable; 69
/// the broker can't be reached, doesn't answer, or takes no messages.
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
struct ApplyArguments {
    #[command(flatten)]
    broker: BrokerArguments,
    #[command(flatten)]
    scope: ScopeArguments,
    /// Replace this service's queues if their arguments differ (may be repeated)
    #[arg(long, value_name = "SERVICE", value_parser = service_name)]
    replace: Vec<ServiceName>,
    /// How much the clocks of producers, workers, services and the broker's nodes may differ
    /// [default: 60s]
    ///
    /// [env: DTC__TOPOLOGY__CLOCK_MARGIN]
    #[arg(long, value_name = "DURATION")]
    clock_margin: Option<String>,
    /// How long to keep trying while the broker can't be reached, doesn't answer or takes no
    /// messages
    #[arg(long, value_name = "DURATION", default_value = "0s", value_parser = duration::parse)]
    wait: Duration,
    /// How to print what was declared
    #[arg(long, value_name = "FORM", value_enum, default_value_t = TopologyForm::Text)]
    output: TopologyForm,
}

/// Compare what exists with what should exist; change nothing
///
/// The command checks exchanges and queues with all their arguments, and the beginning of the
/// journal. It checks neither bindings, which AMQP can't list (apply declares them each time), nor
/// policies.
///
/// The broker has 5 s to answer each question. A queue is unavailable if there is no answer about
/// it, or if its node is down; after three questions in a row without an answer the command stops.
///
/// Exit codes: 0 everything is as it should be; 1 something differs or is unavailable, each on its
/// own line; 69 the broker can't be reached or doesn't answer.
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
struct CheckArguments {
    #[command(flatten)]
    broker: BrokerArguments,
    #[command(flatten)]
    scope: ScopeArguments,
    /// How long to keep trying while the broker can't be reached or doesn't answer
    #[arg(long, value_name = "DURATION", default_value = "0s", value_parser = duration::parse)]
    wait: Duration,
    /// How to print what was found
    #[arg(long, value_name = "FORM", value_enum, default_value_t = TopologyForm::Text)]
    output: TopologyForm,
}

/// Print the exchanges and queues that should exist; needs no broker
#[derive(Debug, Args)]
struct PrintArguments {
    #[command(flatten)]
    config: ConfigArgument,
    #[command(flatten)]
    namespace: NamespaceArgument,
    #[command(flatten)]
    scope: ScopeArguments,
    /// How to print them
    #[arg(long, value_name = "FORM", value_enum, default_value_t = TopologyForm::Text)]
    output: TopologyForm,
}

/// Delete all exchanges and queues, with the requests, decisions and outcomes in them
///
/// For temporary namespaces. Queues of services that are not named by --services or the
/// configuration stay.
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
struct DeleteArguments {
    #[command(flatten)]
    broker: BrokerArguments,
    #[command(flatten)]
    scope: ScopeArguments,
    /// Confirm the deletion
    #[arg(long, required = true)]
    yes: bool,
}

#[derive(Debug, Args)]
struct ScopeArguments {
    /// The services, as for `dtc run`: a file, or - for stdin; in addition to those of the
    /// configuration
    #[arg(long, value_name = "FILE")]
    services: Option<PathBuf>,
    /// How long the journal keeps its records [default: 7d]
    ///
    /// [env: DTC__TOPOLOGY__RETENTION]
    #[arg(long, value_name = "DURATION")]
    retention: Option<String>,
    /// Kind of the queues for prepares: classic (faster, on one node), quorum (on several nodes:
    /// the loss of one doesn't stop a service), or auto (quorum if the broker's URL names several
    /// hosts, else classic) [default: auto]
    ///
    /// [env: DTC__TOPOLOGY__COMMANDS]
    #[arg(long, value_name = "KIND")]
    commands: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum TopologyForm {
    /// Text for people.
    Text,
    /// One JSON value.
    Json,
}

fn service_name(text: &str) -> Result<ServiceName, String> {
    ServiceName::parse(text).map_err(|error| error.to_string())
}

impl ScopeArguments {
    fn flags(&self) -> [Option<ConfigFlag>; 2] {
        [
            flag("topology.retention", "--retention", self.retention.as_ref()),
            flag("topology.commands", "--commands", self.commands.as_ref()),
        ]
    }

    /// The services of the file, and those of the configuration that the file lacks.
    fn services(&self, config: &Config) -> Result<Vec<ServiceTopology>, Failure> {
        let mut services = self.services.as_deref().map(read).transpose()?.unwrap_or_default();
        for configured in &config.services {
            let ServiceTopology { name, .. } = configured;
            match services.iter().find(|service| service.name == *name) {
                None => services.push(configured.clone()),
                Some(service) if service == configured => {}
                Some(_) => {
                    let error = anyhow!(
                        "service `{name}` has another max_wait or cap in --services than in the \
                         configuration (services.{name})"
                    );
                    return Err(Failure::new(Exit::BadConfiguration, error));
                }
            }
        }
        Ok(services)
    }

    fn topology(&self, names: &Names, config: &Config) -> Result<Topology, Failure> {
        Ok(Topology::of(names, &self.services(config)?, &config.topology.settings))
    }
}

fn read(path: &Path) -> Result<Vec<ServiceTopology>, Failure> {
    let is_stdin = path == Path::new("-");
    let name = if is_stdin { "stdin".to_owned() } else { path.display().to_string() };
    let mut text = Vec::new();
    let read = if is_stdin {
        io::stdin().read_to_end(&mut text).map(drop)
    } else {
        std::fs::read(path).map(|read| text = read)
    };
    read.with_context(|| format!("failed to read `{name}`"))
        .map_err(|error| Failure::new(Exit::BadData, error))?;
    let services = services::read(&name, &text);
    let services = services.map_err(|complaints| Failure::new(Exit::BadData, complaints))?;
    Ok(services.iter().map(ServiceTopology::from).collect())
}

pub(super) fn run(arguments: &TopologyArguments) -> Result<Exit, Failure> {
    match &arguments.command {
        TopologyCommand::Apply(arguments) => run_apply(arguments),
        TopologyCommand::Check(arguments) => run_check(arguments),
        TopologyCommand::Delete(arguments) => run_delete(arguments),
        TopologyCommand::Print(arguments) => {
            let flags = [arguments.namespace.flag()].into_iter().chain(arguments.scope.flags());
            let config = arguments.config.load(flags)?;
            let topology = arguments.scope.topology(&broker::names(&config), &config)?;
            print(&match arguments.output {
                TopologyForm::Text => escape::lines(&text(&topology)).into_owned(),
                TopologyForm::Json => format!("{:#}\n", topology_json(&topology)),
            })
        }
    }
}

fn run_apply(arguments: &ApplyArguments) -> Result<Exit, Failure> {
    let (runtime, _interrupt) = pipeline::runtime()?;
    let margin = flag("topology.clock_margin", "--clock-margin", arguments.clock_margin.as_ref());
    let config = arguments.broker.load(arguments.scope.flags().into_iter().chain([margin]))?;
    let names = broker::names(&config);
    let services = arguments.scope.services(&config)?;
    let job = ApplyJob {
        broker: broker::broker(&config, "dtc topology"),
        replace: named(&services, &arguments.replace)?,
        topology: Topology::of(&names, &services, &config.topology.settings),
        services: &services,
        config: &config,
        names: &names,
        clock: Clock::start(),
    };
    let (replaced, applied) = runtime.block_on(job.apply(arguments.wait))?;
    warn(&applied, &names, config.topology.clock_margin);
    if services.is_empty() {
        tell(NO_SERVICES);
    }
    for finding in &applied.unavailable {
        tell(&format!("{finding}: neither compared nor declared\n"));
    }
    let exit = match arguments.output {
        TopologyForm::Text => {
            let text = replaced_text(&replaced) + &applied_text(&applied, &names);
            if text.is_empty() && applied.unavailable.is_empty() {
                tell("nothing was missing\n");
            }
            print(&escape::lines(&text))?
        }
        TopologyForm::Json => print(&format!("{:#}\n", applied_json(&replaced, &applied)))?,
    };
    Ok(if applied.unavailable.is_empty() { exit } else { Exit::Incomplete })
}

/// What to apply, and where.
struct ApplyJob<'a> {
    broker: Broker,
    config: &'a Config,
    names: &'a Names,
    topology: Topology,
    services: &'a [ServiceTopology],
    replace: Vec<&'a ServiceTopology>,
    clock: Clock,
}

impl ApplyJob<'_> {
    /// Applies it, and repeats that within `wait` as long as a failure may be temporary.
    async fn apply(&self, wait: Duration) -> Result<(Vec<ReplaceReport>, ApplyReport), Failure> {
        let mut retry = Retry::within(wait);
        let (mut replaced, mut all) = (Vec::new(), ApplyReport::default());
        loop {
            match self.attempt(&mut replaced).await {
                Ok(ApplyReport { created, begun, unavailable }) => {
                    all.created.extend(created);
                    all.begun = all.begun.or(begun);
                    all.unavailable = unavailable;
                    if all.unavailable.is_empty() || !retry.after_pause().await {
                        return Ok((replaced, all));
                    }
                }
                Err(failure) if failure.exit == Exit::Unavailable => {
                    if !retry.after_pause().await {
                        return Err(failure);
                    }
                }
                Err(failure) => return Err(failure),
            }
        }
    }

    async fn attempt(&self, replaced: &mut Vec<ReplaceReport>) -> Result<ApplyReport, Failure> {
        let settings = self.config.topology.settings;
        if !self.replace.is_empty() {
            let connection = self.broker.connect("topology").await.map_err(unreachable)?;
            for service in &self.replace {
                let done = replace::replace(&connection, self.names, service, &settings).await;
                replaced.push(done.map_err(not_replaced)?);
            }
            close(&connection).await;
        }
        let clock_margin = self.config.topology.clock_margin;
        let options = ApplyOptions { settings, now: self.clock.now(), clock_margin };
        let applied = apply_topology(&self.broker, self.names, &self.topology, &options).await;
        applied.map_err(|error| {
            let TopologyError::Mismatch(findings) = &error else { return not_applied(error) };
            explain_kind(findings, self.config);
            match way_out(findings, self.services, self.names) {
                Some(way_out) => Failure::new(Exit::Incomplete, anyhow!("{error}\n{way_out}")),
                None => not_applied(error),
            }
        })
    }
}

/// When to try again.
struct Retry {
    until: Instant,
    backoff: Backoff,
}

impl Retry {
    fn within(wait: Duration) -> Self {
        Self { until: Instant::now() + wait, backoff: Backoff::default() }
    }

    /// Whether to try again; if so, it waits before.
    async fn after_pause(&mut self) -> bool {
        let next = Instant::now() + self.backoff.pause();
        if next > self.until {
            return false;
        }
        tokio::time::sleep_until(next).await;
        true
    }
}

/// Explains why a queue should be of another kind, if the kind was not set explicitly.
fn explain_kind(findings: &[Finding], config: &Config) {
    let is_kind = |finding: &Finding| match &finding.fault {
        Fault::Differs(difference) => difference.argument == Queue::KIND,
        Fault::Missing
        | Fault::Refused(_)
        | Fault::NotBegun(_)
        | Fault::LeftOver
        | Fault::Unavailable(_) => false,
    };
    let prepares = format!("{}.prepare.", config.broker.namespace);
    let differs = findings
        .iter()
        .any(|finding| finding.subject.name().starts_with(&prepares) && is_kind(finding));
    if config.topology.is_auto && differs {
        let wanted = config.topology.settings.commands;
        let other = match wanted {
            PrepareQueueKind::Classic => PrepareQueueKind::Quorum,
            PrepareQueueKind::Quorum => PrepareQueueKind::Classic,
        };
        tell(&format!(
            "the kind of prepare queues is `auto`: {wanted}, by the number of hosts in the broker's \
             URL; --commands {other} keeps what is there, `apply --replace SERVICE` changes it\n"
        ));
    }
}

/// What the operator can do about queues of services that were declared with another `max_wait` or
/// `cap`.
fn way_out(findings: &[Finding], services: &[ServiceTopology], names: &Names) -> Option<String> {
    let is_term = |fault: &Fault| match fault {
        Fault::Differs(difference) => {
            matches!(difference.argument.as_str(), "x-message-ttl" | "x-single-active-consumer")
        }
        Fault::Missing
        | Fault::Refused(_)
        | Fault::NotBegun(_)
        | Fault::LeftOver
        | Fault::Unavailable(_) => false,
    };
    let is_another = |service: &&ServiceTopology| {
        let queue = names.prepare_of(&service.name);
        let mut of_it = findings.iter().filter(|it| it.subject.name() == queue.as_str());
        of_it.any(|finding| is_term(&finding.fault))
    };
    let services: Vec<_> = services.iter().filter(is_another).map(|it| it.name.as_str()).collect();
    (!services.is_empty()).then(|| {
        format!(
            "the queue of `{}` was made from another max_wait_ms (x-message-ttl) or cap \
             (x-single-active-consumer): give the services.json it was made from, or change it by \
             `dtc topology apply --replace {}`, which loses nothing",
            services.join("`, `"),
            services.join(" --replace "),
        )
    })
}

/// The `services` with these `names`.
fn named<'a>(
    services: &'a [ServiceTopology],
    names: &[ServiceName],
) -> Result<Vec<&'a ServiceTopology>, Failure> {
    let named = names.iter().map(|name| {
        let service = services.iter().find(|service| service.name == *name);
        let service = service.with_context(|| {
            let named: Vec<_> = services.iter().map(|it| it.name.as_str()).collect();
            let there_are = match named.is_empty() {
                true => "they name none".to_owned(),
                false => format!("there are `{}`", named.join("`, `")),
            };
            format!("neither --services nor the configuration has a service `{name}`; {there_are}")
        });
        service.map_err(|error| Failure::new(Exit::Usage, error))
    });
    named.collect()
}

fn run_delete(arguments: &DeleteArguments) -> Result<Exit, Failure> {
    let (runtime, _interrupt) = pipeline::runtime()?;
    let config = arguments.broker.load(arguments.scope.flags())?;
    let (broker, names) = (broker::broker(&config, "dtc topology"), broker::names(&config));
    let topology = arguments.scope.topology(&names, &config)?;
    runtime.block_on(async {
        let connection = broker.connect("topology").await.map_err(unreachable)?;
        let deleted = delete::delete(&connection, &topology).await;
        close(&connection).await;
        deleted.map_err(|error| Failure::new(exit_by(error.disposition()), error))
    })?;
    Ok(Exit::Done)
}

fn run_check(arguments: &CheckArguments) -> Result<Exit, Failure> {
    let (runtime, _interrupt) = pipeline::runtime()?;
    let config = arguments.broker.load(arguments.scope.flags())?;
    let (broker, names) = (broker::broker(&config, "dtc topology"), broker::names(&config));
    let services = arguments.scope.services(&config)?;
    let topology = Topology::of(&names, &services, &config.topology.settings);
    let findings = runtime.block_on(async {
        let mut retry = Retry::within(arguments.wait);
        // A broker that has just started may end the connection during the check.
        let mut start_retry = Retry::within(arguments.wait.max(STARTING_MAX));
        loop {
            let failure = match broker.connect("topology").await {
                Ok(connection) => {
                    let checked = check(&connection, &names, &topology).await;
                    close(&connection).await;
                    match checked {
                        Ok(findings) => return Ok(findings),
                        Err(error)
                            if error.may_be_starting() && start_retry.after_pause().await =>
                        {
                            continue;
                        }
                        Err(error) => not_applied(error.into()),
                    }
                }
                Err(error) => unreachable(error),
            };
            if failure.exit != Exit::Unavailable || !retry.after_pause().await {
                return Err(failure);
            }
        }
    })?;
    explain_kind(&findings, &config);
    print(&match arguments.output {
        TopologyForm::Text => {
            let lines = findings.iter().map(ToString::to_string);
            lines.map(|finding| format!("{}\n", escape::line(&finding))).collect()
        }
        TopologyForm::Json => {
            let findings: Vec<_> = findings.iter().map(finding_json).collect();
            format!("{:#}\n", Value::Array(findings))
        }
    })?;
    if services.is_empty() {
        tell(NO_SERVICES);
    }
    if let Some(way_out) = way_out(&findings, &services, &names) {
        tell(&format!("{way_out}\n"));
    }
    Ok(if findings.is_empty() { Exit::Done } else { Exit::Incomplete })
}

fn unreachable(error: ConnectionError) -> Failure {
    Failure::new(exit_of(&error), error)
}

fn not_applied(error: TopologyError) -> Failure {
    let exit = match &error {
        TopologyError::Mismatch(_) => Exit::Incomplete,
        TopologyError::Connect(_)
        | TopologyError::Open(_)
        | TopologyError::Check(_)
        | TopologyError::Declare { .. }
        | TopologyError::Bind { .. }
        | TopologyError::Begin { .. }
        | TopologyError::Unavailable(_)
        | TopologyError::NotTaken { .. } => exit_by(error.disposition()),
    };
    Failure::new(exit, error)
}

fn not_replaced(error: ReplaceError) -> Failure {
    match error {
        ReplaceError::Consumed { .. } => Failure::new(Exit::Incomplete, error),
        ReplaceError::Declare(error) => not_applied(error),
        ReplaceError::Step { .. } | ReplaceError::NotTaken { .. } => {
            Failure::new(exit_by(error.disposition()), error)
        }
    }
}

fn exit_by(disposition: Disposition) -> Exit {
    match disposition {
        Disposition::GiveUp => Exit::Refused,
        Disposition::Retry => Exit::Unavailable,
    }
}

fn warn(applied: &ApplyReport, names: &Names, clock_margin: Duration) {
    if let Some(JournalStart { complete_since, was_lost: true }) = applied.begun {
        let until = complete_since + clock_margin;
        tell(&format!(
            "warning: the journal `{}` was missing or empty though this system has been at work: \
             its decisions are lost. Transactions that were or will be requested before {} are parked, \
             for an operator to decide.\n",
            names.journal(),
            moment::shown(until),
        ));
    }
}

fn print(text: &str) -> Result<Exit, Failure> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(Exit::Done),
        // The reader closed the pipe: nothing to report.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(Exit::Incomplete),
        Err(error) => {
            let error = anyhow::Error::new(error).context("failed to write to stdout");
            Err(Failure::new(Exit::Incomplete, error))
        }
    }
}

fn applied_text(applied: &ApplyReport, names: &Names) -> String {
    let mut text = String::new();
    for subject in &applied.created {
        let _ = writeln!(text, "created {subject}");
    }
    if let Some(begun) = applied.begun {
        let since = moment::shown(begun.complete_since);
        let journal = names.journal();
        let _ = writeln!(text, "began journal `{journal}`, complete since {since}");
    }
    text
}

fn replaced_text(replaced: &[ReplaceReport]) -> String {
    let mut text = String::new();
    for ReplaceReport { queues, prepares, finishes } in replaced {
        for queue in queues {
            let _ = writeln!(text, "replaced queue `{queue}`");
        }
        if prepares + finishes > 0 {
            let _ = writeln!(text, "moved {prepares} prepares and {finishes} finishes");
        }
    }
    text
}

fn replaced_json(replaced: &ReplaceReport) -> Value {
    let ReplaceReport { queues, prepares, finishes } = replaced;
    json!({"queues": queues, "prepares_moved": prepares, "finishes_moved": finishes})
}

fn applied_json(replaced: &[ReplaceReport], applied: &ApplyReport) -> Value {
    let begun = applied.begun.map(|begun| {
        json!({
            "complete_since": begun.complete_since.as_millis(),
            "was_lost": begun.was_lost,
        })
    });
    json!({
        "replaced": replaced.iter().map(replaced_json).collect::<Vec<_>>(),
        "created": applied.created.iter().map(subject_json).collect::<Vec<_>>(),
        "journal_begun": begun,
        "unavailable": applied.unavailable.iter().map(finding_json).collect::<Vec<_>>(),
    })
}

fn subject_json(subject: &Subject) -> Value {
    json!({"kind": subject.kind(), "name": subject.name()})
}

fn finding_json(finding: &Finding) -> Value {
    let mut value = subject_json(&finding.subject);
    let mut set = |field: &str, to: Value| value[field] = to;
    match &finding.fault {
        Fault::Missing => set("fault", "missing".into()),
        Fault::Differs(difference) => {
            set("fault", "differs".into());
            set("argument", json!(difference.argument));
            set("wanted", json!(difference.wanted));
            set("found", json!(difference.found));
        }
        Fault::Refused(text) => {
            set("fault", "refused".into());
            set("message", json!(text));
        }
        Fault::NotBegun(found) => {
            set("fault", "not_begun".into());
            set("found", json!(found));
        }
        Fault::LeftOver => set("fault", "left_over".into()),
        Fault::Unavailable(why) => {
            set("fault", "unavailable".into());
            set("message", json!(why));
        }
    }
    value
}

fn text(topology: &Topology) -> String {
    let listed = |arguments: &Arguments| {
        let arguments = arguments.iter().map(|(name, value)| format!("{name}={value}"));
        arguments.collect::<Vec<_>>().join(" ")
    };
    let exchanges = topology
        .exchanges
        .iter()
        .map(|it| [it.name.to_string(), it.kind.to_string(), listed(&it.arguments())]);
    let queues = topology
        .queues
        .iter()
        .map(|it| [it.name.to_string(), it.kind.to_string(), listed(&it.arguments)]);
    let bindings = topology
        .bindings
        .iter()
        .map(|it| [it.queue.to_string(), it.exchange.to_string(), it.key.to_string()]);
    [
        table(["EXCHANGE", "KIND", "ARGUMENTS"], exchanges.collect()),
        table(["QUEUE", "KIND", "ARGUMENTS"], queues.collect()),
        table(["BOUND QUEUE", "TO EXCHANGE", "BY KEY"], bindings.collect()),
    ]
    .join("\n")
}

fn table(titles: [&str; 3], rows: Vec<[String; 3]>) -> String {
    let rows: Vec<_> = std::iter::once(titles.map(str::to_owned)).chain(rows).collect();
    let width = |column: fn(&[String; 3]) -> &str| {
        rows.iter().map(|row| column(row).len()).max().unwrap_or_default()
    };
    let (first_width, second_width) = (width(|row| &row[0]), width(|row| &row[1]));
    let mut text = String::new();
    for [first, second, third] in &rows {
        let line = format!("{first:<first_width$}  {second:<second_width$}  {third}");
        let _ = writeln!(text, "{}", line.trim_end());
    }
    text
}

fn topology_json(topology: &Topology) -> Value {
    let arguments = |arguments: &Arguments| {
        let arguments = arguments.iter().map(|(name, value)| {
            let value = match value {
                Argument::Number(number) => json!(number),
                Argument::Text(text) => json!(text),
                Argument::Flag(flag) => json!(flag),
            };
            (name.clone(), value)
        });
        Value::Object(arguments.collect())
    };
    let exchanges = topology.exchanges.iter().map(|it| {
        json!({
            "name": it.name.as_str(),
            "kind": it.kind.to_string(),
            "arguments": arguments(&it.arguments()),
        })
    });
    let queues = topology.queues.iter().map(|it| {
        json!({
            "name": it.name.as_str(),
            "kind": it.kind.to_string(),
            "arguments": arguments(&it.all_arguments()),
        })
    });
    let bindings = topology.bindings.iter().map(|it| {
        json!({
            "queue": it.queue.as_str(),
            "exchange": it.exchange.as_str(),
            "key": it.key.as_str(),
        })
    });
    json!({
        "exchanges": exchanges.collect::<Vec<_>>(),
        "queues": queues.collect::<Vec<_>>(),
        "bindings": bindings.collect::<Vec<_>>(),
    })
}
