//! Power cuts: bhyve is killed at random instants while a guest writes and makes stable what it writes; the next start of the guest
//! looks whether all is there that was said to be stable, and goes on.
//!
//! A few rounds each; with `APIARY_POWER_CUTS` in the environment that many.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use guest::{Error, Kernel, Machine};
use rustix::process::Signal;

/// Writers of the guest's program (`tests/guest/powercut.c`).
const WRITERS: usize = 4;
/// The bytes of its device that it uses, and more.
const DEVICE_BYTES: u64 = 4 << 20;

fn rounds() -> u32 {
    std::env::var("APIARY_POWER_CUTS").ok().and_then(|text| text.parse().ok()).unwrap_or(4)
}

/// A sequence that looks random, the same for each run of a test.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}

/// The last number that each writer said after `word`.
fn last_numbers(console: &str, word: &str) -> [u64; WRITERS] {
    let mut numbers = [0; WRITERS];
    // The last line may have been cut off.
    let whole = console.rsplit_once('\n').map_or("", |(whole, _)| whole);
    for line in whole.lines() {
        let mut words = line.split_whitespace();
        if words.next() == Some(word)
            && let (Some(writer), Some(number)) = (words.next(), words.next())
            && let (Ok(writer), Ok(number)) = (writer.parse::<usize>(), number.parse())
        {
            numbers[writer] = number;
        }
    }
    numbers
}

/// What of the guest's disks and how they are attached: `{}` in an option stands for the directory of the images.
struct Setup {
    name: &'static str,
    kernel: Kernel,
    modules: &'static str,
    /// The two disks, as the guest's script calls them.
    disks: [&'static str; 2],
    options: &'static [&'static str],
}

impl Setup {
    fn machine(&self, directory: &Path, words: &[&str]) -> Machine {
        let options: Vec<String> =
            self.options.iter().map(|option| option.replace("{}", &directory.to_string_lossy())).collect();
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        Machine::new(self.name)
            .cpus("1")
            .kernel(self.kernel)
            .words(&format!("apiary.load={}", self.modules))
            .program(words)
            .options(&options)
    }

    /// One life of the guest, which ends with a power cut. Returns what was found of the last life and what has become stable in this.
    fn life(&self, directory: &Path, random: &mut Random) -> Result<[[u64; WRITERS]; 2], Error> {
        let machine = self.machine(directory, &["/lab/powercut.sh", self.disks[0], self.disks[1]]);
        let mut running = machine.start()?;
        running.wait_for("powercut: begin")?;
        let lines = 1 + random.below(300) as usize;
        running.wait_until("records", |new| {
            (new.iter().filter(|b| **b == b'\n').count() > lines).then_some(())
        })?;
        // Any instant: this wait is for nothing, it is the random part.
        std::thread::sleep(Duration::from_micros(random.below(5000)));
        running.signal(Signal::KILL)?;
        let ended = running.wait()?;
        assert_eq!(ended.signal, Some(9), "killed: {}", ended.stderr);
        assert!(!ended.console.contains("is not there"), "{}", ended.console);
        Ok([last_numbers(&ended.console, "found"), last_numbers(&ended.console, "stable")])
    }

    /// `rounds` power cuts, then a look at the file system. `check` looks at the images after each cut.
    fn cut(&self, directory: &Path, check: impl Fn(&Path)) -> Result<(), Error> {
        let mut random = Random(self.name.bytes().map(u64::from).sum());
        let mut stable = [0; WRITERS];
        for round in 0..rounds() {
            let [found, now] = self.life(directory, &mut random)?;
            for writer in 0..WRITERS {
                assert!(
                    found[writer] >= stable[writer],
                    "{}, cut {round}: writer {writer} was told that record {} is stable; {} is the last there",
                    self.name,
                    stable[writer],
                    found[writer]
                );
                stable[writer] = now[writer].max(found[writer]);
            }
            check(directory);
        }
        assert!(stable.iter().all(|number| *number > 0), "every writer has written: {stable:?}");
        Ok(())
    }
}

/// An empty ext4 on a raw image, and a raw image without anything.
fn raw_images(directory: &Path) {
    for (name, bytes) in [("files", 64 << 20), ("device", DEVICE_BYTES)] {
        let file = std::fs::File::create(directory.join(name)).expect("an image");
        file.set_len(bytes).expect("its size");
    }
    run(Command::new("mke2fs").args(["-q", "-t", "ext4"]).arg(directory.join("files")));
}

#[track_caller]
fn run(command: &mut Command) {
    let output = command.output().expect("a program");
    assert!(output.status.success(), "{command:?}: {output:?}");
}

/// The file system recovers by its journal and is whole then. Looked at on a copy: the guest is to recover it itself.
#[track_caller]
fn file_system_recovers(directory: &Path) {
    let image = directory.join("copy");
    run(Command::new("cp").arg("--sparse=always").arg(directory.join("files")).arg(&image));
    // Status 1: the journal was replayed, or something so small was corrected; 4 and more: not.
    let output = Command::new("e2fsck").args(["-f", "-y"]).arg(&image).output().expect("e2fsck");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(matches!(output.status.code(), Some(0 | 1)) && !said.contains("UNEXPECTED"), "e2fsck: {said}");
}

#[test]
fn virtio_blk() -> Result<(), Error> {
    let directory = tempfile::tempdir().expect("a directory");
    raw_images(directory.path());
    let setup = Setup {
        name: "cut-virtio-blk",
        kernel: Kernel::Cloud,
        modules: "virtio_pci,virtio_blk",
        disks: ["vda", "vdb"],
        options: &["-s", "4,virtio-blk,{}/files", "-s", "5,virtio-blk,{}/device,nocache"],
    };
    setup.cut(directory.path(), file_system_recovers)
}

#[test]
fn virtio_blk_on_qcow2() -> Result<(), Error> {
    let directory = tempfile::tempdir().expect("a directory");
    raw_images(directory.path());
    let at = |name: &str| directory.path().join(name);
    // The file system is in the backing file, so that every write copies.
    run(Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"])
        .args([at("files"), at("over")]));
    run(Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(at("qcow2")).arg("4M"));
    let setup = Setup {
        name: "cut-qcow2",
        kernel: Kernel::Cloud,
        modules: "virtio_pci,virtio_blk",
        disks: ["vda", "vdb"],
        options: &["-s", "4,virtio-blk,{}/over", "-s", "5,virtio-blk,{}/qcow2,cache=directsync"],
    };
    setup.cut(directory.path(), |directory| {
        for name in ["over", "qcow2"] {
            // Status 3 says that there are leaks: space that is lost until it is collected, and nothing else.
            let output =
                Command::new("qemu-img").arg("check").arg(directory.join(name)).output().expect("qemu-img");
            assert!(matches!(output.status.code(), Some(0 | 3)), "{name}: {output:?}");
        }
    })
}

#[test]
fn nvme() -> Result<(), Error> {
    let directory = tempfile::tempdir().expect("a directory");
    raw_images(directory.path());
    let setup = Setup {
        name: "cut-nvme",
        kernel: Kernel::Cloud,
        modules: "button",
        disks: ["nvme0n1", "nvme1n1"],
        options: &["-s", "4,nvme,{}/files", "-s", "5,nvme,{}/device,cache=none"],
    };
    setup.cut(directory.path(), file_system_recovers)
}

#[test]
fn ahci() -> Result<(), Error> {
    let directory = tempfile::tempdir().expect("a directory");
    raw_images(directory.path());
    let setup = Setup {
        name: "cut-ahci",
        // The cloud kernel has no AHCI.
        kernel: Kernel::Generic,
        modules: "ahci,sd_mod,crc32c_generic,ext4",
        disks: ["FILES", "DEVICE"],
        options: &["-s", "4,ahci,hd:{}/files,model=FILES,hd:{}/device,model=DEVICE,nocache"],
    };
    setup.cut(directory.path(), file_system_recovers)
}
