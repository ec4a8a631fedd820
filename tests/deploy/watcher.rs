//! `deploy/watch-streams.sh`, beside a node with fake tools: they print the content of a file, and
//! record how they were called. `tests/cluster` shows the real ones: each of its nodes has a
//! watcher.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    process::{Command, Output},
};

use tempfile::TempDir;

use crate::{
    processes::{LIMIT, Process},
    repository, until,
};

/// A fake `rabbitmqctl`: it answers a look.
const CTL: &str = r#"#!/bin/sh
echo "look" >>"$SAYS/calls"
if [ -e "$SAYS/hangs" ]; then exec sleep 1000; fi
cat "$SAYS/looks"
"#;

const STREAMS: &str = r#"#!/bin/sh
echo "$*" >>"$SAYS/calls"
echo looked 0 >"$SAYS/looks"
"#;

/// The fake tools of a node, and their files.
struct Node {
    directory: TempDir,
}

impl Node {
    /// A node whose looks return this.
    fn that_says(looks: &str) -> Self {
        let node = Self { directory: tempfile::tempdir().unwrap() };
        node.tool("rabbitmq-streams", STREAMS);
        node.tool("rabbitmqctl", CTL);
        node.says(looks);
        node
    }

    fn tool(&self, name: &str, script: &str) {
        let path = self.directory.path().join(name);
        fs::write(&path, script).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn says(&self, looks: &str) {
        // A reader never sees a partly written file.
        let path = self.directory.path().join("looks");
        fs::write(path.with_extension("new"), looks).unwrap();
        fs::rename(path.with_extension("new"), path).unwrap();
    }

    fn calls(&self) -> Vec<String> {
        let calls = fs::read_to_string(self.directory.path().join("calls")).unwrap_or_default();
        calls.lines().map(str::to_owned).collect()
    }

    fn looks(&self) -> usize {
        self.calls().iter().filter(|call| *call == "look").count()
    }

    fn restarts(&self) -> Vec<String> {
        self.calls().into_iter().filter(|call| call.contains("restart_stream")).collect()
    }

    fn watcher(&self, words: &[&str]) -> Command {
        let mut command = Command::new("sh");
        command.arg(repository().join("deploy/watch-streams.sh")).args(words);
        let tools = self.directory.path().display();
        command.env("PATH", format!("{tools}:/usr/sbin:/usr/bin:/sbin:/bin"));
        command.env("SAYS", self.directory.path());
        command
    }

    fn watches(&self, words: &[&str]) -> Process {
        Process::start("watcher", &mut self.watcher(words))
    }

    /// The exit code, and the output.
    fn looks_once(&self, words: &[&str]) -> (Option<i32>, String) {
        let Output { status, stdout, stderr } =
            self.watcher(&[&["--once"], words].concat()).output().unwrap();
        (status.code(), String::from_utf8([stdout, stderr].concat()).unwrap())
    }
}

#[test]
fn a_stream_whose_replicas_the_broker_left_down_is_restarted_once() {
    let node =
        Node::that_says("down dtc.journal rabbit@n2\ndown dtc.journal rabbit@n3\nlooked 0\n");
    let watcher = node.watches(&["--every", "1", "--vhost", "orders"]);
    let line = watcher.wait_for_line("it is restarted", LIMIT);
    let told = "WARN dtc.journal has no running replica at rabbit@n2 rabbit@n3, though the node runs: \
                it is restarted";
    assert!(line.ends_with(told), "{line}");
    watcher.wait_for_line("INFO all replicas run again", LIMIT);
    let restart = "--quiet restart_stream --vhost orders dtc.journal";
    assert_eq!(node.restarts(), [restart.to_owned()]);
}

#[test]
fn a_replica_that_recovers_by_itself_causes_no_restart() {
    let node = Node::that_says("down dtc.journal rabbit@n2\nlooked 1\n");
    let _watcher = node.watches(&["--every", "1"]);
    // The first node's watcher would restart it by now; the second's waits one look more.
    until("two looks", || node.looks() == 2);
    node.says("looked 1\n");
    until("more looks", || node.looks() >= 5);
    assert_eq!(node.restarts(), Vec::<String>::new());
}

#[test]
fn a_replica_that_stays_down_causes_another_restart_only_after_a_pause() {
    let node = Node::that_says("down dtc.journal rabbit@n2\nlooked 0\n");
    node.tool(
        "rabbitmq-streams",
        "#!/bin/sh\necho \"$*\" >>\"$SAYS/calls\"\necho 'Error: no'\nexit 1\n",
    );
    let watcher = node.watches(&["--every", "1", "dtc.journal"]);
    watcher.wait_for_line("ERROR dtc.journal can't be restarted: Error: no", LIMIT);
    until("more looks", || node.looks() >= 4);
    assert_eq!(node.restarts().len(), 1, "{:?}", node.calls());
}

#[test]
fn a_node_that_does_not_answer_is_asked_again_and_logged_once() {
    let node = Node::that_says("Error: unable to perform an operation on node\n");
    let watcher = node.watches(&["--every", "1"]);
    watcher.wait_for_line("it is asked again: Error: unable to perform an operation", LIMIT);
    until("more looks", || node.looks() >= 3);
    node.says("down dtc.audit rabbit@n1\nlooked 0\n");
    watcher.wait_for_line("WARN dtc.audit has no running replica at rabbit@n1", LIMIT);
    let told = watcher.stderr.all().iter().filter(|line| line.contains("asked again")).count();
    assert_eq!(told, 1);
}

/// On such a release the watcher found no replica that was down, and said nothing.
#[test]
fn a_release_that_lacks_what_is_asked_is_logged_once_and_the_others_are_watched() {
    let lacks = "lacks rabbit@n2 rabbit_stream_coordinator:local_pid/1\n".repeat(4);
    let node = Node::that_says(&format!("{lacks}down dtc.journal rabbit@n3\nlooked 0\n"));
    let watcher = node.watches(&["--every", "1"]);
    let line = watcher.wait_for_line("has no rabbit_stream_coordinator:local_pid/1", LIMIT);
    let meaning = "RabbitMQ at rabbit@n2 has no rabbit_stream_coordinator:local_pid/1: a replica that \
                   is down there is not found, and its stream is not restarted; use a watcher that is \
                   tested with this release, and until then look at `rabbitmq-streams stream_status \
                   STREAM`";
    assert!(line.ends_with(meaning), "{line}");
    watcher.wait_for_line("WARN dtc.journal has no running replica at rabbit@n3", LIMIT);
    // The restart has also updated the node.
    watcher.wait_for_line("INFO RabbitMQ has every function that is asked for now", LIMIT);
    let told = watcher.stderr.all().iter().filter(|line| line.contains("local_pid")).count();
    assert_eq!(told, 1);
}

#[test]
fn a_node_that_lacks_what_is_asked_is_asked_again_and_logged_once() {
    let node = Node::that_says("lacks rabbit@n1 rabbit_nodes:list_running/0\n");
    let watcher = node.watches(&["--every", "1"]);
    let line = watcher.wait_for_line("has no rabbit_nodes:list_running/0", LIMIT);
    assert!(
        line.contains("no replica that is down is found, and no stream is restarted"),
        "{line}"
    );
    until("more looks", || node.looks() >= 3);
    node.says("looked 0\n");
    watcher.wait_for_line("INFO RabbitMQ has every function that is asked for now", LIMIT);
    let told = watcher.stderr.all().iter().filter(|line| line.contains("WARN")).count();
    assert_eq!(told, 1, "{:?}", watcher.stderr.all());
}

/// A shell that waits for a command handles no signal until that has ended.
#[test]
fn a_watcher_that_waits_for_its_node_stops_on_a_signal() {
    let node = Node::that_says("looked 0\n");
    fs::write(node.directory.path().join("hangs"), "").unwrap();
    let mut watcher = node.watches(&[]);
    until("a look", || !node.calls().is_empty());
    watcher.terminate();
    watcher.exited(143, LIMIT);
}

#[test]
fn once_prints_the_replicas_that_are_down() {
    let node = Node::that_says("down dtc.journal rabbit@n2\nlooked 0\n");
    assert_eq!(node.looks_once(&[]), (Some(1), "dtc.journal rabbit@n2\n".to_owned()));
    node.says("looked 0\n");
    assert_eq!(node.looks_once(&[]), (Some(0), String::new()));
    node.says("Error: no such node\n");
    let told = "watch-streams.sh: the node doesn't tell which replicas run: Error: no such node\n";
    assert_eq!(node.looks_once(&[]), (Some(69), told.to_owned()));
}

#[test]
fn once_does_not_call_replicas_running_that_it_can_not_ask_for() {
    for looks in ["lacks rabbit@n2 m:f/1\nlooked 0\n", "lacks rabbit@n1 m:f/1\n"] {
        let (code, printed) = Node::that_says(looks).looks_once(&[]);
        assert_eq!(code, Some(69), "{looks}");
        assert!(printed.starts_with("watch-streams.sh: RabbitMQ at rabbit@n"), "{printed}");
        assert!(printed.contains("has no m:f/1"), "{printed}");
    }
    let node = Node::that_says("lacks rabbit@n2 m:f/1\ndown dtc.audit rabbit@n3\nlooked 0\n");
    let (code, printed) = node.looks_once(&[]);
    assert_eq!(code, Some(1));
    assert!(printed.contains("dtc.audit rabbit@n3\n"), "{printed}");
}

#[test]
fn a_watcher_refuses_unknown_arguments() {
    let node = Node::that_says("looked 0\n");
    let refused: [&[&str]; 7] = [
        &["--every", "0"],
        &["--every"],
        &["--every", "soon"],
        &["--vhost"],
        &["--twice"],
        &["a\">>, os:cmd(\"id\")"],
        &["--vhost", "a b"],
    ];
    for words in refused {
        let (code, printed) = node.looks_once(words);
        assert_eq!(code, Some(2), "{words:?}: {printed}");
        assert!(printed.ends_with("see --help\n"), "{printed}");
    }
    assert_eq!(node.calls(), Vec::<String>::new());
}
