//! No command prints the broker's password or the key of a certificate, at any log level.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail here")]

use std::{fs, path::Path, process::Command};

use serde_json::json;

use crate::{
    broker::{Broker, Secured},
    certificates::Authority,
    processes::{LIMIT, Process, World},
};

/// The secret, which must not appear anywhere. Nothing else has this name.
const CANARY: &str = "cAnArY-4711";

/// How a command gets the password.
#[derive(Clone, Copy)]
enum Way {
    Url,
    Variable,
    File,
}

/// A system that gets the password in one way.
struct SecretSystem<'a> {
    world: &'a World,
    way: Way,
    password: &'a str,
}

impl SecretSystem<'_> {
    fn dtc(&self, words: &[&str]) -> Command {
        let mut command = self.world.dtc(words);
        self.tell(&mut command);
        command
    }

    fn tell(&self, command: &mut Command) {
        command.env("DTC_LOG", "trace");
        match self.way {
            Way::Url => {}
            Way::Variable => {
                command.env("DTC__BROKER__PASSWORD", self.password);
            }
            Way::File => {
                command.env("DTC__BROKER__PASSWORD_FILE", self.world.path("password"));
            }
        }
    }

    /// The commands that end by themselves, in an order in which they work.
    fn brief(&self, services: &Path, transactions: &Path) -> Vec<Command> {
        let (services, transactions) = (services.to_str().unwrap(), transactions.to_str().unwrap());
        // In a namespace of its own: it brings its own services.
        let mut run = Command::new(env!("CARGO_BIN_EXE_dtc"));
        run.env_clear().args(["run", "--services", services, "--transactions", transactions]);
        run.args(["--broker", &self.world.place.url]);
        self.tell(&mut run);
        vec![
            self.dtc(&["topology", "check", "--services", services]),
            self.dtc(&["submit", "--wait", transactions]),
            self.dtc(&["status", "TX1"]),
            run,
        ]
    }
}

fn assert_unseen(process: &Process) {
    let printed = process.stdout.text() + &process.stderr.text();
    assert!(!printed.contains(CANARY), "it printed the password");
}

#[test]
fn no_command_prints_the_password_whether_it_is_right_or_wrong() {
    let broker = Broker::start();
    broker.control(&["change_password", "guest", CANARY]);
    let wrong = format!("{CANARY}-wrong");
    for way in [Way::Url, Way::Variable, Way::File] {
        let mut place = broker.place();
        let without = place.url.clone();
        for password in [CANARY, &wrong] {
            let user = match way {
                Way::Url => format!("guest:{password}@"),
                Way::Variable | Way::File => "guest@".to_owned(),
            };
            place.url = without.replace("guest:guest@", &user);
            let world = World::at(place.clone());
            fs::write(world.path("password"), password).unwrap();
            let told = SecretSystem { world: &world, way, password };
            let services =
                world.file("services.json", &json!([{"name": "a", "max_concurrency": 1}]));
            let transactions = world.file(
                "transactions.json",
                &json!([{"id": "TX1", "involved_services": ["a"], "data": {}}]),
            );
            let services_text = services.to_str().unwrap();
            let start = |words: &[&str]| Process::start(words[0], &mut told.dtc(words));
            let apply = ["topology", "apply", "--services", services_text];
            let serve = ["service", "--services", services_text, "--name", "a"];

            let mut config = start(&["config"]);
            config.exited(0, LIMIT);
            assert!(config.stdout.text().contains("***"));
            assert_unseen(&config);

            let expected = if password == CANARY { 0 } else { 77 };
            let mut applied = start(&apply);
            applied.exited(expected, LIMIT);
            assert_unseen(&applied);
            let (mut worker, mut service) = (start(&["worker"]), start(&serve));
            if expected == 0 {
                worker.wait_for_line("ready", LIMIT);
                service.wait_for_line("ready", LIMIT);
            }
            for mut command in told.brief(&services, &transactions) {
                let mut process = Process::start("command", &mut command);
                process.exited(expected, LIMIT);
                assert_unseen(&process);
            }
            for process in [&mut worker, &mut service] {
                if expected == 0 {
                    process.terminate();
                }
                process.exited(expected, LIMIT);
                assert_unseen(process);
            }
        }
    }
}

/// Whether any line of a PEM key is shown.
fn shows(printed: &str, key: &str) -> bool {
    key.lines().filter(|line| !line.starts_with("-----")).any(|line| printed.contains(line))
}

#[test]
fn no_command_prints_the_key_of_its_certificate_whether_it_is_right_or_wrong() {
    let (ours, others) = (Authority::new("ours"), Authority::new("others"));
    let own = ours.signs("broker", &["localhost"]);
    let broker = Broker::start_secured(Secured {
        certificate: &own.certificate,
        key: &own.key,
        clients_of: Some(ours.certificate()),
    });
    let mut place = broker.place();
    let (_, vhost) = place.url.rsplit_once('/').unwrap();
    let port = broker.secure_port();
    place.url = format!("amqps://localhost:{port}/{vhost}?auth_mechanism=external");
    let mut world = World::at(place);
    let services = world.file("services.json", &json!([{"name": "a", "max_concurrency": 1}]));
    let services = services.to_str().unwrap();
    let transactions = world
        .file("transactions.json", &json!([{"id": "TX1", "involved_services": ["a"], "data": {}}]));
    let transactions = transactions.to_str().unwrap();
    fs::write(world.path("ca.pem"), ours.certificate()).unwrap();
    let (known, foreign) = (ours.signs("shop", &[]), others.signs("shop", &[]));
    let (key_file, content) = ("key.pem".to_owned(), known.key.clone());
    let cases = [
        (&known, &known, key_file.clone(), 0),
        // Another certificate's key, and the right one.
        (&known, &foreign, key_file.clone(), 78),
        (&known, &known, content, 78),
        // The broker doesn't know its CA.
        (&foreign, &foreign, key_file, 77),
    ];
    for (shown, of, key_file, expected) in cases {
        let key = &of.key;
        fs::write(world.path("client.pem"), &shown.certificate).unwrap();
        fs::write(world.path("key.pem"), key).unwrap();
        world.variables = vec![
            ("DTC_LOG", "trace".to_owned()),
            ("DTC__BROKER__TLS__CA_FILE", "ca.pem".to_owned()),
            ("DTC__BROKER__TLS__CERTIFICATE_FILE", "client.pem".to_owned()),
            ("DTC__BROKER__TLS__KEY_FILE", key_file),
        ];
        let start = |words: &[&str]| Process::start(words[0], &mut world.dtc(words));
        let ended = |process: &mut Process, code: i32| {
            process.exited(code, LIMIT);
            let printed = process.stdout.text() + &process.stderr.text();
            assert!(!shows(&printed, key), "it printed the key");
        };
        ended(&mut start(&["config"]), if expected == 78 { 78 } else { 0 });
        ended(&mut start(&["topology", "apply", "--services", services]), expected);
        let worker = start(&["worker"]);
        let service = start(&["service", "--services", services, "--name", "a"]);
        if expected == 0 {
            worker.wait_for_line("ready", LIMIT);
            service.wait_for_line("ready", LIMIT);
        }
        ended(&mut start(&["submit", "--wait", transactions]), expected);
        ended(&mut start(&["status", "TX1"]), expected);
        for mut process in [worker, service] {
            if expected == 0 {
                process.terminate();
            }
            ended(&mut process, expected);
        }
    }
}
