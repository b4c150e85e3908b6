//! The four serial ports of one guest, each at another kind of backend.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use guest::{End, Error, Machine, Running};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};

use crate::{assert_status, status};

/// Only a failing test waits for it.
const PATIENCE: Duration = Duration::from_secs(600);
/// Bytes sent each way on each port: every value, more than a FIFO and less than a terminal's buffer.
const BYTES: usize = 1024;

/// The bytes of a port: every value, and no two ports the same.
fn bytes_of(port: usize) -> Vec<u8> {
    (0..BYTES).map(|n| (n * (2 * port + 1) + 40 * port) as u8).collect()
}

/// Reads so many bytes.
fn read_all(what: &str, mut from: impl Read + AsFd, count: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    let deadline = Instant::now() + PATIENCE;
    while bytes.len() < count {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: 0 };
        let ready = poll(&mut [PollFd::new(&from, PollFlags::IN)], Some(&timeout)).expect("poll");
        assert!(ready > 0, "{what}: only {} of {count} bytes came: {bytes:02x?}", bytes.len());
        let mut buffer = [0; BYTES];
        let most = buffer.len().min(count - bytes.len());
        let got = from.read(&mut buffer[..most]).unwrap_or_else(|error| panic!("{what}: {error}"));
        assert!(got > 0, "{what}: closed after {} of {count} bytes", bytes.len());
        bytes.extend_from_slice(&buffer[..got]);
    }
    bytes
}

/// Tries until the machine, which has just been started, has made what is looked for.
fn patiently<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "{what} does not appear");
        // Nothing tells of it.
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A terminal of the host whose master we hold, and its name.
fn terminal() -> Result<(File, PathBuf), Error> {
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    grantpt(&master)?;
    unlockpt(&master)?;
    let name = ptsname(&master, Vec::new())?;
    Ok((master.into(), PathBuf::from(name.to_str().expect("a name of ASCII"))))
}

/// The user's end of a null modem: the link in `/dev` where we may make it, else that in the machine's directory.
fn null_modem(unit: &str, machine: &str, port: &str) -> File {
    let directories = [
        std::env::var_os("APIARY_RUN").map(PathBuf::from),
        std::env::var_os("XDG_RUNTIME_DIR").map(|run| PathBuf::from(run).join("apiary/vmm")),
        Some(PathBuf::from("/run/apiary/vmm")),
    ];
    let links = directories.into_iter().flatten().map(|directory| directory.join(machine).join(port));
    let places: Vec<PathBuf> =
        std::iter::once(PathBuf::from(format!("/dev/nmdm{unit}B"))).chain(links).collect();
    let place =
        patiently("the null modem", || places.iter().find(|place| fs::symlink_metadata(place).is_ok()));
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(OFlags::NOCTTY.bits() as i32)
        .open(place)
        .unwrap_or_else(|error| panic!("{}: {error}", place.display()))
}

/// Runs a line in the guest and gives what it printed.
fn output(guest: &mut Running, line: &str) -> Result<String, Error> {
    let done = guest.command(line)?;
    assert_eq!(done.status, 0, "{line}: {}", done.output);
    Ok(done.output.trim().to_owned())
}

/// Every byte value goes both ways on all four ports at once: standard input and output, a TCP port, a null modem, a
/// terminal. (com1 carries the commands and, as text, what the others received.)
#[test]
fn four_ports_at_four_kinds_of_backend() -> Result<(), Error> {
    let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|listener| listener.local_addr());
    let address: SocketAddr = free.expect("a free port");
    let unit = format!("test{}", std::process::id());
    let (tty, tty_name) = terminal()?;
    let machine = Machine::new("serial").end(End::Commands).options(&[
        "-l",
        &format!("com2,tcp={address}"),
        "-l",
        &format!("com3,/dev/nmdm{unit}A"),
        "-l",
        &format!("com4,{}", tty_name.display()),
    ]);
    let mut guest = machine.start()?;
    let tcp = patiently("the TCP port", || TcpStream::connect(address).ok());
    let modem = null_modem(&unit, machine.name(), "com3");
    guest.wait_for("apiary: commands")?;

    // Opened once and kept open: opening a port empties its FIFO.
    output(&mut guest, "for n in 1 2 3; do sleep 1000000 <>/dev/ttyS$n >/dev/null 2>&1 & done")?;
    output(&mut guest, "for n in 1 2 3; do stty -F /dev/ttyS$n raw -echo || exit 1; done")?;
    // To the guest, on all before it reads any.
    (&tcp).write_all(&bytes_of(1)).expect("sent to com2");
    (&modem).write_all(&bytes_of(2)).expect("sent to com3");
    (&tty).write_all(&bytes_of(3)).expect("sent to com4");
    for port in 1..=3 {
        let line = format!(
            "head -c {BYTES} /dev/ttyS{port} >/tmp/{port} && hexdump -v -e '1/1 \"%02x\"' /tmp/{port}"
        );
        let wanted: String = bytes_of(port).iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(output(&mut guest, &line)?, wanted, "com{}", port + 1);
    }
    // And back, all at once. Read here meanwhile: `wait` returns when all is sent.
    let readers = [
        std::thread::spawn(move || read_all("com2", &tcp, BYTES)),
        std::thread::spawn(move || read_all("com3", &modem, BYTES)),
        std::thread::spawn(move || read_all("com4", &tty, BYTES)),
    ];
    output(&mut guest, "for n in 1 2 3; do cat /tmp/$n >/dev/ttyS$n & done; wait")?;
    for (port, reader) in (1..).zip(readers) {
        let received = reader.join().expect("a reader");
        assert_eq!(received, bytes_of(port), "com{}", port + 1);
    }
    guest.send("poweroff -f\n")?;
    assert_status(&guest.wait()?, status::POWEROFF);
    Ok(())
}
