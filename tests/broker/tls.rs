//! Everything over TLS: trusted and untrusted brokers, and client certificates.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail here")]
#![allow(clippy::print_stdout, reason = "a test shows what was said")]

use std::{fs, process::Command, time::Duration};

use dtc::{
    Client, Pem, Tls, Transaction,
    client::{SubmitError, WaitError},
    error::ErrorChain,
    transport::amqp::{
        connection::{Broker as At, ConnectionError},
        error::Disposition,
        tls::TlsError,
    },
};
use serde_json::json;

use crate::{
    broker::{Broker, Place, Secured},
    certificates::{Authority, Pair},
    processes::{LIMIT, Process, World},
};

const CA: &str = "DTC__BROKER__TLS__CA_FILE";
const CERTIFICATE: &str = "DTC__BROKER__TLS__CERTIFICATE_FILE";
const KEY: &str = "DTC__BROKER__TLS__KEY_FILE";

/// The place, reached with TLS at `host`, as `user` if there is one.
fn secured(broker: &Broker, mut place: Place, user: &str, host: &str) -> Place {
    let (_, vhost) = place.url.rsplit_once('/').unwrap();
    place.url = format!("amqps://{user}{host}:{}/{vhost}", broker.secure_port());
    place
}

impl World {
    /// Gives every process the path of a file with this text, by a variable.
    fn telling(&mut self, variable: &'static str, name: &str, text: &str) {
        let path = self.path(name);
        fs::write(&path, text).unwrap();
        self.variables.push((variable, path.to_str().unwrap().to_owned()));
    }
}

/// A worker, a service and a producer, every other command, and a program.
fn everything_works(world: &World) {
    let services = world.file("services.json", &json!([{"name": "a", "max_concurrency": 10}]));
    let transactions = world.file(
        "transactions.json",
        &json!([
            {"id": "TX1", "involved_services": ["a"], "data": {}},
            {"id": "TX2", "involved_services": ["a"], "data": {}},
        ]),
    );
    world.apply_topology(Some(&services));
    let services_text = services.to_str().unwrap();
    let check = ["topology", "check", "--services", services_text];
    Process::start("check", &mut world.dtc(&check)).succeeded(LIMIT);
    let mut worker = world.worker("w1");
    let mut service = world.service(&services, "a", Some(&world.path("state")));
    let results = world.submit(&transactions, &["--wait", "--output", "ndjson"]).succeeded(LIMIT);
    assert_eq!(results.len(), 2, "{results:?}");
    assert!(results.iter().all(|line| line.contains("COMMITTED")), "{results:?}");
    let told = Process::start("status", &mut world.dtc(&["status", "TX1"])).succeeded(LIMIT);
    assert!(told[0].contains("COMMITTED"), "{told:?}");
    let mut run = Command::new(env!("CARGO_BIN_EXE_dtc"));
    run.env_clear().envs(world.variables.iter().map(|(name, value)| (name, value)));
    run.args(["run", "--services", services_text, "--output", "ndjson", "--transactions"]);
    run.arg(&transactions).args(["--broker", &world.place.url]);
    let results = Process::start("run", &mut run).succeeded(LIMIT);
    assert!(results.iter().all(|line| line.contains("COMMITTED")), "{results:?}");
    for process in [&mut worker, &mut service] {
        process.terminate();
        process.exited(0, LIMIT);
    }
    let committed = fs::read_to_string(world.path("state").join("a/committed.log")).unwrap();
    assert_eq!(committed.lines().count(), 2, "{committed}");
}

/// The output and the exit of `dtc topology check`.
#[track_caller]
fn check(world: &World, flags: &[&str]) -> (i32, String) {
    let mut process = Process::start("check", world.dtc(&["topology", "check"]).args(flags));
    let code = process.wait(LIMIT).code().unwrap();
    let said = process.stderr.text();
    println!("{code}: {}", said.trim_end());
    (code, said)
}

/// Asserts that it ends with `code` and this message.
#[track_caller]
fn assert_refused(world: &World, flags: &[&str], code: i32, said: &str) {
    let (ended, saying) = check(world, flags);
    assert!(ended == code && saying.contains(said), "{ended}: {saying}");
}

/// A node whose certificate is for `localhost`.
fn node(signed_by: &Authority, clients_of: Option<&Authority>) -> Broker {
    let own = signed_by.signs("broker", &["localhost"]);
    Broker::start_secured(Secured {
        certificate: &own.certificate,
        key: &own.key,
        clients_of: clients_of.map(Authority::certificate),
    })
}

#[test]
fn a_broker_is_trusted_by_its_ca_and_its_name() {
    let (ours, others) = (Authority::new("ours"), Authority::new("others"));
    let broker = node(&ours, None);
    let place = broker.place();
    let at = |host: &str| World::at(secured(&broker, place.clone(), "guest:guest@", host));

    let mut world = at("localhost");
    let unknown = "its certificate is signed by no CA that is trusted here";
    assert_refused(&world, &[], 77, unknown);
    world.telling(CA, "ca.pem", others.certificate());
    assert_refused(&world, &[], 77, unknown);
    fs::write(world.path("ca.pem"), ours.certificate()).unwrap();
    everything_works(&world);

    let mut elsewhere = at("127.0.0.1");
    elsewhere.telling(CA, "ca.pem", ours.certificate());
    let said = "its certificate is not for `127.0.0.1`, but for `localhost`";
    assert_refused(&elsewhere, &[], 77, said);
    elsewhere.variables.push(("DTC__BROKER__TLS__SERVER_NAME", "localhost".to_owned()));
    assert_eq!(check(&elsewhere, &[]).0, 0);

    let old = ours.signed_long_ago("broker", &["localhost"]);
    broker.certify(&old.certificate, &old.key);
    assert_refused(&world, &[], 77, "its certificate has expired ");
    // A worker that has never worked doesn't wait for another certificate.
    let mut worker = Process::start("worker", &mut world.dtc(&["worker"]));
    worker.exited(77, LIMIT);
    worker.wait_for_line("its certificate has expired ", LIMIT);
    broker.certify(&ours.pair().certificate, &ours.pair().key);
    assert_refused(&world, &[], 77, "it is a CA's own");
}

#[test]
fn a_port_without_tls_is_distinguished_from_one_with_tls() {
    let ours = Authority::new("ours");
    let broker = node(&ours, None);
    let place = broker.place();
    let mut world = World::at(place.clone());
    world.telling(CA, "ca.pem", ours.certificate());
    world.place.url = place.url.replace("amqp://", "amqps://");
    assert_refused(&world, &[], 69, "does not speak TLS");
    let mut world = World::at(secured(&broker, place, "guest:guest@", "localhost"));
    world.place.url = world.place.url.replace("amqps://", "amqp://");
    for _ in 0..5 {
        assert_refused(&world, &[], 77, "requires TLS: its URL must begin with amqps://");
    }
    // A client certificate doesn't help at a broker that doesn't ask for it.
    let client = ours.signs("shop", &[]);
    world.telling(CA, "ca.pem", ours.certificate());
    world.telling(CERTIFICATE, "client.pem", &client.certificate);
    world.telling(KEY, "client-key.pem", &client.key);
    world.place.url = world.place.url.replace("amqp://", "amqps://") + "?auth_mechanism=external";
    assert_refused(&world, &[], 69, "does it offer the mechanism EXTERNAL?");
}

#[test]
fn a_broker_that_asks_for_a_client_certificate_gets_it() {
    let (ours, others) = (Authority::new("ours"), Authority::new("others"));
    let broker = node(&ours, Some(&ours));
    let place = broker.place();
    let at = |user: &str| {
        let mut world = World::at(secured(&broker, place.clone(), user, "localhost"));
        world.telling(CA, "ca.pem", ours.certificate());
        world
    };
    let world = at("guest:guest@");
    // The alert arrives after the end of the client's handshake, so it must be read each time.
    for _ in 0..5 {
        assert_refused(&world, &[], 77, "it requires a client certificate, and none is set");
    }
    let shown = ["--tls-certificate", "client.pem", "--tls-key", "client-key.pem"];
    let show = |world: &World, pair: &Pair| {
        fs::write(world.path("client.pem"), &pair.certificate).unwrap();
        fs::write(world.path("client-key.pem"), &pair.key).unwrap();
    };
    show(&world, &others.signs("shop", &[]));
    assert_refused(&world, &shown, 77, "it does not trust the CA that has signed it");
    show(&world, &ours.signed_long_ago("shop", &[]));
    assert_refused(&world, &shown, 77, "it does not accept our certificate: it has expired");
    // The user is that of the password, whatever the certificate says; nothing is declared yet.
    show(&world, &ours.signs("anyone", &[]));
    assert_eq!(check(&world, &shown).0, 1);

    let mut world = at("");
    world.place.url += "?auth_mechanism=external";
    assert_refused(
        &world,
        &[],
        2,
        "`auth_mechanism=external` requires `broker.tls.certificate_file`",
    );
    show(&world, &ours.signs("nobody", &[]));
    assert_refused(&world, &shown, 77, "refused by the broker");
    let shop = ours.signs("shop", &[]);
    world.telling(CERTIFICATE, "client.pem", &shop.certificate);
    world.telling(KEY, "client-key.pem", &shop.key);
    everything_works(&world);
}

#[tokio::test]
async fn a_program_may_give_its_certificates_as_text() {
    let ours = Authority::new("ours");
    let broker = node(&ours, Some(&ours));
    let place = secured(&broker, broker.place(), "guest:guest@", "localhost");
    let client = ours.signs("shop", &[]);
    let ours_alone = Tls::new().ca(Pem::Text(ours.certificate().to_owned()));
    let certificate = Pem::Text(client.certificate.clone());
    let at = |tls: Tls| At::new(place.url.parse().unwrap(), "program").with_tls(tls);
    let key = Pem::Text(client.key.clone());
    let known = ours_alone.clone().client_certificate(certificate.clone(), key);
    at(known.clone()).connect("test").await.unwrap();
    assert!(!format!("{known:?}").contains("BEGIN"), "a key is shown");

    let error = at(ours_alone.clone()).connect("test").await.unwrap_err();
    assert_eq!(error.disposition(), Disposition::GiveUp);
    assert!(matches!(
        error,
        ConnectionError::Insecure { source: TlsError::CertificateRequired, .. }
    ));
    let key = Pem::File("/nowhere/key.pem".into());
    let keyless = ours_alone.client_certificate(certificate, key);
    let error = at(keyless).connect("test").await.unwrap_err();
    assert_eq!(
        ErrorChain(&error).to_string(),
        format!(
            "no secure connection to the broker at {}: unusable key of the client certificate: \
             `/nowhere/key.pem` can't be read: No such file or directory (os error 2)",
            place.url.replace("guest:guest@", "")
        )
    );
}

#[test]
fn renewed_certificates_are_used_when_a_client_reconnects() {
    let (old, new) = (Authority::new("old"), Authority::new("new"));
    let broker = node(&old, None);
    let mut world = World::at(secured(&broker, broker.place(), "guest:guest@", "localhost"));
    world.telling(CA, "ca.pem", old.certificate());
    world.apply_topology(None);
    let worker = world.worker("w1");
    let renewed = new.signs("broker", &["localhost"]);
    broker.certify(&renewed.certificate, &renewed.key);
    broker.control(&["close_all_connections", "--global", "to see who comes back"]);
    // It has worked before, so it retries.
    worker.wait_for_line("is signed by no CA that is trusted here", LIMIT);
    let so_far = worker.stderr.count();
    fs::write(world.path("ca.pem"), new.certificate()).unwrap();
    worker.stderr.wait_for_from(so_far, "ready", LIMIT).expect("it works again");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_has_worked_survives_temporarily_wrong_certificates() {
    let (old, new) = (Authority::new("old"), Authority::new("new"));
    let broker = node(&old, None);
    let mut world = World::at(secured(&broker, broker.place(), "guest:guest@", "localhost"));
    world.telling(CA, "ca.pem", old.certificate());
    world.apply_topology(None);
    let client = Client::builder(&world.place.url)
        .namespace(&world.place.namespace)
        .tls(Tls::new().ca(Pem::File(world.path("ca.pem"))))
        .publish_timeout(Duration::from_secs(2))
        .connect()
        .await
        .unwrap();
    let transaction = |id: &str| Transaction::new(id, ["a"], json!({}));
    client.submit(transaction("t1")).await.unwrap();

    let renewed = new.signs("broker", &["localhost"]);
    broker.certify(&renewed.certificate, &renewed.key);
    broker.control(&["close_all_connections", "--global", "to see who comes back"]);
    let error = client.submit(transaction("t2")).await.unwrap_err();
    println!("{}", ErrorChain(&error));
    assert!(matches!(error, SubmitError::Unconfirmed { source: Some(_), .. }), "{error:?}");
    let limit = Duration::from_secs(1);
    let error = client.submit_and_wait(transaction("t3"), limit).await.unwrap_err();
    assert!(matches!(error, WaitError::Unanswered { .. }), "{error:?}");

    fs::write(world.path("ca.pem"), new.certificate()).unwrap();
    client.submit(transaction("t4")).await.unwrap();
    client.close().await;
}
