//! The runtime directory under races, crashes and strangers' files.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::Duration;

use control::{Runtime, RuntimeError};

/// A directory of this test alone, removed at its end.
struct Scratch(PathBuf);

impl Scratch {
    fn new(test: &str) -> Self {
        let path = std::env::temp_dir().join(format!("apiary-control-{test}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        Scratch(path)
    }

    fn runtime(&self) -> Runtime {
        Runtime::at(self.0.join("vmm"))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Not a test of its own: the process that others start and kill.
#[test]
fn child_holds_a_name() {
    let Ok(root) = std::env::var("APIARY_TEST_HOLD") else { return };
    let directory = Runtime::at(root).claim("victim").unwrap();
    directory.set_engine("soft").unwrap();
    fs::write(directory.path().join("com1"), "left over").unwrap();
    println!("\nholding");
    loop {
        thread::park();
    }
}

fn start_child(runtime: &Runtime) -> Child {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child_holds_a_name", "--nocapture"])
        .env("APIARY_TEST_HOLD", runtime.root())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.map_while(Result::ok).any(|line| line == "holding"), "the child did not get the name");
    child
}

#[test]
fn a_name_is_held_listed_and_freed() {
    let scratch = Scratch::new("held");
    let runtime = scratch.runtime();
    assert_eq!(runtime.list().unwrap(), vec![], "a root that does not exist lists nothing");
    assert!(!runtime.root().exists(), "and looking does not make it");
    let directory = runtime.claim("g1").unwrap();
    assert_eq!(fs::metadata(directory.path()).unwrap().permissions().mode() & 0o777, 0o700);
    let entry = runtime.find("g1").unwrap();
    assert_eq!((entry.pid, entry.engine), (Some(std::process::id()), None));
    directory.set_engine("kvm").unwrap();
    assert_eq!(runtime.list().unwrap()[0].engine.as_deref(), Some("kvm"));
    assert!(matches!(runtime.claim("g1"), Err(RuntimeError::InUse { pid: Some(_), .. })));
    assert!(runtime.find("g1").is_ok(), "a refused start does not harm the holder");
    let path = directory.path().to_owned();
    drop(directory);
    assert!(!path.exists());
    assert!(matches!(runtime.find("g1"), Err(RuntimeError::NotRunning { .. })));
    runtime.claim("g1").unwrap();
}

#[test]
fn a_killed_owner_leaves_nothing_that_matters() {
    let scratch = Scratch::new("killed");
    let runtime = scratch.runtime();
    let mut child = start_child(&runtime);
    assert_eq!(runtime.list().unwrap()[0].pid, Some(child.id()));
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(runtime.root().join("victim/com1").exists(), "the crash leaves the directory");
    assert_eq!(runtime.list().unwrap(), vec![], "but no list shows it");
    assert!(!runtime.root().join("victim").exists(), "and the list has cleared it");

    let mut child = start_child(&runtime);
    child.kill().unwrap();
    // Not waited for: the process may still be on its way out.
    let again = runtime.claim("victim").unwrap();
    assert!(!again.path().join("com1").exists(), "a new owner starts with an empty directory");
    assert_eq!(runtime.find("victim").unwrap().pid, Some(std::process::id()));
    assert!(!again.path().join("engine").exists());
    child.wait().unwrap();
}

#[test]
fn kill_ends_the_owner_and_clears() {
    let scratch = Scratch::new("kill");
    let runtime = scratch.runtime();
    let mut child = start_child(&runtime);
    let entry = runtime.find("victim").unwrap();
    assert!(!entry.wait_gone(Duration::ZERO).unwrap());
    runtime.kill("victim").unwrap();
    assert!(!runtime.root().join("victim").exists());
    assert!(matches!(runtime.kill("victim"), Err(RuntimeError::NotRunning { .. })));
    assert!(!child.wait().unwrap().success());
    assert!(entry.wait_gone(Duration::ZERO).unwrap());
}

#[test]
fn of_many_starts_at_once_one_wins() {
    let scratch = Scratch::new("race");
    let runtime = scratch.runtime();
    for _ in 0..20 {
        const STARTS: usize = 6;
        let barrier = Arc::new(Barrier::new(STARTS));
        let starts: Vec<_> = (0..STARTS)
            .map(|i| {
                let (runtime, barrier) = (runtime.clone(), barrier.clone());
                thread::spawn(move || {
                    barrier.wait();
                    // Lookers are there to disturb; they must not.
                    if i % 2 == 1 {
                        runtime.list().unwrap();
                    }
                    runtime.claim("g")
                })
            })
            .collect();
        let results: Vec<_> = starts.into_iter().map(|s| s.join().unwrap()).collect();
        assert_eq!(results.iter().filter(|r| r.is_ok()).count(), 1, "{results:?}");
        assert!(results.iter().all(|r| matches!(r, Ok(_) | Err(RuntimeError::InUse { .. }))), "{results:?}");
    }
}

#[test]
fn release_and_claim_in_turns_never_collide() {
    let scratch = Scratch::new("turns");
    let runtime = scratch.runtime();
    let workers: Vec<_> = (0..4)
        .map(|_| {
            let runtime = runtime.clone();
            thread::spawn(move || {
                for _ in 0..50 {
                    match runtime.claim("g") {
                        Ok(mine) => assert_eq!(runtime.find("g").unwrap().path, mine.path()),
                        Err(RuntimeError::InUse { .. }) => {}
                        Err(other) => panic!("{other}"),
                    }
                }
            })
        })
        .collect();
    for worker in workers {
        worker.join().unwrap();
    }
    assert_eq!(runtime.list().unwrap(), vec![]);
}

#[test]
fn strangers_files_are_left_alone() {
    let scratch = Scratch::new("strangers");
    let runtime = scratch.runtime();
    fs::create_dir_all(runtime.root().join("photos")).unwrap();
    fs::write(runtime.root().join("photos/cat"), "meow").unwrap();
    fs::write(runtime.root().join("file"), "").unwrap();
    fs::create_dir_all(scratch.0.join("elsewhere")).unwrap();
    std::os::unix::fs::symlink(scratch.0.join("elsewhere"), runtime.root().join("link")).unwrap();
    assert_eq!(runtime.list().unwrap(), vec![]);
    for name in ["photos", "file", "link"] {
        assert!(runtime.claim(name).is_err(), "{name}");
    }
    assert_eq!(fs::read_to_string(runtime.root().join("photos/cat")).unwrap(), "meow");
    assert_eq!(fs::read_dir(scratch.0.join("elsewhere")).unwrap().count(), 0);
}

#[test]
fn names_are_file_names() {
    let scratch = Scratch::new("names");
    let runtime = scratch.runtime();
    let long = "x".repeat(230);
    for name in ["", ".", "..", ".lock", "a/b", "../x", "a b", "a\n", "-x", &long] {
        assert!(matches!(runtime.claim(name), Err(RuntimeError::BadName { .. })), "{name:?}");
        assert!(matches!(runtime.find(name), Err(RuntimeError::BadName { .. })), "{name:?}");
    }
    for name in ["g1", "jail.v2-x_y", "日本", &"x".repeat(229)] {
        runtime.claim(name).unwrap();
    }
}
