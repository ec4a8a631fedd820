//! RabbitMQ for tests: private nodes, and places in a shared one that no two tests share.
//!
//! [`place`] is enough for most tests: an address and a namespace for this test only, on a node
//! that all tests of the target share; the first test that needs it starts it. A test that kills or
//! stops a broker starts its own [`Broker`].
//!
//! A node has free loopback ports, its own epmd, cookie and directory, and an empty environment. It
//! doesn't outlive the test process, in whatever way that ends: a shell (`broker.sh`) holds the
//! other end of a pipe, and kills the node when the pipe closes.
//!
//! * `AMQP_URL`: the shared broker is this one. Tests that stop a broker still start their own.
//! * `DTC_TEST_RABBITMQ`: the root of a file system whose RabbitMQ is run instead of the machine's.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail here")]
#![allow(clippy::print_stdout, reason = "a test tells what it leaves")]
#![allow(dead_code, reason = "each target uses a part of it")]

use std::{
    env, fmt, fs,
    hash::{BuildHasher, RandomState},
    io::{self, Read, Write},
    net::{Ipv4Addr, TcpListener, TcpStream},
    os::unix::{fs::PermissionsExt, process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    sync::{
        Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use lapin::{
    Channel, Connection, ConnectionProperties,
    options::{ConfirmSelectOptions, ExchangeDeleteOptions, QueueDeleteOptions},
};
use tempfile::TempDir;

use crate::lines::Lines;

/// How long a node may take to boot on a busy machine.
const BOOT: Duration = Duration::from_secs(120);
/// How long a node may take to stop.
const STOP: Duration = Duration::from_secs(60);
/// How long to wait before trying again a broker that doesn't serve yet.
const AGAIN_AFTER: Duration = Duration::from_millis(100);
/// How often to start a node on other ports, if others took them in between.
const ATTEMPTS: usize = 3;
/// How many virtual hosts a node has for tests, created while it boots: each adds some 50 ms to
/// that.
const VHOSTS: usize = 24;

const SERVER: &str = "usr/lib/rabbitmq/bin/rabbitmq-server";

/// A place where a test may declare what it likes.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Place {
    /// The broker, with user, password and virtual host.
    pub(crate) url: String,
    /// The first word of the names of this test's exchanges and queues.
    pub(crate) namespace: String,
    /// Whether the broker outlives the tests.
    given: bool,
}

impl Place {
    /// Deletes everything of this at the broker when the returned value is dropped, even by a
    /// failing test.
    ///
    /// A private node is removed with everything in it, so this acts only at a given broker.
    #[must_use]
    pub(crate) fn leaves(&self, queues: Vec<String>, exchanges: Vec<String>) -> Leftovers {
        Leftovers { url: self.given.then(|| self.url.clone()), queues, exchanges }
    }
}

/// What a test declares at a broker that outlives it; see [`Place::leaves`].
pub(crate) struct Leftovers {
    url: Option<String>,
    queues: Vec<String>,
    exchanges: Vec<String>,
}

impl Leftovers {
    async fn remove(&self, url: &str) -> lapin::Result<()> {
        let connection = Connection::connect(url, ConnectionProperties::default()).await?;
        let channel = connection.create_channel().await?;
        for name in &self.queues {
            channel.queue_delete(name.as_str().into(), QueueDeleteOptions::default()).await?;
        }
        for name in &self.exchanges {
            channel.exchange_delete(name.as_str().into(), ExchangeDeleteOptions::default()).await?;
        }
        connection.close(200, "".into()).await
    }
}

impl Drop for Leftovers {
    fn drop(&mut self) {
        let Some(url) = &self.url else { return };
        // The test may be in a runtime, which can't block on another one.
        let removed = thread::scope(|scope| {
            let remove = || {
                let runtime = tokio::runtime::Runtime::new().expect("threads to be had");
                runtime.block_on(self.remove(url)).map_err(|error| error.to_string())
            };
            scope.spawn(remove).join()
        });
        if !matches!(removed, Ok(Ok(()))) {
            println!("something is left at the broker: {:?} {:?}", self.queues, self.exchanges);
        }
    }
}

/// The password must not be in the output of a failing test.
impl fmt::Debug for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Place").field("namespace", &self.namespace).finish_non_exhaustive()
    }
}

/// A new place on the shared broker.
pub(crate) fn place() -> Place {
    match shared() {
        Shared::Private(broker) => broker.place(),
        Shared::Given(url) => Place { url: url.clone(), namespace: namespace(), given: true },
    }
}

/// The shared broker's version.
pub(crate) fn version() -> String {
    match shared() {
        Shared::Private(broker) => broker.version().to_owned(),
        Shared::Given(url) => {
            let after_scheme = url.split_once("://").map_or(url.as_str(), |(_, rest)| rest);
            let authority = after_scheme.split(['/', '?']).next().unwrap();
            let host = authority.rsplit('@').next().unwrap();
            let address = if host.contains(':') { host.to_owned() } else { format!("{host}:5672") };
            greeted(TcpStream::connect(&address)).expect("the broker at AMQP_URL doesn't answer")
        }
    }
}

enum Shared {
    Private(Broker),
    Given(String),
}

fn shared() -> &'static Shared {
    static SHARED: OnceLock<Shared> = OnceLock::new();
    SHARED.get_or_init(|| match env::var("AMQP_URL") {
        Ok(url) if !url.is_empty() => Shared::Given(url),
        _ => Shared::Private(Broker::start()),
    })
}

/// How a node speaks TLS.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Secured<'a> {
    /// Its certificate and key, in PEM.
    pub(crate) certificate: &'a str,
    pub(crate) key: &'a str,
    /// The CAs that it trusts, if it requires a client certificate. A certificate's common name may
    /// then be a user's name; the user `shop` has no password.
    pub(crate) clients_of: Option<&'a str>,
}

/// A RabbitMQ node that belongs to one test.
#[derive(Debug)]
pub(crate) struct Broker {
    /// Declared first to be dropped first: nothing may write into a directory that is removed.
    run: Mutex<Option<Run>>,
    setup: Setup,
    version: String,
    places: AtomicUsize,
}

impl Broker {
    /// Starts a node, and returns when it serves.
    pub(crate) fn start() -> Self {
        Self::start_as(None)
    }

    /// The same for a node that listens with TLS too.
    pub(crate) fn start_secured(secured: Secured<'_>) -> Self {
        Self::start_as(Some(secured))
    }

    fn start_as(secured: Option<Secured<'_>>) -> Self {
        let mut complaint = String::new();
        for _ in 0..ATTEMPTS {
            let setup = Setup::new(secured);
            match Run::start(&setup) {
                Ok((run, version)) => {
                    let run = Mutex::new(Some(run));
                    return Self { run, setup, version, places: AtomicUsize::new(0) };
                }
                Err(printed) => complaint = printed,
            }
        }
        panic!("RabbitMQ doesn't start:\n{complaint}");
    }

    /// The node's own virtual host, `/`.
    pub(crate) fn url(&self) -> String {
        self.url_of("%2f")
    }

    fn url_of(&self, vhost: &str) -> String {
        format!("amqp://guest:guest@127.0.0.1:{}/{vhost}", self.setup.port)
    }

    /// The port for AMQP over TLS, of a node that was started with it.
    pub(crate) fn secure_port(&self) -> u16 {
        self.setup.secure_port
    }

    /// Gives a node with TLS another certificate, from the next connection on.
    pub(crate) fn certify(&self, certificate: &str, key: &str) {
        self.setup.write("server.pem", certificate);
        self.setup.write("server-key.pem", key);
        self.control(&["eval", "ssl:clear_pem_cache()."]);
    }

    /// The port for AMQP.
    pub(crate) fn port(&self) -> u16 {
        self.setup.port
    }

    /// A place that nobody has used yet: a virtual host, or when there are none left, a namespace
    /// in the node's own.
    pub(crate) fn place(&self) -> Place {
        let number = self.places.fetch_add(1, Ordering::Relaxed);
        if number < VHOSTS {
            Place { url: self.url_of(&vhost(number)), namespace: "dtc".to_owned(), given: false }
        } else {
            Place { url: self.url(), namespace: namespace(), given: false }
        }
    }

    /// The version that the node greets with, such as `4.3.6`.
    pub(crate) fn version(&self) -> &str {
        &self.version
    }

    /// Kills the node, as a power cut would, and returns when it is gone.
    pub(crate) fn kill(&self) {
        drop(self.running().take().expect("the node runs"));
    }

    /// Stops the node as an operator does, and returns when it is gone.
    pub(crate) fn terminate(&self) {
        let mut run = self.running().take().expect("the node runs");
        run.say("terminate");
        assert!(run.printed.wait_for_end(STOP), "RabbitMQ doesn't stop:\n{}", run.printed.text());
    }

    /// Starts the node again, with its data and ports; returns when it serves.
    pub(crate) fn start_again(&self) {
        let mut running = self.running();
        assert!(running.is_none(), "the node runs");
        match Run::start(&self.setup) {
            Ok((run, _)) => *running = Some(run),
            Err(printed) => panic!("RabbitMQ doesn't start again:\n{printed}"),
        }
    }

    /// Stops the node as an operator does, and starts it again.
    pub(crate) fn restart(&self) {
        self.terminate();
        self.start_again();
    }

    /// Waits until these quorum queues, and the state of streams, would survive a kill.
    ///
    /// A node finds the content of a quorum queue by a name that it writes to a file half a second
    /// after the last queue was declared, or later on a busy disk. If it is killed before that, it
    /// comes back with the queue but without the confirmed messages.
    pub(crate) fn until_kept(&self, queues: &[&str]) {
        let node = format!("dtc{}@localhost", self.setup.port);
        let data = self.directory().join("data").join(&node);
        let names = || {
            let names = ["quorum", "coordination"].map(|system| {
                fs::read(data.join(system).join(&node).join("names.dets")).unwrap_or_default()
            });
            String::from_utf8_lossy(&names.concat()).into_owned()
        };
        let wanted: Vec<_> = queues.iter().map(|name| format!("_{name}")).collect();
        let wanted = || wanted.iter().map(String::as_str).chain(["rabbit_stream_coordinator"]);
        for _ in 0..BOOT.as_millis() / 10 {
            let names = names();
            if wanted().all(|name| names.contains(name)) {
                return;
            }
            thread::sleep(Duration::from_millis(10));
        }
        panic!("the node does not write down all of {queues:?}: {}", names());
    }

    /// Runs `rabbitmqctl` with these words; returns what it prints.
    pub(crate) fn control(&self, words: &[&str]) -> String {
        let mut command = self.setup.shell();
        let output = command.arg("/usr/lib/rabbitmq/bin/rabbitmqctl").args(words).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "rabbitmqctl {words:?}: {said}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// The queues and exchanges at this place, without those that every place has.
    pub(crate) fn declared_at(&self, place: &Place) -> Vec<String> {
        let (_, vhost) = place.url.rsplit_once('/').unwrap();
        let listed = ["list_queues", "list_exchanges"].map(|list| {
            self.control(&[list, "--vhost", vhost, "--quiet", "--no-table-headers", "name"])
        });
        let names = listed.iter().flat_map(|names| names.lines());
        names.filter(|it| !it.is_empty() && !it.starts_with("amq.")).map(str::to_owned).collect()
    }

    /// The node's data directory.
    pub(crate) fn directory(&self) -> &Path {
        self.setup.directory.path()
    }

    fn running(&self) -> MutexGuard<'_, Option<Run>> {
        self.run.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One run of a node; dropping it kills it.
#[derive(Debug)]
struct Run {
    shell: Child,
    commands: ChildStdin,
    printed: Lines,
}

impl Run {
    /// Starts the node and waits until it serves; returns its version, or what it printed.
    fn start(setup: &Setup) -> Result<(Self, String), String> {
        let run = Self::spawn(setup);
        // It prints this after its last step; it listens some steps earlier.
        if run.printed.wait_for("completed with", BOOT).is_none() {
            return Err(format!("{}\n{}", run.printed.text(), setup.log()));
        }
        match greeted(TcpStream::connect((Ipv4Addr::LOCALHOST, setup.port))) {
            Ok(version) => Ok((run, version)),
            Err(error) => Err(format!("{error}\n{}", run.printed.text())),
        }
    }

    fn spawn(setup: &Setup) -> Self {
        let (reader, writer) = io::pipe().unwrap();
        let mut shell = setup
            .shell()
            .stdin(Stdio::piped())
            .stdout(writer.try_clone().unwrap())
            .stderr(writer)
            .spawn()
            .unwrap();
        let commands = shell.stdin.take().unwrap();
        Self { shell, commands, printed: Lines::of(reader) }
    }

    fn say(&mut self, word: &str) {
        // If the shell has ended, it has ended the node too.
        drop(writeln!(self.commands, "{word}"));
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        self.say("kill");
        self.printed.wait_for_end(STOP);
        drop(self.shell.wait());
    }
}

/// What stays the same over the runs of a node.
#[derive(Debug)]
struct Setup {
    directory: TempDir,
    root: Option<PathBuf>,
    port: u16,
    secure_port: u16,
    dist_port: u16,
    epmd_port: u16,
}

impl Setup {
    fn new(secured: Option<Secured<'_>>) -> Self {
        let root = env::var_os("DTC_TEST_RABBITMQ").filter(|root| !root.is_empty());
        let root = root.map(PathBuf::from);
        let server = root.as_deref().unwrap_or_else(|| Path::new("/")).join(SERVER);
        assert!(server.exists(), "there is no {}: tests/run brings it", server.display());
        let [port, secure_port, dist_port, epmd_port] = free_ports();
        let directory = tempfile::Builder::new().prefix("dtc-rabbitmq-").tempdir().unwrap();
        let setup = Self { directory, root, port, secure_port, dist_port, epmd_port };
        setup.write_files(secured);
        setup
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.directory.path().join(name);
        fs::write(&path, text).unwrap();
        path
    }

    fn write_files(&self, secured: Option<Secured<'_>>) {
        let write = |name: &str, text: &str| self.write(name, text);
        let cookie = write(".erlang.cookie", &random());
        fs::set_permissions(cookie, fs::Permissions::from_mode(0o400)).unwrap();
        let asks_who = secured.is_some_and(|it| it.clients_of.is_some());
        write(
            "enabled_plugins",
            if asks_who { "[rabbitmq_auth_mechanism_ssl].\n" } else { "[].\n" },
        );
        write("advanced.config", "[].\n");
        write("rabbitmq-env.conf", "");
        write("definitions.json", &definitions(asks_who));
        let mut configuration = format!(
            "definitions.import_backend = local_filesystem\n\
             definitions.local.path = {}/definitions.json\n\
             definitions.skip_if_unchanged = true\n\
             disk_free_limit.absolute = 50MB\n",
            self.inside()
        );
        if let Some(secured) = secured {
            configuration += &self.secured(secured);
        }
        write("rabbitmq.conf", &configuration);
    }

    fn secured(&self, secured: Secured<'_>) -> String {
        self.write("server.pem", secured.certificate);
        self.write("server-key.pem", secured.key);
        let (inside, port) = (self.inside(), self.secure_port);
        let mut configuration = format!(
            "listeners.ssl.1 = 127.0.0.1:{port}\n\
             ssl_options.certfile = {inside}/server.pem\n\
             ssl_options.keyfile = {inside}/server-key.pem\n"
        );
        if let Some(authority) = secured.clients_of {
            self.write("clients-ca.pem", authority);
            configuration += &format!(
                "ssl_options.cacertfile = {inside}/clients-ca.pem\n\
                 ssl_options.verify = verify_peer\n\
                 ssl_options.fail_if_no_peer_cert = true\n\
                 ssl_cert_login_from = common_name\n\
                 auth_mechanisms.1 = PLAIN\n\
                 auth_mechanisms.2 = EXTERNAL\n"
            );
        }
        configuration
    }

    /// `broker.sh` for this node.
    fn shell(&self) -> Command {
        let mut command = Command::new("sh");
        command
            .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/broker.sh"))
            .arg(self.directory.path())
            .arg(self.root.as_deref().unwrap_or_else(|| Path::new("")))
            // Ctrl-C must not end it: its task is to end the node.
            .process_group(0)
            .env_clear()
            .envs(self.environment());
        command
    }

    /// The directory, as the node sees it.
    fn inside(&self) -> String {
        match self.root {
            Some(_) => "/mnt".to_owned(),
            None => self.directory.path().display().to_string(),
        }
    }

    fn environment(&self) -> Vec<(&'static str, String)> {
        let inside = |name: &str| format!("{}/{name}", self.inside());
        vec![
            ("PATH", "/usr/sbin:/usr/bin:/sbin:/bin".to_owned()),
            ("LANG", "C.UTF-8".to_owned()),
            ("HOME", self.inside()),
            ("ERL_EPMD_ADDRESS", "127.0.0.1".to_owned()),
            ("ERL_EPMD_PORT", self.epmd_port.to_string()),
            ("RABBITMQ_NODENAME", format!("dtc{}@localhost", self.port)),
            ("RABBITMQ_NODE_IP_ADDRESS", "127.0.0.1".to_owned()),
            ("RABBITMQ_NODE_PORT", self.port.to_string()),
            ("RABBITMQ_DIST_PORT", self.dist_port.to_string()),
            ("RABBITMQ_MNESIA_BASE", inside("data")),
            ("RABBITMQ_LOG_BASE", inside("log")),
            ("RABBITMQ_CONFIG_FILE", inside("rabbitmq.conf")),
            ("RABBITMQ_ADVANCED_CONFIG_FILE", inside("advanced.config")),
            ("RABBITMQ_CONF_ENV_FILE", inside("rabbitmq-env.conf")),
            ("RABBITMQ_ENABLED_PLUGINS_FILE", inside("enabled_plugins")),
            ("RABBITMQ_GENERATED_CONFIG_DIR", inside("generated")),
            ("RABBITMQ_PID_FILE", inside("pid")),
            // Without a shell in between, so that the started process is the node itself.
            ("RUNNING_UNDER_SYSTEMD", "true".to_owned()),
            // It shares the machine with the tests: no busy-waiting, few threads.
            (
                "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS",
                "+sbwt none +sbwtdcpu none +sbwtdio none".to_owned(),
            ),
        ]
    }

    /// The end of the node's log.
    fn log(&self) -> String {
        let path = self.directory.path().join(format!("log/dtc{}@localhost.log", self.port));
        let text = fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        let text = text.unwrap_or_default();
        let lines: Vec<_> = text.lines().collect();
        lines[lines.len().saturating_sub(40)..].join("\n")
    }
}

fn vhost(number: usize) -> String {
    format!("v{number:02}")
}

/// The virtual hosts, and the users: `guest`, with all permissions; and `shop`, if it is wanted,
/// with all permissions and no password.
fn definitions(has_shop: bool) -> String {
    let names = || (0..VHOSTS).map(vhost).chain(["/".to_owned()]);
    let vhosts: Vec<_> = names().map(|name| format!(r#"{{"name":"{name}"}}"#)).collect();
    let users: &[&str] = if has_shop { &["guest", "shop"] } else { &["guest"] };
    let permissions = names().flat_map(|name| {
        users.iter().map(move |user| {
            format!(
                r#"{{"user":"{user}","vhost":"{name}","configure":".*","write":".*","read":".*"}}"#
            )
        })
    });
    let permissions: Vec<_> = permissions.collect();
    // The salt `salt` and the SHA-256 of `saltguest`.
    let guest = r#"{"name":"guest","tags":["administrator"],"limits":{},
        "hashing_algorithm":"rabbit_password_hashing_sha256","password_hash":"c2FsdDRwMuw4kgNZhm0cEYx1m4NAR6BCdplxDdFbnDjbRIKq"}"#;
    let shop = r#",{"name":"shop","tags":[],"limits":{},
        "hashing_algorithm":"rabbit_password_hashing_sha256","password_hash":""}"#;
    let shop = if has_shop { shop } else { "" };
    format!(
        r#"{{"users":[{guest}{shop}],"vhosts":[{}],"permissions":[{}]}}"#,
        vhosts.join(","),
        permissions.join(",")
    )
}

/// Ports that nobody listens on.
///
/// They are below the range that the kernel gives to clients: a client that keeps trying to reach a
/// stopped node would sooner or later get the node's own port, and connect to itself.
fn free_ports() -> [u16; 4] {
    let range = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    let end = range.split_whitespace().next().and_then(|start| start.parse().ok());
    let end: u16 = end.unwrap_or(32768).clamp(10000, 32768);
    let mut held = Vec::new();
    while held.len() < 4 {
        let port = 5000 + u16::try_from(number() % u64::from(end - 5000)).unwrap();
        held.extend(TcpListener::bind((Ipv4Addr::LOCALHOST, port)).ok());
    }
    let port = |listener: &TcpListener| listener.local_addr().unwrap().port();
    [port(&held[0]), port(&held[1]), port(&held[2]), port(&held[3])]
}

/// The version that a broker greets with.
fn greeted(stream: io::Result<TcpStream>) -> io::Result<String> {
    let mut stream = stream?;
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    stream.write_all(b"AMQP\x00\x00\x09\x01")?;
    // Type, channel, and the length of the rest.
    let mut head = [0; 7];
    stream.read_exact(&mut head)?;
    let length = u32::from_be_bytes([head[3], head[4], head[5], head[6]]);
    let mut properties = Vec::new();
    stream.take(u64::from(length)).read_to_end(&mut properties)?;
    // Among the server's properties: a short string, the type of a long one, and its length.
    let key = b"\x07versionS";
    let version = properties.windows(key.len()).position(|window| window == key).and_then(|at| {
        let (length, rest) = properties.get(at + key.len()..)?.split_first_chunk::<4>()?;
        rest.get(..usize::try_from(u32::from_be_bytes(*length)).ok()?)
    });
    let version = version.map(|bytes| String::from_utf8_lossy(bytes).into_owned());
    version.ok_or_else(|| io::Error::other("it greets without a version"))
}

/// Runs `work` on a connection and a channel with confirms, and again on new ones if it fails;
/// returns its last result.
///
/// A node that restarts accepts connections before its streams have writers. A consumer of one in
/// that moment asks the writer of the node's former run, and loses the connection
/// (`INTERNAL_ERROR`, with RabbitMQ 4.3), or gets "not found"; it succeeds if it tries again, as
/// all our clients do.
pub(crate) async fn until_served<T>(
    url: &str,
    work: impl AsyncFn(Connection, Channel) -> lapin::Result<T>,
) -> T {
    let once = async || {
        let connection = Connection::connect(url, ConnectionProperties::default()).await?;
        let channel = connection.create_channel().await?;
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        work(connection, channel).await
    };
    let again_and_again = async {
        loop {
            match once().await {
                Ok(done) => return done,
                Err(error) => println!("the broker does not serve yet: {error}"),
            }
            tokio::time::sleep(AGAIN_AFTER).await;
        }
    };
    let served = tokio::time::timeout(BOOT, again_and_again).await;
    served.unwrap_or_else(|_| panic!("the broker does not serve within {BOOT:?}"))
}

/// A namespace that nobody has used yet.
fn namespace() -> String {
    format!("dtc-test-{}", random())
}

fn number() -> u64 {
    RandomState::new().hash_one(())
}

fn random() -> String {
    format!("{:016x}", number())
}
