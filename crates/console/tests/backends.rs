//! TCP and terminal devices of the host.

mod common;

use std::io::Read;
use std::net::TcpStream;
use std::path::Path;

use common::{Directories, Guest, HostTerminal, expect, send};
use console::{Backend, Console, ConsoleError};

fn tcp() -> Backend {
    Backend::Tcp("127.0.0.1:0".parse().unwrap())
}

fn connect(guest: &Guest) -> TcpStream {
    let client = TcpStream::connect(guest.console.local_address().unwrap()).unwrap();
    client.set_read_timeout(Some(common::PATIENCE)).unwrap();
    client
}

#[test]
fn tcp_serves_one_client_after_the_other() {
    let dirs = Directories::new();
    let guest = Guest::new(&tcp(), &dirs.place("one"));
    guest.print("early ");
    let mut first = connect(&guest);
    expect(&mut first, "early ");
    let mut second = connect(&guest);
    let mut told = String::new();
    second.read_to_string(&mut told).unwrap();
    assert!(told.contains("in use"), "{told:?}");
    send(&mut first, "\x03ls\r");
    guest.expect_input("\x03ls\r");
    guest.print("output");
    expect(&mut first, "output");
    // Its last words are heard, and nobody has to wait until the console has noticed that it leaves.
    send(&mut first, "exit\r");
    drop(first);
    let mut third = connect(&guest);
    guest.expect_input("exit\r");
    send(&mut third, "?");
    guest.expect_input("?");
    guest.print("again");
    expect(&mut third, "again");
}

#[test]
fn who_has_left_makes_room_even_if_the_guest_takes_no_input() {
    let dirs = Directories::new();
    let guest = Guest::deaf(&tcp(), &dirs.place("one"));
    let mut first = connect(&guest);
    guest.print("1");
    expect(&mut first, "1");
    send(&mut first, "is anybody there?");
    guest.expect_input("i");
    send(&mut first, "hello?");
    drop(first);
    let mut second = connect(&guest);
    guest.print("2");
    expect(&mut second, "2");
}

#[test]
fn a_port_in_use_is_an_error_with_advice() {
    let dirs = Directories::new();
    let guest = Guest::new(&tcp(), &dirs.place("one"));
    let taken = Backend::Tcp(guest.console.local_address().unwrap());
    let error = Console::open(&taken, &dirs.place("two")).err().unwrap();
    assert!(matches!(error, ConsoleError::Listen { .. }));
    assert!(error.to_string().contains("choose another port"), "{error}");
}

#[test]
fn nothing_is_lost_under_back_pressure() {
    let dirs = Directories::new();
    let guest = Guest::with_small_steps(&tcp(), &dirs.place("one"), 7);
    let text: String = (0..200).map(|i| format!("line {i}\n")).collect();
    let mut client = connect(&guest);
    send(&mut client, &text);
    guest.expect_input(&text);
    let reader = std::thread::spawn({
        let text = text.repeat(500);
        move || expect(&mut client, &text)
    });
    for _ in 0..500 {
        guest.print(&text);
    }
    reader.join().unwrap();
    assert_eq!(guest.console.lost_bytes(), 0);
}

#[test]
fn what_is_buffered_leaves_before_the_console_is_gone() {
    let dirs = Directories::new();
    let guest = Guest::new(&tcp(), &dirs.place("one"));
    let mut client = connect(&guest);
    guest.print("0");
    expect(&mut client, "0");
    guest.print(&"Power down.\n".repeat(1000));
    drop(guest);
    let mut rest = String::new();
    client.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "Power down.\n".repeat(1000));
}

#[test]
fn a_terminal_device_is_raw_while_the_guest_has_it() {
    let dirs = Directories::new();
    let mut terminal = HostTerminal::new();
    assert!(terminal.is_cooked());
    let guest = Guest::new(&Backend::Tty(terminal.path.clone()), &dirs.place("one"));
    assert!(terminal.is_raw());
    send(&mut terminal.master, "\x03\x04q");
    guest.expect_input("\x03\x04q");
    guest.print("a\nb");
    expect(&mut terminal.master, "a\nb");
    drop(guest);
    assert!(terminal.is_cooked());
}

#[test]
fn a_terminal_that_goes_away_does_not_take_the_console_along() {
    let dirs = Directories::new();
    let terminal = HostTerminal::new();
    let guest = Guest::new(&Backend::Tty(terminal.path.clone()), &dirs.place("one"));
    drop(terminal);
    for _ in 0..100 {
        guest.print("still running\n");
    }
    drop(guest);
}

#[test]
fn what_is_no_terminal_is_refused_with_the_path() {
    let dirs = Directories::new();
    std::fs::write(dirs.path("file"), "").unwrap();
    for path in [Path::new("/dev/null"), &dirs.path("file"), &dirs.path("dev")] {
        let error = Console::open(&Backend::Tty(path.to_owned()), &dirs.place("one")).err().unwrap();
        assert!(matches!(error, ConsoleError::NotATerminal { .. }), "{error}");
        assert!(error.to_string().contains(&*path.to_string_lossy()), "{error}");
    }
    let error = Console::open(&Backend::Tty(dirs.path("ttyS99")), &dirs.place("one")).err().unwrap();
    assert!(error.to_string().ends_with("; check the path"), "{error}");
}
