//! This crate as a dependency: which crates each of its features needs, what is in its package, and
//! which version it reports.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail here")]

use std::{collections::BTreeSet, fs, path::Path, process::Command};

#[path = "../build.rs"]
#[expect(dead_code, clippy::print_stdout, reason = "cargo runs it, and listens to what it prints")]
mod build;

/// The crates that only the command needs.
const OF_THE_COMMAND: [&str; 9] = [
    "anyhow",
    "clap",
    "config",
    "indicatif",
    "mimalloc",
    "secrecy",
    "time",
    "tracing-appender",
    "tracing-subscriber",
];

/// The crates for RabbitMQ.
const OF_THE_BROKER: [&str; 6] =
    ["async-rs", "backon", "deadpool", "lapin", "rustls", "rustls-connector"];

/// The crates that the embedded coordinator needs in addition.
const OF_EMBEDDED: [&str; 2] = ["crc32fast", "hdrhistogram"];

#[test]
fn the_features_client_service_and_worker_compile_nothing_of_the_command() {
    for feature in ["client", "service", "worker"] {
        let brought = brought_by(&["--no-default-features", "--features", feature]);
        assert_eq!(among(&brought, &OF_THE_COMMAND), [""; 0], "{feature}");
        assert_eq!(among(&brought, &OF_EMBEDDED), [""; 0], "{feature}");
        assert_eq!(among(&brought, &OF_THE_BROKER), OF_THE_BROKER, "{feature}");
    }
}

#[test]
fn what_serves_hears_signals_and_a_producer_compiles_nothing_for_it() {
    let hears = |feature| {
        brought_by(&["--no-default-features", "--features", feature])
            .contains("signal-hook-registry")
    };
    assert!(hears("service") && hears("worker"));
    assert!(!hears("client") && !hears("embedded"));
}

#[test]
fn the_feature_embedded_compiles_nothing_of_the_broker_client() {
    let brought = brought_by(&["--no-default-features", "--features", "embedded"]);
    assert_eq!(among(&brought, &OF_THE_COMMAND), [""; 0]);
    assert_eq!(among(&brought, &OF_THE_BROKER), [""; 0]);
    assert_eq!(among(&brought, &OF_EMBEDDED), OF_EMBEDDED);
}

#[test]
fn the_default_features_include_everything() {
    let brought = brought_by(&[]);
    for all in [&OF_THE_COMMAND[..], &OF_THE_BROKER, &OF_EMBEDDED] {
        assert_eq!(among(&brought, all), all);
    }
}

/// Its TLS would bring 50 crates, most of them for keys in PKCS #12.
#[test]
fn lapin_is_compiled_without_its_own_tls() {
    assert_eq!(among(&brought_by(&[]), &["p12-keystore", "x509-parser"]), [""; 0]);
}

/// `Cargo.lock` takes the release of `idna_adapter` that knows ASCII only. `url` needs it for the host
/// of a web address; the host of an `amqp://` address is not looked up in tables. After an update:
/// `cargo update -p idna_adapter --precise 1.0.0`, here and in tests/fuzz.
#[test]
fn no_tables_of_unicode_are_compiled_for_a_host() {
    assert_eq!(among(&brought_by(&[]), &["icu_normalizer", "unicode-normalization"]), [""; 0]);
}

/// `release` is quick to build, and the other profiles begin with its settings.
#[test]
fn what_is_shipped_measured_or_put_under_load_is_optimised() {
    let read = |file| fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(file)).unwrap();
    let manifest = read("Cargo.toml");
    let profile = |name: &str| {
        let (_, after) = manifest.split_once(&format!("\n[profile.{name}]\n")).unwrap();
        after.split("\n[").next().unwrap().to_owned()
    };
    for name in ["dist", "bench", "optimised"] {
        assert!(profile(name).contains("opt-level = 3\n"), "{name}");
    }
    for name in ["dist", "bench"] {
        let fastest = "lto = \"fat\"\ncodegen-units = 1\n";
        assert!(profile(name).contains(fastest), "{name}");
    }
    assert!(read("deploy/Dockerfile").contains("cargo build --profile dist "));
}

#[test]
fn the_package_has_its_sources_and_no_tests() {
    let listed = cargo(&["package", "--list", "--allow-dirty"]);
    let packaged: BTreeSet<&str> = listed.lines().collect();
    let at_the_top: Vec<_> = packaged.iter().copied().filter(|path| !path.contains('/')).collect();
    let of_cargo = [".cargo_vcs_info.json", "Cargo.toml.orig"];
    let wanted =
        ["Cargo.lock", "Cargo.toml", "LICENSE-APACHE", "LICENSE-MIT", "README.md", "build.rs"];
    let unexpected: Vec<_> = at_the_top
        .into_iter()
        .filter(|path| !of_cargo.contains(path) && !wanted.contains(path))
        .collect();
    assert_eq!(unexpected, [""; 0]);
    for path in wanted.iter().chain(&["deploy/dtc.toml", "src/lib.rs", "src/main.rs"]) {
        assert!(packaged.contains(path), "{path} is missing");
    }
    let directories: BTreeSet<_> =
        packaged.iter().filter_map(|path| path.split_once('/')).collect();
    let directories: BTreeSet<_> =
        directories.into_iter().map(|(directory, _)| directory).collect();
    assert_eq!(directories, BTreeSet::from(["deploy", "examples", "src"]));
}

#[test]
fn the_oldest_compiler_is_stated_once_and_no_newer_than_the_one_in_use() {
    let stated = |file: &str, before: &str| {
        let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(file)).unwrap();
        let (_, after) = text.split_once(before).unwrap();
        let version = after.split('"').next().unwrap();
        version.split('.').map(|number| number.parse().unwrap()).collect::<Vec<u32>>()
    };
    let oldest = stated("Cargo.toml", "\nrust-version = \"");
    assert_eq!(stated("tests/fuzz/Cargo.toml", "\nrust-version = \""), oldest);
    assert!(oldest <= stated("rust-toolchain.toml", "\nchannel = \""), "{oldest:?}");
}

#[test]
fn a_version_names_the_given_packaged_or_checked_out_commit() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let version = |given| build::version("1.2.3", directory, given);
    assert_eq!(version(None), "1.2.3", "nobody knows");
    assert_eq!(version(Some("")), "1.2.3", "an image that was built without being told");
    assert_eq!(version(Some("abc123")), "1.2.3 (abc123)");

    let info = "{\n  \"git\": {\n    \"sha1\": \"0123456789abcdef0123\"\n  }\n}";
    fs::write(directory.join(".cargo_vcs_info.json"), info).unwrap();
    assert_eq!(version(None), "1.2.3 (0123456789ab)");
    fs::remove_file(directory.join(".cargo_vcs_info.json")).unwrap();

    // Then the commit is unknown.
    if Command::new("git").arg("--version").output().is_err() {
        return;
    }
    fs::create_dir(directory.join("src")).unwrap();
    fs::write(directory.join("src/lib.rs"), "").unwrap();
    let git = |arguments: &[&str]| {
        let mut command = Command::new("git");
        command.args(["-c", "user.name=n", "-c", "user.email=e"]).args(arguments);
        let output = command.current_dir(directory).output().unwrap();
        assert!(output.status.success(), "{command:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    git(&["init", "--quiet"]);
    assert_eq!(version(None), "1.2.3", "nothing is committed yet");
    git(&["add", "."]);
    git(&["commit", "--quiet", "--no-gpg-sign", "-m", "first"]);
    let commit = git(&["rev-parse", "HEAD"])[..12].to_owned();
    assert_eq!(version(None), format!("1.2.3 ({commit})"));
    fs::write(directory.join("notes"), "no source").unwrap();
    assert_eq!(version(None), format!("1.2.3 ({commit})"));
    fs::write(directory.join("src/lib.rs"), "//!").unwrap();
    assert_eq!(version(None), format!("1.2.3 ({commit}, modified)"));
    let vendored = directory.join("src");
    assert_eq!(
        build::version("1.2.3", &vendored, None),
        "1.2.3",
        "the commit is of something else"
    );
}

/// The crates that are compiled for a dependency on this one with these flags.
fn brought_by(flags: &[&str]) -> BTreeSet<String> {
    let tree = ["tree", "--edges", "normal", "--prefix", "none", "--format", "{p}"];
    let listed = cargo(&[&tree, flags].concat());
    listed.lines().filter_map(|line| line.split(' ').next()).map(str::to_owned).collect()
}

/// Those of `names` that are in `brought`.
fn among<'a>(brought: &BTreeSet<String>, names: &[&'a str]) -> Vec<&'a str> {
    names.iter().copied().filter(|name| brought.contains(*name)).collect()
}

/// What `cargo` prints in the root of the repository, without the network.
fn cargo(arguments: &[&str]) -> String {
    let mut command = Command::new(env!("CARGO"));
    command.args(arguments).args(["--locked", "--offline"]);
    let output = command.current_dir(env!("CARGO_MANIFEST_DIR")).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {said}");
    String::from_utf8(output.stdout).unwrap()
}
