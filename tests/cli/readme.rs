//! The commands on every page of the documentation print what the page says.
//!
//! A command is in a fenced block of kind `console`, on a line of its own after `$ `, and its
//! output on stdout follows, up to the next command or the end of the block. It continues after a
//! line that ends in `\`. A line that is `…` stands for any lines. Output on stderr, with its
//! timings, is not part of such a block; a page shows it in a block of kind `text`.
//!
//! Commands begin with `cargo run --release -- `, or `dtc `; they are run, by a shell, in the
//! repository, with the binary that was built for the tests.

use crate::{
    pages::{blocks, pages},
    world::{output, repository},
};
use std::{env, path::Path, process::Command};

const CARGO_RUN: &str = "cargo run --release -- ";
const DTC: &str = "dtc ";

#[derive(Debug, Default, PartialEq, Eq)]
struct Example {
    command: String,
    printed: Vec<String>,
}

#[test]
fn the_commands_of_every_page_print_what_it_says() {
    let examples: Vec<_> = pages()
        .into_iter()
        .flat_map(|page| examples(&page.text).into_iter().map(move |it| (page.path.clone(), it)))
        .collect();
    let first = examples.first().map(|(path, example)| (path.as_str(), example.command.as_str()));
    let wanted = format!("{CARGO_RUN}run --services deploy/examples/");
    assert!(
        first.is_some_and(|(path, first)| path == "README.md" && first.starts_with(&wanted)),
        "the first command of README.md in a block ```console must be `$ {wanted}…`, and is {first:?}"
    );
    for (path, example) in examples {
        let command = runnable(&example.command);
        let command = command.unwrap_or_else(|| panic!("{path}: `{}` is not run", example.command));
        let ended = output(&mut shell(&command)).exited(0);
        let printed: Vec<_> = ended.stdout.lines().collect();
        assert!(
            matches(&example.printed, &printed),
            "`{}` prints\n{}\nand {path} says\n{}",
            example.command,
            ended.stdout,
            example.printed.join("\n")
        );
    }
}

#[test]
fn an_example_ends_with_the_next_one_or_with_its_block() {
    let text =
        "# T\n```sh\n$ dtc no\n```\n```console\n$ dtc a \\\n    --b\n1\n\n2\n$ ls\n```\n$ no\n";
    let example = |command: &str, printed: &[&str]| Example {
        command: command.to_owned(),
        printed: printed.iter().map(|&line| line.to_owned()).collect(),
    };
    assert_eq!(examples(text), [example("dtc a     --b", &["1", "", "2"]), example("ls", &[])]);
    assert_eq!(runnable("cargo run --release -- run -x"), Some("dtc run -x".to_owned()));
    assert_eq!(runnable("dtc run -x"), Some("dtc run -x".to_owned()));
    assert_eq!(runnable("tests/run"), None);
}

#[test]
fn an_ellipsis_stands_for_any_lines() {
    let said = |lines: &[&str]| lines.iter().map(|&line| line.to_owned()).collect::<Vec<_>>();
    assert!(matches(&said(&["a", "b"]), &["a", "b"]));
    assert!(!matches(&said(&["a", "b"]), &["a"]));
    assert!(!matches(&said(&["a"]), &["a", "b"]));
    assert!(matches(&said(&["a", "…", "z"]), &["a", "b", "c", "z"]));
    assert!(matches(&said(&["a", "…"]), &["a"]));
    assert!(!matches(&said(&["a", "…", "z"]), &["a", "b"]));
    assert!(!matches(&said(&["a", "…", "a"]), &["a"]));
}

fn examples(text: &str) -> Vec<Example> {
    let mut examples: Vec<Example> = Vec::new();
    for block in blocks(text).iter().filter(|block| block.kind == "console") {
        let mut lines = block.lines.iter();
        while let Some(line) = lines.next() {
            if let Some(command) = line.strip_prefix("$ ") {
                let mut command = command.to_owned();
                while command.ends_with('\\') {
                    command.pop();
                    command.push_str(lines.next().map_or("", String::as_str));
                }
                examples.push(Example { command, printed: Vec::new() });
            } else if let Some(example) = examples.last_mut() {
                example.printed.push(line.to_owned());
            }
        }
    }
    examples
}

/// The command with the binary instead of what builds it; `None`: it is not one of ours.
fn runnable(command: &str) -> Option<String> {
    let arguments = command.strip_prefix(CARGO_RUN).or_else(|| command.strip_prefix(DTC))?;
    Some(format!("{DTC}{arguments}"))
}

fn shell(command: &str) -> Command {
    let binary: &Path = assert_cmd::cargo::cargo_bin!("dtc");
    let mut path = binary.parent().unwrap().as_os_str().to_owned();
    path.push(":");
    path.push(env::var_os("PATH").unwrap_or_default());
    let mut shell = Command::new("sh");
    shell.args(["-c", command]).current_dir(repository()).env("PATH", path).env_remove("DTC_LOG");
    shell
}

fn matches(said: &[String], printed: &[&str]) -> bool {
    let Some(at) = said.iter().position(|line| line == "…") else { return said == printed };
    let (head, tail) = (&said[..at], &said[at + 1..]);
    let Some(rest) = printed.get(at..).filter(|_| printed[..at] == *head) else { return false };
    (0..=rest.len()).any(|skipped| matches(tail, &rest[skipped..]))
}
