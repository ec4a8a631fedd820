//! Commands while the broker has an alarm, or answers nothing: each ends in time and gives the
//! reason.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail here")]
#![allow(clippy::disallowed_methods, reason = "how long a command took")]

use std::{
    collections::BTreeSet,
    io::{Read, Write},
    net::{Ipv4Addr, TcpListener, TcpStream},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{self, Receiver},
    },
    thread,
    time::{Duration, Instant},
};

use serde_json::json;

use crate::{
    broker::{Broker, Place},
    processes::{LIMIT, Process, World},
    proxy::{Action, Frames, Proxy, Scope},
};

/// The message about an alarm.
const SAID: &str = "the broker takes no messages: low on memory";

/// How long a command that is bounded by 5 s may take on a busy machine.
const SOON: Duration = Duration::from_secs(25);

fn services(world: &World) -> PathBuf {
    world.file("services.json", &json!([{"name": "stock", "max_concurrency": 5}]))
}

fn transactions(world: &World) -> PathBuf {
    let content = json!([{"id": "t", "involved_services": ["stock"], "data": {}}]);
    world.file("transactions.json", &content)
}

/// The node's memory alarm.
fn alarm(broker: &Broker, is_set: bool) {
    let share = if is_set { "0.00001" } else { "0.6" };
    broker.control(&["set_vm_memory_high_watermark", share]);
    let alarms = || broker.control(&["eval", "rabbit_alarm:get_alarms()."]);
    let began = Instant::now();
    while alarms().contains("memory") != is_set {
        assert!(began.elapsed() < LIMIT, "{}", alarms());
    }
}

/// Waits until something is declared.
fn until_declared(broker: &Broker, place: &Place) {
    let began = Instant::now();
    while queues(broker, place).is_empty() {
        assert!(began.elapsed() < LIMIT, "nothing is declared");
    }
}

/// All queues and exchanges in this namespace.
fn queues(broker: &Broker, place: &Place) -> BTreeSet<String> {
    let declared = broker.declared_at(place).into_iter();
    declared.filter(|name| !name.starts_with("Timeout")).collect()
}

#[test]
fn an_apply_under_an_alarm_reports_it_in_time_and_continues_when_it_is_over() {
    let broker = Broker::start();
    let world = World::at(broker.place());
    let services = services(&world);
    let apply = |wait: &str| {
        let mut command = world.dtc(&["topology", "apply", "--wait", wait]);
        Process::start("apply", command.arg("--services").arg(&services))
    };
    alarm(&broker, true);

    let began = Instant::now();
    let mut once = apply("0s");
    once.exited(69, SOON);
    println!("said after {:.1?}: {}", began.elapsed(), once.stderr.text());
    assert!(once.stderr.text().contains(SAID), "{}", once.stderr.text());

    let waiting = apply("60s");
    let mut interrupted = apply("60s");
    until_declared(&broker, &world.place);
    interrupted.terminate();
    interrupted.exited(130, Duration::from_secs(5));
    alarm(&broker, false);
    waiting.succeeded(LIMIT);
    Process::start("check", world.dtc(&["topology", "check"]).arg("--services").arg(&services))
        .succeeded(LIMIT);
}

#[test]
fn neither_worker_nor_instance_is_ready_while_the_broker_takes_no_messages() {
    let broker = Broker::start();
    let world = World::at(broker.place());
    let services = services(&world);
    world.apply_topology(Some(&services));
    let (worker, instance) = (world.path("worker.ready"), world.path("instance.ready"));
    let mut command = world.dtc(&["worker", "--name", "w1"]);
    let _w1 = Process::start("w1", command.arg("--ready-file").arg(&worker));
    let mut command = world.dtc(&["service", "--name", "stock"]);
    command.arg("--services").arg(&services).arg("--state").arg(world.path("state"));
    let _stock = Process::start("stock", command.arg("--ready-file").arg(&instance));
    let until_ready_is = |wanted: bool| {
        let began = Instant::now();
        while [&worker, &instance].iter().any(|file| file.exists() != wanted) {
            assert!(
                began.elapsed() < LIMIT,
                "ready files: {}, {}",
                worker.exists(),
                instance.exists()
            );
            thread::yield_now();
        }
    };
    until_ready_is(true);
    alarm(&broker, true);
    until_ready_is(false);
    alarm(&broker, false);
    until_ready_is(true);
}

#[test]
fn a_run_under_an_alarm_reports_it_and_leaves_nothing_behind() {
    let broker = Broker::start();
    let mut world = World::at(broker.place());
    let proxy = Proxy::to(&world.place.url);
    world.place.url = proxy.url(&world.place.url);
    let (services, transactions) = (services(&world), transactions(&world));
    let run = || {
        let mut command = world.dtc_at_broker(&["run"]);
        command.arg("--services").arg(&services).arg("--transactions").arg(&transactions);
        Process::start("run", &mut command)
    };
    alarm(&broker, true);

    let mut alone = run();
    alone.exited(69, SOON);
    assert!(alone.stderr.text().contains(SAID), "{}", alone.stderr.text());
    assert_eq!(queues(&broker, &world.place), BTreeSet::new());

    let published = proxy.rule(Frames::publishes(), Scope::All, Action::Count);
    let mut interrupted = run();
    // The broker reports the alarm only to a connection that publishes: by then the topology is
    // declared.
    published.wait_for(1);
    interrupted.terminate();
    let began = Instant::now();
    interrupted.exited(130, SOON);
    println!("ended {:.1?} after the signal: {}", began.elapsed(), interrupted.stderr.text());
    assert_eq!(queues(&broker, &world.place), BTreeSet::new());

    let mut bench = Process::start("bench", &mut world.dtc_at_broker(&["bench"]));
    bench.exited(1, SOON);
    assert!(bench.stderr.text().contains(SAID), "{}", bench.stderr.text());
    assert_eq!(queues(&broker, &world.place), BTreeSet::new());
}

#[test]
fn a_submit_under_an_alarm_names_it_when_it_times_out() {
    let broker = Broker::start();
    let world = World::at(broker.place());
    let (services, transactions) = (services(&world), transactions(&world));
    world.apply_topology(Some(&services));
    alarm(&broker, true);
    for flags in [&["--wait", "--timeout", "3s"][..], &["--timeout", "3s"]] {
        let mut submit = world.submit(&transactions, flags);
        submit.exited(1, SOON);
        let said = submit.stderr.text();
        assert!(said.contains("1 of 1 not ") && said.trim_end().ends_with(SAID), "{said}");
    }
}

// ---- A broker that answers nothing -----------------------------------------------------------

/// A proxy to the broker that, once it is shut, returns nothing on connections that already have a
/// channel.
struct SilencingProxy {
    place: Place,
    is_shut: Arc<AtomicBool>,
    /// A message for each answer that was swallowed.
    swallowed: Receiver<()>,
}

impl SilencingProxy {
    fn before(broker: &Broker) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let (to, is_shut) = (broker.port(), Arc::new(AtomicBool::new(false)));
        let shut = Arc::clone(&is_shut);
        let (swallowing, swallowed) = mpsc::channel();
        thread::spawn(move || {
            for client in listener.incoming() {
                let (mut client, shut) = (client.unwrap(), Arc::clone(&shut));
                let swallowing = swallowing.clone();
                let mut server = TcpStream::connect((Ipv4Addr::LOCALHOST, to)).unwrap();
                let (mut back, mut forth) =
                    (server.try_clone().unwrap(), client.try_clone().unwrap());
                thread::spawn(move || std::io::copy(&mut client, &mut server));
                thread::spawn(move || {
                    let mut bytes = [0; 4096];
                    while let Ok(n) = back.read(&mut bytes) {
                        // `channel.open-ok`: requests on a channel get no answer.
                        let opened = [0, 20, 0, 11];
                        if n == 0 {
                            break;
                        }
                        if shut.load(Ordering::Relaxed) && holds(&bytes[..n], &opened) {
                            let _ = swallowing.send(());
                            break;
                        }
                        if forth.write_all(&bytes[..n]).is_err() {
                            return;
                        }
                    }
                    // The connection stays open, and returns nothing.
                    while back.read(&mut bytes).is_ok_and(|n| n > 0) {}
                });
            }
        });
        let mut place = broker.place();
        place.url = place.url.replace(&broker.port().to_string(), &port.to_string());
        Self { place, is_shut, swallowed }
    }

    fn shut(&self) {
        self.is_shut.store(true, Ordering::Relaxed);
    }
}

fn holds(bytes: &[u8], pattern: &[u8]) -> bool {
    bytes.windows(pattern.len()).any(|window| window == pattern)
}

#[test]
fn every_command_gives_up_a_broker_that_answers_nothing() {
    let broker = Broker::start();
    let hole = SilencingProxy::before(&broker);
    let world = World::at(hole.place.clone());
    let services = services(&world);
    world.apply_topology(Some(&services));
    hole.shut();
    let services = services.to_str().unwrap();
    for words in [
        &["topology", "check", "--services", services][..],
        &["topology", "apply", "--services", services],
        &["topology", "delete", "--yes", "--services", services],
        &["status", "t"],
    ] {
        let began = Instant::now();
        let mut command = Process::start(words[0], &mut world.dtc(words));
        command.exited(69, Duration::from_secs(45));
        let said = command.stderr.text();
        println!("{words:?} after {:.1?}: {said}", began.elapsed());
        assert!(said.contains("the broker did not answer within 5 s"), "{said}");
    }

    hole.swallowed.try_iter().for_each(drop);
    let mut check =
        Process::start("check", &mut world.dtc(&["topology", "check", "--services", services]));
    hole.swallowed.recv_timeout(Duration::from_secs(10)).unwrap();
    // It is waiting for an answer: a signal ends it all the same.
    check.terminate();
    check.exited(130, Duration::from_secs(5));
}
