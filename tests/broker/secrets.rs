//! A broker's password is nowhere in what commands print, at any level of the log.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail here")]

use std::{fs, path::Path, process::Command};

use serde_json::json;

use crate::{
    broker::Broker,
    processes::{LIMIT, Process, World},
};

/// What must not be seen again. Nothing else is called like this.
const CANARY: &str = "cAnArY-4711";

/// How a command is told the password.
#[derive(Clone, Copy)]
enum Way {
    Url,
    Variable,
    File,
}

/// A system that is told the password in one way.
struct Told<'a> {
    world: &'a World,
    way: Way,
    password: &'a str,
}

impl Told<'_> {
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

    /// The commands that end by themselves, in an order in which they can work.
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
            let told = Told { world: &world, way, password };
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
                // Whether the broker is too busy to answer is not what this is about.
                let code = process.wait(LIMIT).code().unwrap();
                assert!(code == expected || (expected, code) == (0, 69), "it ended with {code}");
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
