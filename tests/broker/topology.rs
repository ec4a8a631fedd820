//! `dtc topology` on a broker: what it declares, what it reports, and that it loses nothing.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail here")]

use std::{
    collections::BTreeSet,
    path::PathBuf,
    process::{Command, Output},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use dtc::wire::message::{JournalBegun, Kind, decode};
use futures_util::StreamExt;
use lapin::{
    BasicProperties, Channel, Connection, ConnectionProperties, Consumer, ExchangeKind,
    options::{
        BasicAckOptions, BasicConsumeOptions, BasicGetOptions, BasicPublishOptions,
        BasicQosOptions, ConfirmSelectOptions, ExchangeDeclareOptions, QueueDeclareOptions,
        QueueDeleteOptions,
    },
    types::{AMQPValue, FieldTable},
};
use serde_json::{Value, json};

use crate::{
    broker::{self, Broker},
    processes::{LIMIT, Process, World},
};

const MARGIN_MS: u64 = 60_000;

#[tokio::test]
async fn a_second_apply_declares_nothing() {
    let world = System::new();
    let made = world.apply().exited(0).said("");
    println!("RabbitMQ {}:\n{made}", broker::version());
    let lines: Vec<_> = made.lines().collect();
    assert_eq!(lines.iter().filter(|line| line.starts_with("created ")).count(), 18);
    assert!(lines.last().unwrap().starts_with(&format!("began journal `{}.journal`", world.ns())));
    assert_eq!(world.apply().exited(0).said("nothing was missing\n"), "");
    assert_eq!(world.check().exited(0).said(""), "");
}

#[tokio::test]
async fn a_check_of_an_empty_namespace_lists_everything_and_declares_nothing() {
    let world = System::new();
    let printed: Value = serde_json::from_str(&world.print()).unwrap();
    let wanted: BTreeSet<_> = ["exchanges", "queues"]
        .iter()
        .flat_map(|kind| printed[kind].as_array().unwrap().iter().map(move |it| (*kind, it)))
        .map(|(kind, it)| {
            let kind = kind.trim_end_matches('s');
            format!("{kind} `{}`: missing", it["name"].as_str().unwrap())
        })
        .collect();
    for _ in 0..2 {
        let found = world.check().exited(1).said("");
        assert_eq!(found.lines().map(str::to_owned).collect::<BTreeSet<_>>(), wanted);
    }
    assert_eq!(wanted.len(), 18);
}

#[tokio::test]
async fn with_a_new_journal_requests_are_served_at_once() {
    let world = System::new();
    let before = now_ms();
    world.apply().exited(0);
    let after = now_ms();
    let records = world.journal(1).await;
    let since = records[0];
    assert!(since >= before - 2 * MARGIN_MS - 1000, "{since} {before}");
    assert!(since <= after - 2 * MARGIN_MS - 1000, "{since} {after}");
}

#[tokio::test]
async fn a_journal_lost_in_an_existing_system_is_complete_only_from_then_on() {
    let world = System::new();
    world.apply().exited(0);
    world.delete_queue("journal").await;
    let missing = format!("queue `{}.journal`: missing\n", world.ns());
    assert_eq!(world.check().exited(1).said(""), missing);
    let before = now_ms();
    let ended = world.apply().exited(0);
    assert!(ended.stderr.contains("warning: the journal"), "{}", ended.stderr);
    assert!(ended.stderr.contains("for an operator to decide"), "{}", ended.stderr);
    let since = world.journal(1).await[0];
    assert!(since >= before + MARGIN_MS, "{since} {before}");
    assert_eq!(world.apply().exited(0).said("nothing was missing\n"), "");
}

#[tokio::test]
async fn an_apply_writes_the_first_record_of_a_journal_that_lacks_it() {
    let world = System::new();
    let age = ("x-max-age", AMQPValue::LongString("7D".into()));
    let locator = ("x-queue-leader-locator", AMQPValue::LongString("balanced".into()));
    world.declare("journal", "stream", [age, locator]).await;
    let found = world.check().exited(1).stdout;
    let finding = format!(
        "queue `{}.journal`: wanted journal-begun as its first record, found none\n",
        world.ns()
    );
    assert!(found.ends_with(&finding), "{found}");
    let before = now_ms();
    let ended = world.apply().exited(0);
    assert_eq!(ended.stderr, "");
    assert!(world.journal(1).await[0] < before - 2 * MARGIN_MS);
    assert_eq!(world.check().exited(0).stdout, "");
}

#[tokio::test]
async fn many_concurrent_applies_begin_a_new_journal_as_a_new_one() {
    let world = System::new();
    let before = now_ms();
    let start = |name| Process::start(name, &mut world.topology("apply"));
    let processes = ["a", "b", "c", "d"].map(start);
    for process in processes {
        process.succeeded(LIMIT);
    }
    assert!(world.journal(1).await[0] < before);
    assert_eq!(world.check().exited(0).stdout, "");
}

#[tokio::test]
async fn each_difference_is_named_with_wanted_and_found_values_and_nothing_is_declared() {
    let world = System::new();
    let ns = world.ns();
    let number = |number: i64| AMQPValue::LongLongInt(number);
    let text = |text: &str| AMQPValue::LongString(text.into());
    let replies = format!("{ns}.replies");
    world
        .declare(
            "prepare.stock",
            "classic",
            [
                ("x-message-ttl", number(5)),
                ("x-dead-letter-exchange", text("elsewhere")),
                ("x-max-length", number(7)),
                ("x-single-active-consumer", AMQPValue::Boolean(true)),
            ],
        )
        .await;
    world.declare("requests", "classic", []).await;
    // Not every version compares a timeout.
    let timeout = ("x-consumer-timeout", number(172_800_000));
    world.declare("rejected", "quorum", [timeout, ("x-delivery-limit", number(20))]).await;
    world.declare("journal", "stream", [("x-max-age", text("1D"))]).await;
    let transient = QueueDeclareOptions { auto_delete: true, ..QueueDeclareOptions::default() };
    let arguments = table([
        ("x-queue-type", text("classic")),
        ("x-message-ttl", number(1000)),
        ("x-dead-letter-exchange", text(&replies)),
    ]);
    let channel = world.channel().await;
    let queue = format!("{ns}.prepare.payments");
    channel.queue_declare(queue.as_str().into(), transient, arguments).await.unwrap();
    let durable = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
    for (name, kind) in [("replies", ExchangeKind::Topic), ("results", ExchangeKind::Direct)] {
        let name = format!("{ns}.{name}");
        let arguments = FieldTable::default();
        channel.exchange_declare(name.into(), kind, durable, arguments).await.unwrap();
    }

    let expected: BTreeSet<String> = [
        format!("exchange `{ns}.replies`: alternate-exchange: wanted {ns}.inquiries, found none"),
        format!("exchange `{ns}.results`: type: wanted topic, found direct"),
        format!("queue `{ns}.journal`: x-max-age: wanted 7D, found 1D"),
        format!("queue `{ns}.journal`: x-queue-leader-locator: wanted balanced, found none"),
        format!("queue `{ns}.prepare.payments`: durable: wanted true, found false"),
        format!("queue `{ns}.prepare.payments`: auto_delete: wanted false, found true"),
        format!("queue `{ns}.prepare.stock`: x-message-ttl: wanted 1000, found 5"),
        format!(
            "queue `{ns}.prepare.stock`: x-dead-letter-exchange: wanted {replies}, found elsewhere"
        ),
        format!("queue `{ns}.prepare.stock`: x-max-length: wanted none, found 7"),
        format!("queue `{ns}.prepare.stock`: x-single-active-consumer: wanted none, found true"),
        format!("queue `{ns}.rejected`: x-delivery-limit: wanted 1000000, found 20"),
        format!("queue `{ns}.rejected`: x-queue-leader-locator: wanted balanced, found none"),
        format!("queue `{ns}.rejected`: x-message-ttl: wanted 2592000000, found none"),
        format!("queue `{ns}.requests`: x-queue-type: wanted quorum, found classic"),
    ]
    .into();
    let lines = |text: &str| text.lines().map(str::to_owned).collect::<BTreeSet<_>>();
    let way_out = way_out("stock");
    let found = world.check().exited(1).said(&format!("{way_out}\n"));
    let differ: BTreeSet<_> =
        lines(&found).into_iter().filter(|line| !line.ends_with(": missing")).collect();
    println!("RabbitMQ {}: {found}", broker::version());
    assert_eq!(differ, expected);

    let ended = world.apply().exited(1);
    let said = expected.into_iter().chain([way_out]).collect();
    assert_eq!((ended.stdout.as_str(), lines(&ended.stderr)), ("", said));
    assert_eq!(world.check().exited(1).stdout, found, "nothing was made");

    let json = run(world.topology("check").args(["--output", "json"])).exited(1).stdout;
    let json: Value = serde_json::from_str(&json).unwrap();
    let differs = json!({"kind": "queue", "name": format!("{ns}.requests"), "fault": "differs",
        "argument": "x-queue-type", "wanted": "quorum", "found": "classic"});
    assert!(json.as_array().unwrap().contains(&differs), "{json}");
}

#[tokio::test]
async fn waiting_and_held_prepares_survive_a_replacement() {
    let world = System::with(&waiting_for(60_000));
    world.apply().exited(0);
    world.publish_prepares().await;
    let (_, mut instance) = world.consume_as_instances_do("prepare.stock", 2).await;
    let held = [next(&mut instance).await, next(&mut instance).await];

    world.services(&waiting_for(50_000));
    let refused = world.apply().exited(1).stderr;
    let queue = format!("{}.prepare.stock", world.ns());
    let differs = format!("queue `{queue}`: x-message-ttl: wanted 50000, found 60000");
    assert_eq!(refused, format!("{differs}\n{}\n", way_out("stock")));
    let replaced = world.replace(&[]).exited(0).said("");
    assert_eq!(replaced, format!("replaced queue `{queue}`\nmoved 18 prepares and 0 finishes\n"));

    // Its consumer has ended; it consumes again, and finds what it didn't hold.
    let ended = tokio::time::timeout(LIMIT, instance.next()).await.unwrap();
    assert!(ended.is_none(), "{ended:?}");
    let mut bodies: BTreeSet<String> = held.into_iter().map(|(_, body)| body).collect();
    world.take_prepares(18, &mut bodies).await;
    assert_eq!(world.check().exited(0).stdout, "");
    assert_eq!(world.replace(&[]).exited(0).said("nothing was missing\n"), "");
}

#[tokio::test]
async fn prepares_in_a_quorum_queue_survive_a_replacement_once_instances_are_stopped() {
    let flags = ["--commands", "quorum"];
    let world = System::with(&waiting_for(60_000));
    run(world.topology("apply").args(flags)).exited(0);
    world.publish_prepares().await;
    let instance = world.consume("prepare.stock", 2).await;
    world.services(&waiting_for(50_000));
    let queue = format!("{}.prepare.stock", world.ns());
    let told = format!("queue `{queue}` has 1 consumers: stop the instances of `stock` first\n");
    for flags in [&flags[..], &[]] {
        assert_eq!(world.replace(flags).exited(1).stderr, told);
    }
    world.end(instance, "prepare.stock").await;
    let replaced = world.replace(&flags).exited(0).said("");
    assert_eq!(replaced, format!("replaced queue `{queue}`\nmoved 20 prepares and 0 finishes\n"));
    world.take_prepares(20, &mut BTreeSet::new()).await;
    assert_eq!(run(world.topology("check").args(flags)).exited(0).stdout, "");
}

#[tokio::test]
async fn waiting_finishes_survive_a_replacement_for_which_instances_must_be_stopped() {
    let world = System::with(&json!([{"name": "stock", "max_concurrency": 2}]));
    world.apply().exited(0);
    world.delete_queue("finish.stock").await;
    let limit = ("x-delivery-limit", AMQPValue::LongInt(5));
    world.declare("finish.stock", "quorum", [limit]).await;
    world.bind("finish.stock", "finish.any", "*.stock").await;
    let channel = world.channel().await;
    for number in 0..100 {
        world.publish(&channel, "finish", "i1.stock", number).await;
    }
    let instance = world.consume("finish.stock", 1).await;
    let refused = world.replace(&[]).exited(1).stderr;
    let queue = format!("{}.finish.stock", world.ns());
    let told = format!("queue `{queue}` has 1 consumers: stop the instances of `stock` first\n");
    assert_eq!(refused, told);
    world.end(instance, "finish.stock").await;
    let replaced = world.replace(&[]).exited(0).stdout;
    assert_eq!(replaced, format!("replaced queue `{queue}`\nmoved 0 prepares and 100 finishes\n"));
    assert_eq!(world.drain("finish.stock").await, (0..100).collect::<Vec<_>>());
    assert_eq!(world.check().exited(0).stdout, "");
}

#[tokio::test]
async fn an_interrupted_replacement_is_reported_and_completed_by_the_next() {
    let world = System::with(&json!([{"name": "stock", "max_concurrency": 2}]));
    world.apply().exited(0);
    world.delete_queue("finish.stock").await;
    let limit = ("x-delivery-limit", AMQPValue::LongInt(1_000_000));
    let timeout = ("x-consumer-timeout", AMQPValue::LongInt(172_800_000));
    let locator = ("x-queue-leader-locator", AMQPValue::LongString("balanced".into()));
    world.declare("moving.stock", "quorum", [limit, timeout, locator]).await;
    world.bind("moving.stock", "finish.any", "*.stock").await;
    let channel = world.channel().await;
    for number in 0..10 {
        world.publish(&channel, "finish", "i1.stock", number).await;
    }
    let left = format!(
        "queue `{}.moving.stock`: left by a replacement that was not finished\n",
        world.ns()
    );
    assert!(world.check().exited(1).stdout.ends_with(&left));
    assert_eq!(world.apply().exited(1).stderr, left);
    let moved = "moved 0 prepares and 10 finishes\n";
    assert!(world.replace(&[]).exited(0).stdout.ends_with(moved));
    assert_eq!(world.drain("finish.stock").await, (0..10).collect::<Vec<_>>());
    assert_eq!(world.check().exited(0).stdout, "");
}

#[tokio::test]
async fn delete_needs_yes_and_deletes_everything() {
    let world = System::new();
    world.apply().exited(0);
    run(&mut world.topology("delete")).exited(2);
    assert_eq!(world.check().exited(0).stdout, "");
    for _ in 0..2 {
        run(world.topology("delete").arg("--yes")).exited(0).said("");
        let found = world.check().exited(1).stdout;
        assert_eq!(found.lines().filter(|line| line.ends_with(": missing")).count(), 18);
    }
}

#[tokio::test]
async fn a_wrong_password_is_a_refusal_and_is_not_shown() {
    let place = broker::place();
    let (_, host) = place.url.rsplit_once('@').unwrap();
    let url = format!("amqp://guest:wrong-secret@{host}");
    let world = System::new();
    let mut command = Command::new(env!("CARGO_BIN_EXE_dtc"));
    command.args(["topology", "apply", "--wait", "60s", "--broker", &url]);
    let ended = run(&mut command).exited(77);
    assert!(ended.stderr.starts_with("refused by the broker at "), "{}", ended.stderr);
    assert!(!ended.stderr.contains("wrong-secret"), "{}", ended.stderr);
    drop(world);
}

#[test]
fn an_apply_with_wait_survives_a_broker_that_is_down() {
    let broker = Broker::start();
    broker.terminate();
    let system = System { world: World::at(broker.place()) };
    system.services(&json!([{"name": "stock", "max_concurrency": 2}]));
    let ended = system.apply().exited(69);
    assert!(ended.stderr.starts_with("failed to connect to the broker at "), "{}", ended.stderr);
    let waiting = Process::start("apply", system.topology("apply").args(["--wait", "10min"]));
    broker.start_again();
    waiting.succeeded(LIMIT);
    assert_eq!(system.check().exited(0).stdout, "");
}

/// One system's topology.
struct System {
    world: World,
}

impl System {
    fn new() -> Self {
        Self::with(&json!([
            {"name": "payments", "max_concurrency": 2},
            {"name": "stock", "max_concurrency": 1}
        ]))
    }

    fn with(services: &Value) -> Self {
        let system = Self { world: World::at(broker::place()) };
        system.services(services);
        system
    }

    fn services(&self, services: &Value) -> PathBuf {
        self.world.file("services.json", services)
    }

    fn ns(&self) -> &str {
        &self.world.place.namespace
    }

    fn topology(&self, word: &str) -> Command {
        let mut command = self.world.dtc(&["topology", word]);
        command.arg("--services").arg(self.world.path("services.json"));
        command
    }

    fn apply(&self) -> Ended {
        run(&mut self.topology("apply"))
    }

    fn replace(&self, flags: &[&str]) -> Ended {
        run(self.topology("apply").args(["--replace", "stock"]).args(flags))
    }

    fn check(&self) -> Ended {
        run(&mut self.topology("check"))
    }

    fn print(&self) -> String {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dtc"));
        command.args(["topology", "print", "--output", "json", "--namespace", self.ns()]);
        command.arg("--services").arg(self.world.path("services.json"));
        run(&mut command).exited(0).said("")
    }

    async fn channel(&self) -> Channel {
        let url = &self.world.place.url;
        let connection = Connection::connect(url, ConnectionProperties::default()).await.unwrap();
        let channel = connection.create_channel().await.unwrap();
        channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
        channel
    }

    async fn declare<const N: usize>(
        &self,
        queue: &str,
        kind: &str,
        arguments: [(&str, AMQPValue); N],
    ) {
        let mut arguments = table(arguments);
        arguments.insert("x-queue-type".into(), AMQPValue::LongString(kind.into()));
        let options = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
        let queue = format!("{}.{queue}", self.ns());
        self.channel().await.queue_declare(queue.into(), options, arguments).await.unwrap();
    }

    async fn bind(&self, queue: &str, exchange: &str, key: &str) {
        let name = |name: &str| format!("{}.{name}", self.ns()).into();
        let channel = self.channel().await;
        let (options, arguments) = Default::default();
        let bound = channel.queue_bind(name(queue), name(exchange), key.into(), options, arguments);
        bound.await.unwrap();
    }

    async fn delete_queue(&self, queue: &str) {
        let queue = format!("{}.{queue}", self.ns());
        let options = QueueDeleteOptions::default();
        self.channel().await.queue_delete(queue.into(), options).await.unwrap();
    }

    async fn publish(&self, channel: &Channel, exchange: &str, key: &str, number: u32) {
        let exchange = format!("{}.{exchange}", self.ns());
        let options = BasicPublishOptions { mandatory: true, ..Default::default() };
        let body = number.to_string();
        let properties =
            BasicProperties::default().with_delivery_mode(2).with_reply_to("w1".into());
        let published = channel.basic_publish(
            exchange.into(),
            key.into(),
            options,
            body.as_bytes(),
            properties,
        );
        let confirmed = published.await.unwrap().await.unwrap();
        assert!(matches!(confirmed, lapin::Confirmation::Ack(None)), "{confirmed:?}");
    }

    async fn publish_prepares(&self) {
        let channel = self.channel().await;
        for number in 0..20 {
            self.publish(&channel, "prepare", "w1.stock", number).await;
        }
    }

    /// Takes so many more prepares, all different from those taken before.
    async fn take_prepares(&self, count: usize, taken: &mut BTreeSet<String>) {
        let (_, mut instance) = self.consume("prepare.stock", 0).await;
        for _ in 0..count {
            let (key, body) = next(&mut instance).await;
            assert_eq!(key, "w1.stock");
            assert!(taken.insert(body));
        }
        assert_eq!(taken.len(), 20);
    }

    async fn consume(&self, queue: &str, prefetch: u16) -> (Channel, Consumer) {
        self.consume_with(queue, prefetch, FieldTable::default()).await
    }

    /// By a consumer that is ended, and not moved, when the queue is declared again.
    async fn consume_as_instances_do(&self, queue: &str, prefetch: u16) -> (Channel, Consumer) {
        let ending = table([("x-cancel-on-ha-failover", AMQPValue::Boolean(true))]);
        self.consume_with(queue, prefetch, ending).await
    }

    async fn consume_with(
        &self,
        queue: &str,
        prefetch: u16,
        arguments: FieldTable,
    ) -> (Channel, Consumer) {
        let channel = self.channel().await;
        channel.basic_qos(prefetch, BasicQosOptions::default()).await.unwrap();
        let queue = format!("{}.{queue}", self.ns());
        let options = BasicConsumeOptions::default();
        let consumer = channel.basic_consume(queue.into(), "".into(), options, arguments);
        let consumer = consumer.await.unwrap();
        (channel, consumer)
    }

    /// Ends a consumer, and waits until the broker no longer counts it.
    async fn end(&self, (channel, consumer): (Channel, Consumer), queue: &str) {
        channel.close(200, "done".into()).await.unwrap();
        drop(consumer);
        let queue = format!("{}.{queue}", self.ns());
        let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
        let channel = self.channel().await;
        let counting = async {
            let count =
                || channel.queue_declare(queue.as_str().into(), options, FieldTable::default());
            while count().await.unwrap().consumer_count() > 0 {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(LIMIT, counting).await.expect("the broker notices");
    }

    /// All messages in a queue.
    async fn drain(&self, queue: &str) -> Vec<u32> {
        let queue = format!("{}.{queue}", self.ns());
        let channel = self.channel().await;
        let mut numbers = Vec::new();
        let get = || channel.basic_get(queue.as_str().into(), BasicGetOptions::default());
        while let Some(message) = get().await.unwrap() {
            message.delivery.ack(BasicAckOptions::default()).await.unwrap();
            assert_eq!(message.delivery.routing_key.as_str(), "i1.stock");
            assert_eq!(message.delivery.properties.reply_to().as_ref().unwrap().as_str(), "w1");
            numbers.push(String::from_utf8(message.delivery.data).unwrap().parse().unwrap());
        }
        numbers
    }

    /// The times since which the first records of the journal declare it complete.
    async fn journal(&self, count: usize) -> Vec<u64> {
        let channel = self.channel().await;
        channel.basic_qos(10, BasicQosOptions::default()).await.unwrap();
        let first = table([("x-stream-offset", AMQPValue::LongString("first".into()))]);
        let queue = format!("{}.journal", self.ns());
        let options = BasicConsumeOptions::default();
        let mut consumer =
            channel.basic_consume(queue.into(), "".into(), options, first).await.unwrap();
        let mut moments = Vec::new();
        while moments.len() < count {
            let record = tokio::time::timeout(LIMIT, consumer.next()).await.unwrap();
            let record = record.unwrap().unwrap();
            let kind = record.properties.kind().as_ref().unwrap().as_str();
            assert_eq!(Kind::parse_type(kind), Some(Kind::JournalBegun));
            let items = decode::<JournalBegun>(&record.data).unwrap();
            moments.extend(items.into_iter().map(|it| it.unwrap().complete_since.as_millis()));
        }
        moments
    }
}

/// A service whose prepares wait so long.
fn waiting_for(max_wait_ms: u32) -> Value {
    json!([{"name": "stock", "max_concurrency": 2, "max_wait_ms": max_wait_ms}])
}

async fn next(consumer: &mut Consumer) -> (String, String) {
    let delivery = tokio::time::timeout(LIMIT, consumer.next()).await.expect("in time");
    let delivery = delivery.expect("a consumer").unwrap();
    let body = String::from_utf8(delivery.data).unwrap();
    (delivery.routing_key.to_string(), body)
}

fn table<const N: usize>(arguments: [(&str, AMQPValue); N]) -> FieldTable {
    let mut table = FieldTable::default();
    for (name, value) in arguments {
        table.insert(name.into(), value);
    }
    table
}

#[expect(clippy::disallowed_methods, reason = "the moment that a record tells of")]
fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    u64::try_from(now.as_millis()).unwrap()
}

/// The remedy that `apply` and `check` name. They named none: after a change of `max_wait_ms` they
/// reported an argument of a queue, and not `--replace`.
fn way_out(service: &str) -> String {
    format!(
        "the queue of `{service}` was made from another max_wait_ms (x-message-ttl) or cap \
         (x-single-active-consumer): give the services.json it was made from, or change it by `dtc \
         topology apply --replace {service}`, which loses nothing"
    )
}

/// A command that has ended.
struct Ended {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

fn run(command: &mut Command) -> Ended {
    let Output { status, stdout, stderr } = command.output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Ended { code: status.code(), stdout: text(stdout), stderr: text(stderr) }
}

impl Ended {
    #[track_caller]
    fn exited(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "{}{}", self.stdout, self.stderr);
        self
    }

    /// Its stdout, after asserting its stderr.
    #[track_caller]
    fn said(self, stderr: &str) -> String {
        assert_eq!(self.stderr, stderr);
        self.stdout
    }
}
