//! Files that are not as they should be, and odd ones that are.

use crate::world::{World, output, output_given, transaction};
use serde_json::{Value, json};
use std::fs;

const SERVICES: &str = r#"[{"name": "a", "max_concurrency": 2}]"#;

fn world() -> World {
    World::new(&serde_json::from_str(SERVICES).unwrap())
}

/// The lines for these ids.
fn lines(ids: &[&str]) -> String {
    ids.iter().map(|id| format!("{}\n", transaction(id, &["a"]))).collect()
}

#[test]
fn a_directory_is_refused_as_one_wherever_it_is_given() {
    let world = world();
    output(&mut world.run_over("."))
        .exited(65)
        .silent()
        .saying("failed to open `.`: it is a directory\n");
    fs::remove_file(world.path("services.json")).unwrap();
    fs::create_dir(world.path("services.json")).unwrap();
    output(&mut world.run_over("/dev/null"))
        .exited(65)
        .silent()
        .saying("failed to open `services.json`: it is a directory\n");
}
