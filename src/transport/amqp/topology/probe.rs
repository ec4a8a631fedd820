//! Asking a broker what an exchange or queue is like, over AMQP.
//!
//! A passive declaration tells whether it exists, not what it is like. An active one of something
//! that exists changes nothing; it is refused where it differs, and the refusal names one argument
//! with its value. So everything that differs is found by declaring again and again, each time with
//! what was found. Every refusal costs the channel, so these are throw-away channels.

use lapin::{
    Channel, Connection, ErrorKind,
    options::{ExchangeDeclareOptions, QueueDeclareOptions},
    protocol::{AMQPErrorKind, AMQPSoftError},
    types::FieldTable,
};

use crate::transport::amqp::{
    error::is_not_found,
    topology::{
        Argument, Arguments, Exchange, ExchangeKind, Queue,
        finding::{Difference, Fault, Finding, Subject},
        table,
    },
};

/// How often one thing is declared again; more than the arguments that a queue can have.
const ROUNDS_MAX: usize = 32;

/// Channels that may be lost.
pub(super) struct Prober<'a> {
    connection: &'a Connection,
    channel: Option<Channel>,
}

/// What a broker has under a name.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Presence {
    Missing,
    There,
    /// It belongs to another connection, and goes with it.
    Exclusive,
}

impl<'a> Prober<'a> {
    pub(super) fn on(connection: &'a Connection) -> Self {
        Self { connection, channel: None }
    }

    async fn channel(&mut self) -> Result<Channel, lapin::Error> {
        if let Some(channel) = self.channel.as_ref().filter(|it| it.status().connected()) {
            return Ok(channel.clone());
        }
        let channel = self.connection.create_channel().await?;
        self.channel = Some(channel.clone());
        Ok(channel)
    }

    /// Whether there is a queue called `name`.
    pub(super) async fn queue_presence(&mut self, name: &str) -> Result<Presence, lapin::Error> {
        let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
        let channel = self.channel().await?;
        match channel.queue_declare(name.into(), options, FieldTable::default()).await {
            Ok(_) => Ok(Presence::There),
            Err(error) => self.absence(error),
        }
    }

    async fn exchange_presence(&mut self, exchange: &Exchange) -> Result<Presence, lapin::Error> {
        let options = ExchangeDeclareOptions { passive: true, ..ExchangeDeclareOptions::default() };
        let channel = self.channel().await?;
        let kind = exchange.kind.into();
        let name = exchange.name.clone();
        match channel.exchange_declare(name, kind, options, FieldTable::default()).await {
            Ok(()) => Ok(Presence::There),
            Err(error) => self.absence(error),
        }
    }

    /// What a refused passive declaration means.
    fn absence(&mut self, error: lapin::Error) -> Result<Presence, lapin::Error> {
        self.channel = None;
        // A queue whose node is down is "not found" too; it is not missing.
        if is_not_found(&error) && !said(&error).contains("down or inaccessible") {
            return Ok(Presence::Missing);
        }
        if is_soft(&error, &AMQPSoftError::RESOURCELOCKED) {
            return Ok(Presence::Exclusive);
        }
        Err(error)
    }

    /// What is wrong with `queue`; nothing if it is as it should be.
    pub(super) async fn queue(&mut self, queue: &Queue) -> Result<Vec<Finding>, lapin::Error> {
        let subject = Subject::Queue(queue.name.to_string());
        match self.queue_presence(queue.name.as_str()).await? {
            Presence::Missing => return Ok(vec![Finding::missing(subject)]),
            Presence::Exclusive => {
                let difference = Difference::new("exclusive", Some("false"), Some("true"));
                return Ok(vec![Finding { subject, fault: Fault::Differs(difference) }]);
            }
            Presence::There => {}
        }
        let mut tried = Declared { arguments: queue.all_arguments(), ..Declared::default() };
        self.differences(subject, &mut tried, async |channel: Channel, it: &Declared| {
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

    /// What is wrong with `exchange`; nothing if it is as it should be.
    pub(super) async fn exchange(
        &mut self,
        exchange: &Exchange,
    ) -> Result<Vec<Finding>, lapin::Error> {
        let subject = Subject::Exchange(exchange.name.to_string());
        if self.exchange_presence(exchange).await? == Presence::Missing {
            return Ok(vec![Finding::missing(subject)]);
        }
        let mut tried = Declared {
            arguments: exchange.arguments(),
            kind: exchange.kind.to_string(),
            ..Declared::default()
        };
        self.differences(subject, &mut tried, async |channel: Channel, it: &Declared| {
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

    /// Declares by `declare` until it is accepted, each time with what the broker said it has.
    async fn differences(
        &mut self,
        subject: Subject,
        tried: &mut Declared,
        declare: impl AsyncFn(Channel, &Declared) -> Result<(), lapin::Error>,
    ) -> Result<Vec<Finding>, lapin::Error> {
        let mut findings = Vec::new();
        for _ in 0..ROUNDS_MAX {
            let Err(error) = declare(self.channel().await?, tried).await else { break };
            self.channel = None;
            let Some(fault) = fault_of(&error) else { return Err(error) };
            let finding = Finding { subject: subject.clone(), fault };
            if findings.contains(&finding) {
                break;
            }
            let learnt = match &finding.fault {
                Fault::Differs(difference) => tried.accept(difference),
                Fault::Missing | Fault::Refused(_) | Fault::NotBegun(_) | Fault::LeftOver => false,
            };
            findings.push(finding);
            if !learnt {
                break;
            }
        }
        Ok(findings)
    }
}

/// What the broker's refusal of a declaration says, if it is that the thing is another.
pub(super) fn fault_of(error: &lapin::Error) -> Option<Fault> {
    if is_soft(error, &AMQPSoftError::RESOURCELOCKED) {
        let difference = Difference::new("exclusive", Some("false"), Some("true"));
        return Some(Fault::Differs(difference));
    }
    if !is_soft(error, &AMQPSoftError::PRECONDITIONFAILED) {
        return None;
    }
    let text = said(error);
    Some(Difference::parse(&text).map_or(Fault::Refused(text), Fault::Differs))
}

fn is_soft(error: &lapin::Error, soft: &AMQPSoftError) -> bool {
    let ErrorKind::ProtocolError(error) = error.kind() else { return false };
    matches!(error.kind(), AMQPErrorKind::Soft(it) if it == soft)
}

/// The broker's own words.
fn said(error: &lapin::Error) -> String {
    let ErrorKind::ProtocolError(error) = error.kind() else { return error.to_string() };
    error.get_message().to_string()
}

/// What is declared in one round.
struct Declared {
    durable: bool,
    auto_delete: bool,
    exclusive: bool,
    internal: bool,
    /// Of an exchange.
    kind: String,
    arguments: Arguments,
}

impl Default for Declared {
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

impl Declared {
    /// Takes over what was found. Says no if there is nothing more to learn: what hangs on the kind
    /// can't be compared with another kind's.
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
    /// `found` as the kind of value that it is.
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
