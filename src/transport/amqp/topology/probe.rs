//! Finding out the properties of an exchange or queue at a broker, over AMQP.
//!
//! A passive declaration shows whether it exists, not its properties. An active one of an existing
//! object changes nothing; if anything differs, the broker refuses it, and the refusal names one
//! argument with its value. So all differences are found by repeating the declaration, each time
//! with the values found so far. Every refusal closes the channel, and so does a question that is
//! not answered in time: these are throw-away channels.

use lapin::{
    Channel, Connection, ErrorKind,
    options::{ExchangeDeclareOptions, QueueDeclareOptions},
    protocol::{AMQPErrorKind, AMQPSoftError},
    types::FieldTable,
};

use crate::transport::amqp::{
    bounded::{ANSWER_MAX, AskError, answer},
    error::{broker_text, is_not_found, is_out_of_reach},
    topology::{
        Argument, Arguments, Exchange, ExchangeKind, Queue,
        finding::{Difference, Fault, Finding, Subject},
        table,
    },
};

/// After how many questions in a row without an answer, each on a new channel, to stop.
const UNANSWERED_MAX: u32 = 3;

/// How often one object is declared again: more than a queue can have arguments.
const ROUNDS_MAX: usize = 32;

/// Channels that the broker may close.
pub(super) struct Prober<'a> {
    connection: &'a Connection,
    channel: Option<Channel>,
    /// How many questions in a row were not answered in time.
    unanswered: u32,
}

/// What exists under a name.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Presence {
    Missing,
    There,
    /// It belongs to another connection, and ends with it.
    Exclusive,
}

impl<'a> Prober<'a> {
    pub(super) fn on(connection: &'a Connection) -> Self {
        Self { connection, channel: None, unanswered: 0 }
    }

    async fn channel(&mut self) -> Result<Channel, lapin::Error> {
        if let Some(channel) = self.channel.as_ref().filter(|it| it.status().connected()) {
            return Ok(channel.clone());
        }
        let channel = self.connection.create_channel().await?;
        self.channel = Some(channel.clone());
        Ok(channel)
    }

    /// Whether to stop asking.
    pub(super) fn is_given_up(&self) -> bool {
        self.unanswered >= UNANSWERED_MAX
    }

    /// The broker's answer to one question.
    pub(super) async fn ask<T>(
        &mut self,
        ask: impl AsyncFnOnce(Channel) -> Result<T, lapin::Error>,
    ) -> Result<T, AskError> {
        let answered = answer(ANSWER_MAX, async { ask(self.channel().await?).await }).await;
        match &answered {
            Ok(_) => self.unanswered = 0,
            Err(error) => {
                self.channel = None;
                self.unanswered = if error.is_silent() { self.unanswered + 1 } else { 0 };
            }
        }
        answered
    }

    /// Whether a queue called `name` exists.
    pub(super) async fn queue_presence(&mut self, name: &str) -> Result<Presence, AskError> {
        let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
        let asked = self.ask(async |channel| {
            channel.queue_declare(name.into(), options, FieldTable::default()).await
        });
        presence(asked.await.map(drop))
    }

    async fn exchange_presence(&mut self, exchange: &Exchange) -> Result<Presence, AskError> {
        let options = ExchangeDeclareOptions { passive: true, ..ExchangeDeclareOptions::default() };
        let (name, kind) = (exchange.name.clone(), exchange.kind.into());
        let asked = self.ask(async |channel| {
            channel.exchange_declare(name, kind, options, FieldTable::default()).await
        });
        presence(asked.await)
    }

    /// The differences of `queue`; none if it is as it should be.
    pub(super) async fn queue(&mut self, queue: &Queue) -> Result<Vec<Finding>, AskError> {
        let subject = Subject::Queue(queue.name.to_string());
        match self.queue_presence(queue.name.as_str()).await? {
            Presence::Missing => return Ok(vec![Finding::missing(subject)]),
            Presence::Exclusive => {
                let difference = Difference::new("exclusive", Some("false"), Some("true"));
                return Ok(vec![Finding { subject, fault: Fault::Differs(difference) }]);
            }
            Presence::There => {}
        }
        let mut tried = DeclaredProperties {
            arguments: queue.all_arguments(),
            ..DeclaredProperties::default()
        };
        self.differences(subject, &mut tried, async |channel: Channel, it: &DeclaredProperties| {
            let options = QueueDeclareOptions {
                durable: it.durable,
                auto_delete: it.auto_delete,
                exclusive: it.exclusive,
                ..QueueDeclareOptions::default()
            };
            let declaring =
                channel.queue_declare(queue.name.clone(), options, table(&it.arguments));
            declaring.await.map(drop)
        })
        .await
    }

    /// The differences of `exchange`; none if it is as it should be.
    pub(super) async fn exchange(&mut self, exchange: &Exchange) -> Result<Vec<Finding>, AskError> {
        let subject = Subject::Exchange(exchange.name.to_string());
        if self.exchange_presence(exchange).await? == Presence::Missing {
            return Ok(vec![Finding::missing(subject)]);
        }
        let mut tried = DeclaredProperties {
            arguments: exchange.arguments(),
            kind: exchange.kind.to_string(),
            ..DeclaredProperties::default()
        };
        self.differences(subject, &mut tried, async |channel: Channel, it: &DeclaredProperties| {
            let options = ExchangeDeclareOptions {
                durable: it.durable,
                auto_delete: it.auto_delete,
                internal: it.internal,
                ..ExchangeDeclareOptions::default()
            };
            let kind = lapin::ExchangeKind::Custom(it.kind.clone());
            let name = exchange.name.clone();
            channel.exchange_declare(name, kind, options, table(&it.arguments)).await
        })
        .await
    }

    /// Declares by `declare` until the broker accepts, each time with the values that it reported.
    async fn differences(
        &mut self,
        subject: Subject,
        tried: &mut DeclaredProperties,
        declare: impl AsyncFn(Channel, &DeclaredProperties) -> Result<(), lapin::Error>,
    ) -> Result<Vec<Finding>, AskError> {
        let mut findings = Vec::new();
        for _ in 0..ROUNDS_MAX {
            let asked = self.ask(async |channel| declare(channel, tried).await);
            let Err(error) = asked.await else { break };
            let Some(fault) = error.broker().and_then(fault_of) else { return Err(error) };
            let finding = Finding { subject: subject.clone(), fault };
            if findings.contains(&finding) {
                break;
            }
            let learnt = match &finding.fault {
                Fault::Differs(difference) => tried.accept(difference),
                Fault::Missing
                | Fault::Refused(_)
                | Fault::NotBegun(_)
                | Fault::LeftOver
                | Fault::Unavailable(_) => false,
            };
            findings.push(finding);
            if !learnt {
                break;
            }
        }
        Ok(findings)
    }
}

/// The result of a passive declaration.
fn presence(asked: Result<(), AskError>) -> Result<Presence, AskError> {
    match asked {
        Ok(()) => Ok(Presence::There),
        Err(AskError::Broker(error)) if is_not_found(&error) => Ok(Presence::Missing),
        Err(AskError::Broker(error)) if is_soft(&error, &AMQPSoftError::RESOURCELOCKED) => {
            Ok(Presence::Exclusive)
        }
        Err(error) => Err(error),
    }
}

/// The fault of an object about which the broker can't be asked, if that concerns the object.
pub(super) fn unavailable(error: &AskError) -> Option<Fault> {
    match error {
        AskError::Broker(error) if is_out_of_reach(error) => {
            Some(Fault::Unavailable("its node is down or unreachable".to_owned()))
        }
        AskError::Silent { .. } => Some(Fault::Unavailable(error.to_string())),
        AskError::Broker(_) | AskError::Blocked { .. } => None,
    }
}

/// The fault in the broker's refusal of a declaration, if the object differs.
pub(super) fn fault_of(error: &lapin::Error) -> Option<Fault> {
    if is_soft(error, &AMQPSoftError::RESOURCELOCKED) {
        let difference = Difference::new("exclusive", Some("false"), Some("true"));
        return Some(Fault::Differs(difference));
    }
    if !is_soft(error, &AMQPSoftError::PRECONDITIONFAILED) {
        return None;
    }
    let text = broker_text(error);
    Some(Difference::parse(&text).map_or(Fault::Refused(text), Fault::Differs))
}

fn is_soft(error: &lapin::Error, soft: &AMQPSoftError) -> bool {
    let ErrorKind::ProtocolError(error) = error.kind() else { return false };
    matches!(error.kind(), AMQPErrorKind::Soft(it) if it == soft)
}

/// The values that are declared in one round.
struct DeclaredProperties {
    durable: bool,
    auto_delete: bool,
    exclusive: bool,
    internal: bool,
    /// For an exchange.
    kind: String,
    arguments: Arguments,
}

impl Default for DeclaredProperties {
    fn default() -> Self {
        Self {
            durable: true,
            auto_delete: false,
            exclusive: false,
            internal: false,
            kind: String::new(),
            arguments: Arguments::new(),
        }
    }
}

impl DeclaredProperties {
    /// Adopts a value that was found. Returns whether there may be more to learn: arguments that
    /// depend on the kind can't be compared with another kind's.
    fn accept(&mut self, difference: &Difference) -> bool {
        let found = difference.found.as_deref();
        let flag = found == Some("true");
        match difference.argument.as_str() {
            "durable" => self.durable = flag,
            "auto_delete" => self.auto_delete = flag,
            "internal" => self.internal = flag,
            "type" | "exclusive" | Queue::KIND => return false,
            name => {
                match found.map(|found| difference.value_of(found)) {
                    Some(value) => self.arguments.insert(name.to_owned(), value),
                    None => self.arguments.remove(name),
                };
            }
        }
        true
    }
}

impl From<ExchangeKind> for lapin::ExchangeKind {
    fn from(kind: ExchangeKind) -> Self {
        match kind {
            ExchangeKind::Topic => Self::Topic,
            ExchangeKind::Fanout => Self::Fanout,
        }
    }
}

impl Difference {
    /// `found` as a value of its type.
    fn value_of(&self, found: &str) -> Argument {
        match (self.found_type.as_deref(), found) {
            (Some("longstr" | "binary"), text) => Argument::Text(text.to_owned()),
            (_, "true") => Argument::Flag(true),
            (_, "false") => Argument::Flag(false),
            (_, text) => match text.parse() {
                Ok(number) => Argument::Number(number),
                Err(_) => Argument::Text(text.to_owned()),
            },
        }
    }
}
