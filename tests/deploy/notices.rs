//! The licences in the image: of everything that is linked into the binary.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use tempfile::TempDir;

use crate::{read, repository};

/// Where the image has them.
const IN_THE_IMAGE: &str = "/usr/share/licenses/dtc";

#[test]
fn the_image_has_the_licences_of_what_its_binary_is_linked_with() {
    let dockerfile = read("deploy/Dockerfile");
    let build = dockerfile.split("\nFROM ").nth(1).unwrap();
    let (_, made) = build.split_once("deploy/notices.sh ").expect("the build stage writes them");
    let made = made.split_whitespace().next().unwrap();
    let image = dockerfile.split("\nFROM ").last().unwrap();
    assert!(image.contains(&format!("\nCOPY --from=build {made} {IN_THE_IMAGE}\n")), "{image}");
}

#[test]
fn every_linked_crate_is_named_with_a_licence_text() {
    let directory = tempfile::tempdir().unwrap();
    succeeded(notices(repository()).arg(directory.path()));
    let of = |name: &str| fs::read_to_string(directory.path().join(name)).unwrap();
    assert_eq!(of("LICENSE-MIT"), read("LICENSE-MIT"));
    assert_eq!(of("LICENSE-APACHE"), read("LICENSE-APACHE"));
    assert!(of("RUST-LIBRARY.html").contains("Copyright notices for The Rust Standard Library"));

    let notices = Notices::parse(&of("THIRD-PARTY.txt"));
    let linked = linked();
    assert!(linked.len() > 50, "{linked:?}");
    assert_eq!(notices.crates, linked);
    for name in &linked {
        let texts = notices.texts.get(name).unwrap_or_else(|| panic!("{name} has no text"));
        // typenum also has a file that only names its two licences.
        assert!(texts.iter().any(|text| text.len() > 500), "{name}: {texts:?}");
    }
    // ring has its own terms for the code of BoringSSL, and mimalloc those of its C sources.
    for (name, part) in [("ring ", "BoringSSL"), ("libmimalloc-sys ", "Daan Leijen")] {
        let (_, texts) = notices.texts.iter().find(|(it, _)| it.starts_with(name)).unwrap();
        assert!(texts.iter().any(|text| text.contains(part)), "{name}: no {part}");
    }
}

#[test]
fn a_text_that_two_crates_share_is_written_once() {
    let world = World::with(&["widget v1.0.0", "gadget v2.1.0+b"]);
    world.give("widget-1.0.0", "LICENSE-MIT", "the same\r\n");
    world.give("widget-1.0.0", "vendored/COPYING", "of the vendored part\n");
    world.give("widget-1.0.0", "src/license.rs", "// a source");
    world.give("gadget-2.1.0+b", "licence.txt", "the same\n");
    succeeded(&mut world.notices());
    let notices = Notices::parse(&world.written());
    let of = |name: &str| notices.texts[name].iter().map(|text| text.trim()).collect::<Vec<_>>();
    assert_eq!(of("widget 1.0.0"), ["the same", "of the vendored part"]);
    assert_eq!(of("gadget 2.1.0+b"), ["the same"]);
    assert_eq!(world.written().matches("the same").count(), 1);
}

#[test]
fn a_crate_without_a_text_is_an_error_until_the_repository_has_it() {
    let world = World::with(&["widget v1.0.0"]);
    world.give("widget-1.0.0", "README.md", "MIT");
    let failed = world.notices().output().unwrap();
    let stderr = String::from_utf8(failed.stderr).unwrap();
    assert!(!failed.status.success() && stderr.contains(" widget-1.0.0"), "{stderr}");

    let own = world.directory.path().join("deploy/licences");
    fs::create_dir_all(&own).unwrap();
    fs::write(own.join("widget"), "its licence").unwrap();
    succeeded(&mut world.notices());
    assert!(world.written().contains("its licence"));
}

#[test]
fn a_static_binary_has_the_licence_of_its_c_library_too() {
    let world = World::with(&[]);
    let musl = read("deploy/licences/musl");
    fs::write(world.made("deploy/licences/musl"), &musl).unwrap();
    fs::write(world.made("share/doc/rust/COPYRIGHT-library.html"), "").unwrap();
    let root = world.directory.path().display();
    world.program(
        "rustc",
        &format!("[ $1 = --print ] && echo {root} || echo 'host: x86_64-unknown-linux-musl'"),
    );
    succeeded(&mut world.notices());
    let written = world.directory.path().join("written/MUSL.txt");
    assert_eq!(fs::read_to_string(written).unwrap(), musl);
    assert!(musl.contains("Rich Felker"));
}

/// What a command prints; it must succeed.
#[track_caller]
fn succeeded(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {stderr}");
    String::from_utf8(output.stdout).unwrap()
}

/// `notices.sh`, to run in this repository.
fn notices(repository: &Path) -> Command {
    let mut command = Command::new(crate::repository().join("deploy/notices.sh"));
    command.current_dir(repository);
    command
}

/// The crates that are linked into the binary, as `name version`.
fn linked() -> Vec<String> {
    let mut tree = Command::new(env!("CARGO"));
    tree.args(["tree", "--locked", "--offline", "--edges", "normal,no-proc-macro"]);
    let listed = succeeded(tree.args(["--prefix", "none"]).current_dir(repository()));
    let name = |line: &str| {
        let (name, version) = line.split_once(" v")?;
        let version = version.split(' ').next()?;
        (name != "dtc").then(|| format!("{name} {version}"))
    };
    let mut names: Vec<_> = listed.lines().filter_map(name).collect();
    names.sort();
    names.dedup();
    names
}

/// What THIRD-PARTY.txt says.
struct Notices {
    /// The crates, as `name version`.
    crates: Vec<String>,
    /// Their texts.
    texts: BTreeMap<String, Vec<String>>,
}

impl Notices {
    fn parse(text: &str) -> Self {
        let rule = format!("\n{}\n", "-".repeat(80));
        let mut parts = text.split(&rule);
        let listed = parts.next().unwrap().lines().skip(2);
        let mut crates: Vec<_> =
            listed.filter_map(|line| Some(line.split_once(", ")?.0.to_owned())).collect();
        crates.sort();
        let mut texts: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for part in parts {
            let (names, text) = part.split_once(":\n\n").unwrap();
            for name in names.replace('\n', "").split(", ") {
                texts.entry(name.to_owned()).or_default().push(text.to_owned());
            }
        }
        Self { crates, texts }
    }
}

/// A repository, a registry, and a `cargo` that lists these crates as linked.
struct World {
    directory: TempDir,
}

impl World {
    fn with(crates: &[&str]) -> Self {
        let world = Self { directory: tempfile::tempdir().unwrap() };
        for name in ["LICENSE-MIT", "LICENSE-APACHE"] {
            fs::write(world.directory.path().join(name), "").unwrap();
        }
        let line = |name: &&str| format!("echo '{name}|MIT|https://example.org|'\n");
        world.program("cargo", &crates.iter().map(line).collect::<String>());
        world
    }

    /// Replaces a program by a script.
    fn program(&self, name: &str, script: &str) {
        let path = self.made(&format!("bin/{name}"));
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// Writes a file of a crate.
    fn give(&self, name: &str, file: &str, text: &str) {
        fs::write(self.made(&format!("home/registry/src/index/{name}/{file}")), text).unwrap();
    }

    fn notices(&self) -> Command {
        let mut command = notices(self.directory.path());
        let path = std::env::var("PATH").unwrap();
        let bin = self.directory.path().join("bin");
        command.env("PATH", format!("{}:{path}", bin.display()));
        command.env("CARGO_HOME", self.directory.path().join("home"));
        command.arg(self.directory.path().join("written"));
        command
    }

    fn written(&self) -> String {
        fs::read_to_string(self.directory.path().join("written/THIRD-PARTY.txt")).unwrap()
    }

    /// A path in it, whose directory exists.
    fn made(&self, path: &str) -> PathBuf {
        let path = self.directory.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        path
    }
}
