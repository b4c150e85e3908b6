//! The user's end of a null modem: attach, detach, come back, collide.

mod common;

use std::os::unix::fs::symlink;
use std::time::Instant;

use common::{Directories, Guest, attach, expect, send};
use console::{Backend, Console, ConsoleError, NullModemEnd};
use rustix::termios::{LocalModes, OptionalActions, tcgetattr, tcsetattr};

fn nmdm(end: NullModemEnd) -> Backend {
    Backend::NullModem { unit: "0".to_owned(), end }
}

#[test]
fn carries_both_ways_and_is_reachable_by_every_name() {
    let dirs = Directories::new();
    let guest = Guest::new(&nmdm(NullModemEnd::A), &dirs.place("one"));
    let names = [dirs.path("one/com1"), dirs.path("shared/nmdm0B"), dirs.path("dev/nmdm0B")];
    assert_eq!(guest.console.viewer_paths(), names);
    for name in &names {
        let mut user = attach(name);
        send(&mut user, "hi\r");
        guest.expect_input("hi\r");
        guest.print("there\r\n");
        expect(&mut user, "there\r\n");
    }
    drop(guest);
    assert!(names.iter().all(|name| name.symlink_metadata().is_err()), "links are removed");
    assert!(dirs.path("shared/nmdm0.lock").symlink_metadata().is_err());
}

#[test]
fn output_waits_for_the_first_user() {
    let dirs = Directories::new();
    let guest = Guest::new(&nmdm(NullModemEnd::A), &dirs.place("one"));
    guest.print("booting\r\n");
    let mut user = attach(&dirs.path("one/com1"));
    expect(&mut user, "booting\r\n");
    drop(user);
    guest.print("login: ");
    let mut user = attach(&dirs.path("one/com1"));
    expect(&mut user, "login: ");
    guest.expect_no_input();
}

#[test]
fn a_user_that_leaves_echo_on_does_not_feed_the_guest_its_output() {
    let dirs = Directories::new();
    let guest = Guest::new(&nmdm(NullModemEnd::B), &dirs.place("one"));
    let path = dirs.path("shared/nmdm0A");
    let mut user = attach(&path);
    let mut modes = tcgetattr(&user).unwrap();
    modes.local_modes |= LocalModes::ECHO | LocalModes::ICANON;
    tcsetattr(&user, OptionalActions::Now, &modes).unwrap();
    send(&mut user, "a");
    guest.expect_input("a");
    drop(user);
    // The modes are put back when the hang-up has been noticed.
    let deadline = Instant::now() + common::PATIENCE;
    let mut user = loop {
        let user = attach(&path);
        if !tcgetattr(&user).unwrap().local_modes.contains(LocalModes::ECHO) {
            break user;
        }
        assert!(Instant::now() < deadline, "echo is still on");
        drop(user);
        std::thread::yield_now();
    };
    send(&mut user, "b");
    guest.expect_input("b");
    guest.print("x\n");
    expect(&mut user, "x\n");
    guest.expect_no_input();
}

#[test]
fn input_of_a_program_that_has_left_arrives() {
    let dirs = Directories::new();
    let guest = Guest::with_small_steps(&nmdm(NullModemEnd::A), &dirs.place("one"), 3);
    send(&mut attach(&dirs.path("one/com1")), "reboot now\r");
    guest.expect_input("reboot now\r");
}

#[test]
fn the_same_end_twice_is_refused_and_the_other_end_connects_two_guests() {
    let dirs = Directories::new();
    let one = Guest::new(&nmdm(NullModemEnd::A), &dirs.place("one"));
    let error = Console::open(&nmdm(NullModemEnd::A), &dirs.place("two")).err().unwrap();
    assert!(matches!(error, ConsoleError::NullModemTaken { .. }), "{error}");
    assert!(error.to_string().contains("/dev/nmdm0A"), "{error}");
    let two = Guest::new(&nmdm(NullModemEnd::B), &dirs.place("two"));
    two.print("from two");
    one.expect_input("from two");
    one.print("from one");
    two.expect_input("from one");
    drop(one);
    drop(two);
    Guest::new(&nmdm(NullModemEnd::A), &dirs.place("two"));
}

#[test]
fn leftovers_are_replaced_and_foreign_files_are_not() {
    let dirs = Directories::new();
    std::fs::create_dir(dirs.path("shared")).unwrap();
    for name in ["one/com1", "shared/nmdm0B", "dev/nmdm0B"] {
        symlink("/dev/pts/123456", dirs.path(name)).unwrap();
    }
    std::fs::write(dirs.path("shared/nmdm0.lock"), "").unwrap();
    let guest = Guest::new(&nmdm(NullModemEnd::A), &dirs.place("one"));
    let mut user = attach(&dirs.path("dev/nmdm0B"));
    guest.print("x");
    expect(&mut user, "x");
    drop(guest);

    std::fs::write(dirs.path("dev/nmdm0B"), "somebody's").unwrap();
    let error = Console::open(&nmdm(NullModemEnd::A), &dirs.place("one")).err().unwrap();
    assert!(
        matches!(&error, ConsoleError::Foreign { path, .. } if *path == dirs.path("dev/nmdm0B")),
        "{error}"
    );
    assert_eq!(std::fs::read(dirs.path("dev/nmdm0B")).unwrap(), b"somebody's");
    assert!(dirs.path("one/com1").symlink_metadata().is_err(), "nothing is left behind");
}

#[test]
fn a_device_directory_without_permission_is_done_without() {
    let dirs = Directories::new();
    let mut place = dirs.place("one");
    place.device_dir = dirs.path("missing");
    let guest = Guest::new(&nmdm(NullModemEnd::A), &place);
    assert_eq!(guest.console.viewer_paths().len(), 2);
    place.runtime_dir = dirs.path("missing");
    let unit = Backend::NullModem { unit: "1".to_owned(), end: NullModemEnd::A };
    let error = Console::open(&unit, &place).err().unwrap();
    assert!(error.to_string().starts_with("com1: cannot make the link "), "{error}");
}
