//! The NBD client against qemu-nbd, and against servers that lie.

use std::path::Path;
use std::process::{Child, Command, Stdio};

use super::*;
use crate::testing::{disk_read, disk_write, have_qemu, open, read, request, write};
use crate::{DiskOptions, ErrorPolicy, IoError, Operation, Source};

#[test]
fn urls() {
    let parse = |url: &str| Address::parse(url).map(|address| (address.server, address.export));
    let tcp = |host: &str, port| Server::Tcp(host.to_owned(), port);
    assert_eq!(parse("nbd://h"), Ok((tcp("h", 10809), String::new())));
    assert_eq!(parse("nbd://h:1/a%20b/c"), Ok((tcp("h", 1), "a b/c".into())));
    assert_eq!(parse("nbd://[::1]:7/x"), Ok((tcp("::1", 7), "x".into())));
    assert_eq!(parse("nbd://[fe80::1]/"), Ok((tcp("fe80::1", 10809), String::new())));
    assert_eq!(parse("nbd+unix:///e?socket=/a%3Fb"), Ok((Server::Unix("/a?b".into()), "e".into())));
    assert_eq!(parse("nbd+unix://?x=y&socket=/s"), Ok((Server::Unix("/s".into()), String::new())));
    for wrong in [
        "x",
        "http://h/",
        "nbd://h:x/",
        "nbd://[::1",
        "nbd+unix:///e",
        "nbd://h/%zz",
        "nbd://h/%f",
        "nbds://h/",
    ] {
        assert!(parse(wrong).is_err(), "{wrong}");
    }
}

/// qemu-nbd with a raw image of a mebibyte.
struct Serving {
    child: Child,
    directory: tempfile::TempDir,
}

impl Serving {
    fn start(arguments: &[&str]) -> Serving {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("image"), vec![0x11; 1 << 20]).unwrap();
        Serving { child: Serving::run(directory.path(), arguments), directory }
    }

    fn run(directory: &Path, arguments: &[&str]) -> Child {
        let mut child = Command::new("qemu-nbd")
            .args(["-f", "raw", "-t", "-x", "the disk", "--discard=unmap", "-k"])
            .args([directory.join("socket"), directory.join("image")])
            .args(arguments)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        // It does not say when it is ready.
        for _ in 0..1_000_000 {
            if UnixStream::connect(directory.join("socket")).is_ok() {
                return child;
            }
            assert!(child.try_wait().unwrap().is_none(), "qemu-nbd has ended");
            thread::yield_now();
        }
        panic!("qemu-nbd does not listen");
    }

    fn stop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        let _ = std::fs::remove_file(self.directory.path().join("socket"));
    }

    fn url(&self) -> String {
        format!("nbd+unix:///the%20disk?socket={}", self.directory.path().join("socket").display())
    }

    fn contents(&self) -> Vec<u8> {
        std::fs::read(self.directory.path().join("image")).unwrap()
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn options(url: String) -> DiskOptions {
    DiskOptions {
        read_errors: ErrorPolicy::Report,
        write_errors: ErrorPolicy::Report,
        ..DiskOptions::new(Source::Nbd(url))
    }
}

#[test]
fn a_disk_of_qemu_nbd() {
    if !have_qemu() {
        return;
    }
    let serving = Serving::start(&["-e", "8"]);
    let disk = open(options(serving.url())).unwrap();
    assert_eq!(disk.info().size_bytes, 1 << 20);
    assert_eq!(disk_read(&disk, 512, 1024).unwrap(), [0x11; 1024]);
    disk_write(&disk, 512, &[0x22; 1024]).unwrap();
    request(&disk, Operation::Write { fua: true }, 4096, 512, vec![0x33; 512]).unwrap();
    request(&disk, Operation::WriteZeroes { unmap: false, fua: true }, 8192, 4096, vec![]).unwrap();
    request(&disk, Operation::WriteZeroes { unmap: true, fua: false }, 16384, 4096, vec![]).unwrap();
    request(&disk, Operation::Discard, 65536, 65536, vec![]).unwrap();
    request(&disk, Operation::Flush, 0, 0, vec![]).unwrap();
    assert_eq!(
        disk_read(&disk, 0, 8192).unwrap()[..2048],
        [[0x11; 512], [0x22; 512], [0x22; 512], [0x11; 512]].concat()
    );
    let contents = serving.contents();
    assert_eq!(contents[512..1536], [0x22; 1024]);
    assert_eq!(contents[4096..4608], [0x33; 512]);
    assert!([8192, 16384].iter().all(|at| contents[*at..at + 4096] == [0; 4096]));
    assert_eq!(disk_read(&disk, 65536, 65536).unwrap(), contents[65536..131_072]);
    disk.close().unwrap();
}

#[test]
fn many_threads_and_long_requests() {
    if !have_qemu() {
        return;
    }
    let mut serving = Serving::start(&["-e", "8"]);
    serving.stop();
    std::fs::File::create(serving.directory.path().join("image")).unwrap().set_len(16 << 20).unwrap();
    serving.child = Serving::run(serving.directory.path(), &["-e", "8"]);
    let image = NbdImage::open(&serving.url(), true).unwrap();
    thread::scope(|scope| {
        for index in 0..8u8 {
            let image = &image;
            scope.spawn(move || {
                let bytes: Vec<u8> = (0..100 * 512).map(|at| (at / 512) as u8 ^ index).collect();
                for round in 0..10 {
                    let offset = u64::from(index) * (1 << 20) + round * 65536;
                    write(image, offset, &bytes);
                    assert!(read(image, offset, bytes.len()) == bytes);
                }
            });
        }
    });
    let long: Vec<u8> = (0..5_000_192).map(|at| (at / 1000) as u8).collect();
    write(&image, 8 << 20, &long);
    assert!(read(&image, 8 << 20, long.len()) == long);
    image.flush().unwrap();
    assert!(serving.contents()[8 << 20..][..long.len()] == long);
}

#[test]
fn a_server_that_goes_and_comes_back() {
    if !have_qemu() {
        return;
    }
    let mut serving = Serving::start(&["-e", "8"]);
    let disk = open(options(serving.url())).unwrap();
    disk_write(&disk, 0, &[0x44; 512]).unwrap();
    serving.stop();
    assert!(matches!(disk_read(&disk, 0, 512), Err(IoError::Host(_))));
    assert!(matches!(disk_write(&disk, 0, &[1; 512]), Err(IoError::Host(_))));
    serving.child = Serving::run(serving.directory.path(), &["-e", "8"]);
    assert_eq!(disk_read(&disk, 0, 512).unwrap(), [0x44; 512]);
    let lost = request(&disk, Operation::Flush, 0, 0, vec![]);
    assert!(lost.is_err_and(|error| error.to_string().contains("may be lost")));
    request(&disk, Operation::Flush, 0, 0, vec![]).unwrap();
}

#[test]
fn what_cannot_be_used_is_refused_in_one_line() {
    let refusal = |url: &str, read_only| {
        let Err(error) = open(DiskOptions { read_only, ..options(url.to_owned()) }) else { panic!("{url}") };
        error.to_string()
    };
    assert!(refusal("nbd+unix:///?socket=/nowhere", true).contains("is it running"));
    assert!(refusal("nbd:x", true).contains("the URL of an NBD disk is"));
    if !have_qemu() {
        return;
    }
    let serving = Serving::start(&["-r", "-e", "8"]);
    assert!(refusal(&serving.url(), false).contains("read-only"));
    let other = serving.url().replace("the%20disk", "another");
    assert!(refusal(&other, true).contains("no export named \"another\""));
    let disk = open(DiskOptions { read_only: true, ..options(serving.url()) }).unwrap();
    assert_eq!(disk_read(&disk, 0, 512).unwrap(), [0x11; 512]);
}

/// A server that sends whatever it likes: opening or reading fails, and that is all.
#[test]
fn lying_servers() {
    let go = |answers: &[u8]| {
        let mut bytes = b"NBDMAGICIHAVEOPT\0\x03".to_vec();
        bytes.extend(answers);
        bytes
    };
    let answer = |kind: u32, data: &[u8]| {
        let mut bytes = bits::ANSWER_MAGIC.to_be_bytes().to_vec();
        bytes.extend(bits::OPTION_GO.to_be_bytes());
        bytes.extend(kind.to_be_bytes());
        bytes.extend((data.len() as u32).to_be_bytes());
        bytes.extend(data);
        bytes
    };
    let export = answer(3, &[0, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0, 1]);
    let ready = [export.clone(), answer(1, &[])].concat();
    let mut long = answer(3, &[]);
    long[16..20].copy_from_slice(&[0xff; 4]);
    let scripts = [
        vec![],
        b"NBDMAGIC".to_vec(),
        b"NBDMAGIC\0\0\x42\x02\x81\x86\x12\x53\0\0\0\0\0\0\0\0".to_vec(),
        b"NBDMAGICIHAVEOPT\0\0".to_vec(),
        go(&[0; 20]),
        go(&answer(1, &[])),
        go(&long),
        go(&answer(3, &[])),
        go(&answer(0x8000_0005, &[])),
        go(&answer(3, &[0, 3, 0, 0, 0, 3, 0, 0, 0, 3, 0, 0, 0, 3])),
        go(&[&ready[..], &[0; 16]].concat()),
        go(&[&ready[..], &bits::REPLY_MAGIC.to_be_bytes(), &[0; 12]].concat()),
        go(&[&ready[..], &bits::REPLY_MAGIC.to_be_bytes(), &[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 2, 3]]
            .concat()),
    ];
    let directory = tempfile::tempdir().unwrap();
    for (number, script) in scripts.into_iter().enumerate() {
        let path = directory.path().join(number.to_string());
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        thread::scope(|scope| {
            scope.spawn(move || {
                let (mut stream, _) = listener.accept().unwrap();
                let _ = stream.write_all(&script);
                let _ = stream.shutdown(Shutdown::Write);
                let _ = stream.read_to_end(&mut vec![]);
            });
            if let Ok(image) = NbdImage::open(&format!("nbd+unix:///?socket={}", path.display()), false) {
                let mut bytes = [0; 512];
                assert!(image.read(0, &[VolatileSlice::from(&mut bytes[..])]).is_err(), "script {number}");
            }
        });
    }
}
