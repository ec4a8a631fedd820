//! The deployment, tested without a container engine: tools check docker-compose.yml and the
//! Dockerfile, and the commands of the containers run as processes, in the order and with the
//! environment of docker-compose.yml, on the test's own broker.
//!
//! tests/run installs `docker-compose`, `check-jsonschema` and `hadolint`.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail here")]

#[path = "../support/broker.rs"]
mod broker;
#[path = "../support/lines.rs"]
mod lines;
mod notices;
#[path = "../support/processes.rs"]
mod processes;
mod watcher;

use std::{
    collections::{BTreeMap, BTreeSet},
    env, fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;
use tempfile::TempDir;

use crate::{
    broker::Broker,
    processes::{LIMIT, Process, World},
};

/// How often to check whether something is healthy, as a container engine does.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// The broker's host in the containers; this service is not run here.
const BROKER: &str = "rabbitmq";

/// How many orders must commit before the system is stopped.
const COMMITTED: usize = 20;

#[test]
fn docker_compose_accepts_the_file() {
    // It complains about a variable without value or default.
    assert_eq!(said(compose(&[]).args(["config", "--quiet"])), "");
}

#[test]
fn the_file_matches_the_compose_specification() {
    let mut check = Command::new(tool("check-jsonschema"));
    check.args(["--builtin-schema", "vendor.compose-spec", "docker-compose.yml"]);
    said(&mut check);
}

#[test]
fn hadolint_finds_nothing_in_the_dockerfile() {
    assert_eq!(said(Command::new(tool("hadolint")).arg("deploy/Dockerfile")), "");
}

#[test]
fn the_image_is_built_by_the_compiler_of_the_repository() {
    let toolchain = read("rust-toolchain.toml");
    let channel = toolchain.split("channel = \"").nth(1).unwrap().split('"').next().unwrap();
    assert!(read("deploy/Dockerfile").contains(&format!("FROM rust:{channel}-")), "{channel}");
}

#[test]
fn the_image_runs_as_an_unprivileged_user() {
    let last = read("deploy/Dockerfile").split("\nFROM ").last().unwrap().to_owned();
    let user = last.lines().find_map(|line| line.strip_prefix("USER ")).expect("a user");
    assert!(user.split(':').all(|id| id.parse::<u32>().is_ok_and(|id| id > 0)), "{user}");
}

#[test]
fn the_broker_has_the_requested_release() {
    let image =
        |composed: Composed| composed.services[BROKER]["image"].as_str().unwrap().to_owned();
    assert_eq!(image(Composed::with(&[])), "rabbitmq:4.3-management-alpine");
    assert_eq!(image(Composed::with(&[("RABBITMQ_TAG", "4.2")])), "rabbitmq:4.2");
}

#[test]
fn a_given_password_replaces_the_default_everywhere() {
    let default = said(compose(&[]).arg("config"));
    let given = said(compose(&[("RABBITMQ_PASSWORD", "canary")]).arg("config"));
    let n_default = default.matches("development-only").count();
    assert!(n_default > 1, "{default}");
    assert_eq!(given.matches("canary").count(), n_default, "{given}");
    assert!(!given.contains("development-only"), "{given}");
}

#[test]
fn every_dependency_has_a_health_check_or_ends() {
    let composed = Composed::with(&[]);
    for (name, service) in &composed.services {
        for (other, condition) in dependencies(service) {
            let awaited = &composed.services[&other];
            let can_be = match condition.as_str() {
                "service_healthy" => awaited["healthcheck"]["test"].is_array(),
                "service_completed_successfully" => awaited["restart"] == "no",
                _ => false,
            };
            assert!(can_be, "{name} waits for {other}: {condition}");
        }
    }
    assert_eq!(composed.services.len(), composed.order().len());
}

#[test]
fn every_process_gets_longer_to_stop_than_its_drain() {
    let composed = Composed::with(&[]);
    for (name, service) in composed.services.iter().filter(|(_, it)| it["restart"] != "no") {
        // The drain of worker and service, and the time-out of the producer's orders.
        assert!(grace(service) > Duration::from_secs(25), "{name}");
    }
}

#[test]
fn the_deployed_system_commits_transactions_and_stops_on_request() {
    let broker = Broker::start();
    let composed = Composed::with(&[]);
    let host = Host::with(&composed, &broker);
    let mut running: Vec<(String, Process)> = Vec::new();
    for name in composed.order().into_iter().filter(|name| name != BROKER) {
        let process = Process::start(&name, &mut host.command(&name));
        match &composed.services[&name]["restart"] {
            restart if restart == "no" => drop(process.succeeded(LIMIT)),
            _ => {
                host.wait_until_healthy(&name);
                running.push((name, process));
            }
        }
    }

    let (producer, _) = running.last().unwrap();
    assert_eq!(producer, "producer");
    let (mut committed, mut from) = (BTreeSet::new(), 0);
    while committed.len() < COMMITTED {
        let stdout = &running.last().unwrap().1.stdout;
        let (at, line) = stdout.wait_for_from(from, "\"COMMITTED\"", LIMIT).expect("a result");
        let result: Value = serde_json::from_str(&line).unwrap();
        committed.insert(result["id"].as_str().unwrap().to_owned());
        from = at + 1;
    }

    while let Some((name, mut process)) = running.pop() {
        process.terminate();
        let is_producer = name == "producer";
        // An interrupted process exits with 130, a drained one with 0.
        process.exited(if is_producer { 130 } else { 0 }, grace(&composed.services[&name]));
        assert!(is_producer || !host.is_healthy(&name), "{name} has left its ready file");
    }
    for service in ["inventory", "payments", "shipping"] {
        let kept = host.of("inventory", "/var/lib/dtc").unwrap().join(service);
        let log = fs::read_to_string(kept.join("committed.log")).unwrap();
        let held: BTreeSet<_> =
            log.lines().filter_map(|line| line.split_whitespace().next()).collect();
        assert!(
            committed.iter().all(|id| held.contains(id.as_str())),
            "{service}: {committed:?}\n{log}"
        );
        assert_eq!(fs::read_dir(kept.join("prepared")).unwrap().count(), 0, "{service}");
    }
}

#[test]
fn the_ready_file_exists_as_long_as_a_process_serves() {
    let broker = Broker::start();
    let world = World::at(broker.place());
    let services = repository().join("deploy/services.json");
    world.apply_topology(Some(&services));
    for (name, words) in
        [("worker", vec!["worker"]), ("service", vec!["service", "--name", "payments"])]
    {
        let file = world.path(name);
        fs::write(&file, "of an earlier life").unwrap();
        let mut command = world.dtc(&words);
        command.arg("--ready-file").arg(&file);
        if name == "service" {
            command.arg("--services").arg(&services);
        }
        let mut process = Process::start(name, &mut command);
        process.wait_for_line("ready", LIMIT);
        until("ready", || fs::read_to_string(&file).is_ok_and(|content| content.is_empty()));
        broker.terminate();
        until("not ready without a broker", || !file.exists());
        broker.start_again();
        until("ready again", || file.exists());
        process.terminate();
        process.exited(0, LIMIT);
        assert!(!file.exists(), "{name}");
    }
}

#[test]
fn a_ready_file_that_cannot_exist_is_refused_at_the_start() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dtc"));
    command.args(["worker", "--ready-file", "/nowhere/at/all"]);
    let mut process = Process::start("worker", &mut command);
    process.wait_for_line("--ready-file `/nowhere/at/all`: `/nowhere/at` is no directory", LIMIT);
    process.exited(78, LIMIT);
}

// ---- docker-compose.yml ------------------------------------------------------------------------

/// docker-compose.yml as docker-compose resolves it.
struct Composed {
    services: BTreeMap<String, Value>,
}

impl Composed {
    fn with(variables: &[(&str, &str)]) -> Self {
        let yaml = said(compose(variables).arg("config"));
        let to_json = "import json, sys; from ruamel.yaml import YAML; \
                       json.dump(YAML(typ='safe').load(sys.stdin), sys.stdout)";
        let mut python = Command::new(tool("python3"))
            .args(["-c", to_json])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        python.stdin.take().unwrap().write_all(yaml.as_bytes()).unwrap();
        let output = python.wait_with_output().unwrap();
        let config: Value = serde_json::from_slice(&output.stdout).unwrap();
        Self { services: serde_json::from_value(config["services"].clone()).unwrap() }
    }

    /// The services, each after all its dependencies; those in a circle are left out.
    fn order(&self) -> Vec<String> {
        let mut order: Vec<String> = Vec::new();
        loop {
            let next = self.services.iter().find(|(name, service)| {
                let waits_for = dependencies(service);
                !order.contains(*name) && waits_for.iter().all(|(other, _)| order.contains(other))
            });
            match next {
                Some((name, _)) => order.push(name.clone()),
                None => return order,
            }
        }
    }
}

/// The services that a service depends on, and the required condition.
fn dependencies(service: &Value) -> Vec<(String, String)> {
    let Some(others) = service["depends_on"].as_object() else { return Vec::new() };
    let condition = |it: &Value| it["condition"].as_str().unwrap().to_owned();
    others.iter().map(|(name, it)| (name.clone(), condition(it))).collect()
}

/// How long a service has to stop.
fn grace(service: &Value) -> Duration {
    let text = service["stop_grace_period"].as_str().expect("a time to end");
    // docker-compose prints `60s` as `1m`, or `1m0s`.
    let (minutes, seconds) = text.split_once('m').unwrap_or(("0", text));
    let seconds = seconds.trim_end_matches('s');
    let seconds: u64 = if seconds.is_empty() { 0 } else { seconds.parse().unwrap() };
    Duration::from_secs(minutes.parse::<u64>().unwrap() * 60 + seconds)
}

/// `docker-compose` in an environment of only these variables, without `.env`.
fn compose(variables: &[(&str, &str)]) -> Command {
    let mut command = Command::new("docker-compose");
    command.current_dir(repository()).env_clear().env("PATH", "/usr/bin:/bin");
    command.envs(variables.iter().copied());
    command
}

// ---- Containers, without containers ------------------------------------------------------------

/// Where the containers' paths are on this machine, and the broker for all of them.
struct Host {
    services: BTreeMap<String, Value>,
    mounts: BTreeMap<String, Vec<(String, PathBuf)>>,
    broker: String,
    entrypoint: Vec<String>,
    /// All mounted directories that are not of the repository.
    _directory: TempDir,
}

impl Host {
    /// Also creates the broker's user of the containers.
    fn with(composed: &Composed, broker: &Broker) -> Self {
        let said = &composed.services[BROKER]["environment"];
        let of_broker = |name: &str| said[name].as_str().unwrap().to_owned();
        let user = of_broker("RABBITMQ_DEFAULT_USER");
        broker.control(&["add_user", &user, &of_broker("RABBITMQ_DEFAULT_PASS")]);
        broker.control(&["set_permissions", &user, ".*", ".*", ".*"]);

        let directory = tempfile::Builder::new().prefix("dtc-deploy-").tempdir().unwrap();
        let mounts = composed
            .services
            .iter()
            .map(|(name, service)| (name.clone(), mounts(name, service, directory.path())));
        Self {
            mounts: mounts.collect(),
            services: composed.services.clone(),
            broker: format!("@127.0.0.1:{}", broker.port()),
            entrypoint: entrypoint(),
            _directory: directory,
        }
    }

    /// The location of a container's path, if it is mounted.
    fn of(&self, name: &str, path: &str) -> Option<PathBuf> {
        self.mounts[name].iter().find_map(|(target, source)| {
            let rest = Path::new(path).strip_prefix(target).ok()?;
            Some(source.join(rest))
        })
    }

    /// The container's command, to run here.
    fn command(&self, name: &str) -> Command {
        let service = &self.services[name];
        let own = service.get("entrypoint").filter(|own| !own.is_null());
        let mut words = own.map_or_else(|| self.entrypoint.clone(), strings);
        words.extend(strings(&service["command"]));
        self.run(name, &words)
    }

    fn is_healthy(&self, name: &str) -> bool {
        let Value::Array(_) = &self.services[name]["healthcheck"]["test"] else { return true };
        let test = strings(&self.services[name]["healthcheck"]["test"]);
        assert_eq!(test[0], "CMD", "{name}");
        self.run(name, &test[1..]).status().unwrap().success()
    }

    fn wait_until_healthy(&self, name: &str) {
        until(name, || self.is_healthy(name));
    }

    fn run(&self, name: &str, words: &[String]) -> Command {
        let word = |word: &String| match self.of(name, word) {
            Some(path) => path.into_os_string(),
            None => word.into(),
        };
        let mut command = Command::new(word(&words[0]));
        command.args(words[1..].iter().map(word));
        let binaries = Path::new(env!("CARGO_BIN_EXE_dtc")).parent().unwrap();
        command.env_clear().env("PATH", format!("{}:/usr/bin:/bin", binaries.display()));
        let environment = self.services[name]["environment"].as_object().unwrap();
        command.envs(environment.iter().map(|(key, value)| {
            (key, value.as_str().unwrap().replace(&format!("@{BROKER}:5672"), &self.broker))
        }));
        command
    }
}

/// The mounts: directories of the repository, volumes, or the container's own memory.
fn mounts(name: &str, service: &Value, directory: &Path) -> Vec<(String, PathBuf)> {
    let made = |path: PathBuf| {
        fs::create_dir_all(&path).unwrap();
        path
    };
    let given = |key: &str| service[key].as_array().cloned().unwrap_or_default();
    let volumes = given("volumes").into_iter().map(|volume| {
        // Older releases print the short form, newer ones the long form.
        let (source, target) = match volume.as_str() {
            Some(text) => {
                let mut parts = text.split(':');
                (parts.next().unwrap().to_owned(), parts.next().unwrap().to_owned())
            }
            None => {
                let of = |key: &str| volume[key].as_str().unwrap().to_owned();
                (of("source"), of("target"))
            }
        };
        let is_path = source.starts_with('/');
        let source =
            if is_path { source.into() } else { made(directory.join("volumes").join(source)) };
        (target, source)
    });
    let tmpfs = given("tmpfs").into_iter().map(|target| {
        let target = target.as_str().unwrap().to_owned();
        let source = made(directory.join("tmpfs").join(name).join(target.trim_start_matches('/')));
        (target, source)
    });
    volumes.chain(tmpfs).collect()
}

/// The entrypoint of the image.
fn entrypoint() -> Vec<String> {
    let dockerfile = read("deploy/Dockerfile");
    let words = dockerfile.lines().find_map(|line| line.strip_prefix("ENTRYPOINT ")).unwrap();
    serde_json::from_str(words).unwrap()
}

fn strings(value: &Value) -> Vec<String> {
    serde_json::from_value(value.clone()).unwrap()
}

/// Waits until `holds`, for [`LIMIT`] at most.
#[track_caller]
#[expect(clippy::disallowed_methods, reason = "how long it is waited")]
fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let started = Instant::now();
    while !holds() {
        assert!(started.elapsed() < LIMIT, "{what}: not within {LIMIT:?}");
        thread::sleep(LOOK_EVERY);
    }
}

// ---- The repository and its tools ---------------------------------------------------------------

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    fs::read_to_string(repository().join(path)).unwrap()
}

/// A tool that tests/run has installed.
fn tool(name: &str) -> PathBuf {
    let cache = env::var_os("XDG_CACHE_HOME").filter(|path| !path.is_empty()).map(PathBuf::from);
    let cache = cache.unwrap_or_else(|| PathBuf::from(env::var_os("HOME").unwrap()).join(".cache"));
    let path = cache.join("dtc/deploy-tools/bin").join(name);
    assert!(path.exists(), "there is no {}: tests/run brings it", path.display());
    path
}

/// What a command prints in the repository; it must succeed.
#[track_caller]
fn said(command: &mut Command) -> String {
    let output = command.current_dir(repository()).output();
    let output = output.unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let [stdout, stderr] =
        [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
    assert!(output.status.success(), "{command:?}: {}\n{stdout}{stderr}", output.status);
    stdout + &stderr
}
