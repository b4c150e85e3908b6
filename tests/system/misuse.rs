//! Wrong uses: exit status 4, one line that helps, and nothing left behind.

use std::process::Output;
use std::sync::atomic::{AtomicU32, Ordering};

use guest::{Kernel, Places, program};

use crate::{listed, status};

/// Runs bhyve with these options before a machine's name, and gives the line that it said.
#[track_caller]
fn refused(options: &[&str]) -> String {
    // One that no other test has at this moment.
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let name = format!("misuse-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
    let mut arguments = options.to_vec();
    arguments.push(&name);
    let output = program("bhyve", &arguments);
    let line = one_line(&output);
    assert_eq!(output.status.code(), Some(status::ERROR), "{options:?}: {line}");
    assert!(!listed(&name), "{options:?} leaves a machine behind");
    line
}

#[track_caller]
fn one_line(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(!text.contains("panicked"), "{text}");
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines.len(), 1, "one line, not: {text}");
    lines[0].to_owned()
}

/// The options of a machine that would start.
fn good(kernel: &str) -> Vec<&str> {
    vec!["-s", "0:0,hostbridge", "-s", "1:0,lpc", "-l", "com1,stdio", "--kernel", kernel]
}

/// Asserts that the line names the part that is wrong.
#[track_caller]
fn assert_names(line: &str, parts: &[&str]) {
    for part in parts {
        assert!(line.contains(part), "{part:?} is not in: {line}");
    }
}

#[test]
fn impossible_sizes() {
    let kernel = Places::default().kernel(Kernel::Cloud).display().to_string();
    let with = |options: &[&'static str]| refused(&[options, good(&kernel).as_slice()].concat());
    assert_names(&with(&["-m", "100T"]), &["100 TiB", "-m"]);
    assert_names(&with(&["-m", "lots"]), &["-m", "lots"]);
    assert_names(&with(&["-c", "0"]), &["-c", "0"]);
    assert_names(&with(&["-c", "2,sockets=3"]), &["-c", "sockets=3"]);
}

#[test]
fn impossible_devices() {
    let kernel = Places::default().kernel(Kernel::Cloud).display().to_string();
    let with = |options: &[&'static str]| refused(&[good(&kernel).as_slice(), options].concat());
    assert_names(&with(&["-s", "32,lpc"]), &["-s", "32,lpc"]);
    assert_names(&with(&["-s", "3,nosuch"]), &["nosuch"]);
    assert_names(&with(&["-l", "com2,/nonexistent/tty"]), &["/nonexistent/tty"]);
    assert_names(&with(&["-l", "com9,stdio"]), &["com9"]);
}

#[test]
fn impossible_kernels() {
    assert_names(&refused(&good("/nonexistent/kernel")), &["/nonexistent/kernel"]);

    let whole = std::fs::read(Places::default().kernel(Kernel::Cloud)).expect("`make guests` was run");
    let directory = std::env::temp_dir().join(format!("apiary-misuse-{}", std::process::id()));
    std::fs::create_dir_all(&directory).expect("a directory for the broken kernels");
    for (name, content) in
        [("truncated", &whole[..whole.len() / 2]), ("header", &whole[..0x210]), ("empty", &[])]
    {
        let path = directory.join(name);
        std::fs::write(&path, content).expect("a broken kernel");
        let path = path.display().to_string();
        assert_names(&refused(&good(&path)), &[&path]);
    }
    std::fs::remove_dir_all(&directory).expect("the broken kernels can be removed");
}

#[test]
fn impossible_disks() {
    let kernel = Places::default().kernel(Kernel::Cloud).display().to_string();
    let directory = tempfile::tempdir().expect("a directory");
    let at = |name: &str| directory.path().join(name).display().to_string();
    for (name, len) in [("empty", 0), ("part", 1000), ("good", 4096)] {
        let file = std::fs::File::create(at(name)).expect("an image");
        file.set_len(len).expect("its size");
    }
    // A header that says qcow2, and nothing behind it.
    std::fs::write(at("lies"), [&b"QFI\xfb\0\0\0\x03"[..], &[0xff; 504]].concat()).expect("an image");
    for device in ["virtio-blk", "nvme"] {
        let with = |image: &str| {
            let slot = format!("4,{device},{image}");
            refused(&[good(&kernel).as_slice(), &["-s", &slot]].concat())
        };
        assert_names(&with(&at("none")), &[&at("none"), "does not exist"]);
        assert_names(&with(&at("")), &["directory"]);
        assert_names(&with(&at("empty")), &[&at("empty"), "is empty"]);
        assert_names(&with(&at("part")), &[&at("part"), "1000", "512"]);
        assert_names(&with(&at("lies")), &[&at("lies"), "qcow2"]);
        assert_names(&with(&format!("{},sectorsize=513", at("good"))), &["513"]);
        assert_names(&with(&format!("{},cache=fast", at("good"))), &["fast", "writeback"]);
        assert_names(&with(&format!("{},werror=panic", at("good"))), &["panic", "report"]);
        assert_names(&with(&format!("{},iops=0", at("good"))), &["iops"]);
        assert_names(&with(&format!("{},format=floppy", at("good"))), &["floppy", "qcow2"]);
        assert_names(&with(&format!("{},format=luks", at("good"))), &["keyfile"]);
        assert_names(
            &with(&format!("{},format=luks,keyfile={}", at("good"), at("none"))),
            &["keyfile", &at("none")],
        );
    }
    // Past the command line's own checks.
    let slot = format!("4,nvme,{}", at("good"));
    let line = refused(&[good(&kernel).as_slice(), &["-s", &slot, "-o", "pci.0.4.0.sectsz=1000"]].concat());
    assert_names(&line, &["sectsz", "1000", "4096"]);
    let twice = format!("4,virtio-blk,{}", at("good"));
    let again = format!("5,nvme,{}", at("good"));
    let line = refused(&[good(&kernel).as_slice(), &["-s", &twice, "-s", &again]].concat());
    assert_names(&line, &[&at("good"), "in use"]);
}
