//! The nodes themselves, the base of every other test here.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail here")]

use std::{
    collections::BTreeSet,
    env, fs,
    io::{BufRead, BufReader},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use futures_util::StreamExt;
use lapin::{
    BasicProperties, Channel, Confirmation, Connection, ConnectionProperties, Consumer,
    options::{
        BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions,
        ConfirmSelectOptions, QueueDeclareOptions,
    },
    types::{AMQPValue, FieldTable},
};
use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};

use crate::broker::{self, Broker, until_served};

/// How long something may take that should happen at once.
const LIMIT: Duration = Duration::from_secs(60);
/// With this variable set, a test only starts a node and prints where it is.
const CHILD: &str = "DTC_TEST_NODE_CHILD";

#[test]
#[expect(clippy::disallowed_methods, reason = "how long the node took")]
fn a_node_starts_reports_its_version_and_leaves_nothing_behind() {
    let started = std::time::Instant::now();
    let broker = Broker::start();
    println!("RabbitMQ {} started in {:.1?}", broker.version(), started.elapsed());
    assert!(broker.version().split('.').count() >= 3, "{}", broker.version());
    let directory = broker.directory().to_owned();
    assert!(processes_of(broker.port()).len() >= 2, "the node and its epmd, to be told by this");
    assert!(directory.join("data").exists());

    let port = broker.port();
    let stopping = std::time::Instant::now();
    drop(broker);
    println!("ended in {:.1?}", stopping.elapsed());
    assert_eq!(processes_of(port), BTreeSet::new());
    assert!(!directory.exists());
}

#[test]
fn a_node_dies_with_the_process_that_started_it() {
    dies_with_its_starter("a_node_dies_with_the_process_that_started_it", |child| {
        child.kill().unwrap();
    });
}

/// Ctrl-C at a terminal is sent to every process of the group in the foreground.
#[test]
fn a_node_dies_when_ctrl_c_ends_the_process_that_started_it() {
    dies_with_its_starter("a_node_dies_when_ctrl_c_ends_the_process_that_started_it", |child| {
        let group = Pid::from_raw(i32::try_from(child.id()).unwrap());
        killpg(group, Signal::SIGINT).unwrap();
    });
}

/// Runs the test called `name` again, as a process that starts a node, and ends it by `end`.
fn dies_with_its_starter(name: &str, end: fn(&mut Child)) {
    if env::var_os(CHILD).is_some() {
        let broker = Broker::start();
        println!("\nport {}\ndirectory {}", broker.port(), broker.directory().display());
        std::thread::sleep(LIMIT);
        return;
    }
    let mut child = Command::new(env::current_exe().unwrap())
        .args(["--exact", &format!("node::{name}"), "--nocapture"])
        .env(CHILD, "1")
        .process_group(0)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    let mut told = |word: &str| {
        lines.find_map(|line| line.strip_prefix(word).map(str::to_owned)).expect("it tells")
    };
    let port = told("port ").parse().unwrap();
    let directory = PathBuf::from(told("directory "));
    let processes = processes_of(port);
    assert!(processes.len() >= 2, "{processes:?}");

    end(&mut child);
    child.wait().unwrap();
    for process in processes {
        wait_until_gone(&Path::new("/proc").join(process.to_string()));
    }
    wait_until_gone(&directory);
}

#[tokio::test]
async fn what_was_confirmed_survives_kill_and_restart() {
    let broker = Broker::start();
    let channel = channel(&broker.url()).await;
    for (queue, kind) in [("kept", "quorum"), ("journal", "stream")] {
        declare(&channel, queue, kind).await;
    }
    broker.until_kept(&["kept"]);
    for queue in ["kept", "journal"] {
        publish(&channel, queue, "before").await;
    }
    broker.kill();
    broker.start_again();
    let drained = async |queue, count| {
        let drained = async |_, channel| drain(&channel, queue, count).await;
        until_served(&broker.url(), drained).await
    };
    let served = async |queue| {
        let served = async |_, channel| consume(&channel, queue).await.map(drop);
        until_served(&broker.url(), served).await;
    };
    for queue in ["kept", "journal"] {
        served(queue).await;
        publish(&self::channel(&broker.url()).await, queue, "after").await;
        assert_eq!(drained(queue, 2).await, ["before", "after"]);
    }

    publish(&self::channel(&broker.url()).await, "kept", "kept").await;
    broker.restart();
    assert_eq!(drained("kept", 1).await, ["kept"]);
    assert_eq!(drained("journal", 2).await, ["before", "after"]);
}

#[tokio::test]
async fn two_nodes_are_independent() {
    let (one, other) = (Broker::start(), Broker::start());
    declare(&channel(&one.url()).await, "mine", "classic").await;
    assert!(!has(&other.url(), "mine").await);
    one.kill();
    declare(&channel(&other.url()).await, "yours", "classic").await;
    assert!(has(&other.url(), "yours").await);
}

#[tokio::test]
async fn no_two_tests_get_the_same_port_or_directory() {
    let places = [broker::place(), broker::place()];
    println!("RabbitMQ {}", broker::version());
    let names: Vec<_> = places.iter().map(|place| format!("{}.mine", place.namespace)).collect();
    let first = channel(&places[0].url).await;
    let _leftovers = places[0].leaves(vec![names[0].clone()], vec![]);
    declare(&first, &names[0], "classic").await;
    assert!(has(&places[0].url, &names[0]).await);
    assert!(!has(&places[1].url, &names[1]).await);
    println!("\nqueue {}", names[0]);
}

#[tokio::test]
async fn a_broker_named_by_amqp_url_is_used_and_left_clean() {
    let broker = Broker::start();
    let output = Command::new(env::current_exe().unwrap())
        .args(["--exact", "node::no_two_tests_get_the_same_port_or_directory", "--nocapture"])
        .env("AMQP_URL", broker.url())
        .output()
        .unwrap();
    let printed = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{printed}");
    let queue = printed.lines().find_map(|line| line.strip_prefix("queue ")).expect("it tells");
    assert!(queue.starts_with("dtc-test-"), "{queue}");
    assert!(!printed.contains("left at the broker"), "{printed}");
    assert!(!has(&broker.url(), queue).await);
}

async fn channel(url: &str) -> Channel {
    let connection = Connection::connect(url, ConnectionProperties::default()).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
    channel
}

async fn declare(channel: &Channel, queue: &str, kind: &str) {
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), AMQPValue::LongString(kind.into()));
    let options = QueueDeclareOptions { durable: true, ..Default::default() };
    channel.queue_declare(queue.into(), options, arguments).await.unwrap();
}

async fn has(url: &str, queue: &str) -> bool {
    let options = QueueDeclareOptions { passive: true, ..Default::default() };
    channel(url).await.queue_declare(queue.into(), options, FieldTable::default()).await.is_ok()
}

async fn publish(channel: &Channel, queue: &str, body: &str) {
    let properties = BasicProperties::default().with_delivery_mode(2);
    let options = BasicPublishOptions { mandatory: true, ..Default::default() };
    let sent = channel.basic_publish("".into(), queue.into(), options, body.as_bytes(), properties);
    let confirmed = tokio::time::timeout(LIMIT, sent.await.unwrap()).await.unwrap().unwrap();
    assert!(matches!(confirmed, Confirmation::Ack(None)), "{confirmed:?}");
}

/// The first `count` messages of a stream, once there are as many.
async fn drain(channel: &Channel, queue: &str, count: usize) -> lapin::Result<Vec<String>> {
    let mut consumer = consume(channel, queue).await?;
    let mut bodies = Vec::new();
    while bodies.len() < count {
        let delivery = tokio::time::timeout(LIMIT, consumer.next()).await;
        let delivery = delivery.expect("in time").expect("a message")?;
        bodies.push(String::from_utf8(delivery.data).unwrap());
        let multiple = bodies.len() == count;
        if multiple {
            channel.basic_ack(delivery.delivery_tag, BasicAckOptions { multiple }).await?;
        }
    }
    channel.close(200, "done".into()).await?;
    Ok(bodies)
}

/// Consumes a stream from its start.
async fn consume(channel: &Channel, queue: &str) -> lapin::Result<Consumer> {
    channel.basic_qos(100, BasicQosOptions::default()).await?;
    let mut arguments = FieldTable::default();
    if queue == "journal" {
        arguments.insert("x-stream-offset".into(), AMQPValue::LongString("first".into()));
    }
    let options = BasicConsumeOptions::default();
    let tag = format!("drain-{queue}");
    channel.basic_consume(queue.into(), tag.as_str().into(), options, arguments).await
}

/// The processes that were started for the node on this port.
fn processes_of(port: u16) -> BTreeSet<u32> {
    let node = format!("RABBITMQ_NODE_PORT={port}");
    let id = |entry: fs::DirEntry| entry.file_name().to_str()?.parse::<u32>().ok();
    let all = fs::read_dir("/proc").unwrap().filter_map(|entry| id(entry.ok()?));
    let is_one = |id: &u32| {
        let environment = fs::read(format!("/proc/{id}/environ")).unwrap_or_default();
        environment.split(|byte| *byte == 0).any(|variable| variable == node.as_bytes())
    };
    all.filter(is_one).collect()
}

/// There is no notification when another process or directory goes, so this polls.
fn wait_until_gone(path: &Path) {
    for _ in 0..600 {
        if !path.exists() || is_zombie(path) {
            return;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    panic!("{} is still there", path.display());
}

fn is_zombie(process: &Path) -> bool {
    fs::read_to_string(process.join("status")).is_ok_and(|status| status.contains("State:\tZ"))
}
