//! A Debian on a disk, started from each controller: to its login prompt, and down again with nothing lost.

use std::path::Path;
use std::process::Command;

use guest::{End, Error, Kernel, Machine, Places, Root};

use crate::{assert_status, status};

/// A copy of the disk that `lab/disk` has made.
fn copy_of_debian(to: &Path) {
    let from = Places::default().debian_disk();
    // Holes stay holes: a disk is a few gigabytes of which a third is there.
    let copied = Command::new("cp").arg("--sparse=always").arg(from).arg(to).status();
    assert!(copied.is_ok_and(|status| status.success()), "copying the disk");
}

#[track_caller]
fn assert_clean(image: &Path) {
    let output = Command::new("e2fsck").args(["-f", "-n"]).arg(image).output().expect("e2fsck");
    let said = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "e2fsck of the disk after a clean shutdown: {said}");
}

/// Starts the Debian with a device (`{}` is its image), logs in, writes and reads back, and shuts down.
fn debian(name: &str, device: &str, options: &[&str]) -> Result<(), Error> {
    let directory = tempfile::tempdir().expect("a directory");
    let image = directory.path().join("disk");
    copy_of_debian(&image);
    let device = format!("4,{}", device.replace("{}", &image.to_string_lossy()));
    let mut running = Machine::new(name)
        .kernel(Kernel::Disk)
        .root(Root::Disk)
        .memory("1G")
        .words("root=LABEL=apiary")
        .options(&["-s", &device])
        .options(options)
        .start()?;
    running.wait_for("apiary login: ")?;
    running.send("root\n")?;
    running.wait_for("# ")?;
    // What is typed comes back; the answers are what the commands make of it.
    running.send("dd if=/dev/urandom of=big bs=1M count=20 status=none; sync; sha256sum <big >sum\n")?;
    running.send("echo 3 >/proc/sys/vm/drop_caches; [ \"$(sha256sum <big)\" = \"$(cat sum)\" ] && echo sum-$((40+2))\n")?;
    running.wait_for("sum-42")?;
    running.send("systemctl is-system-running --wait | sed s/^/state-/; poweroff\n")?;
    running.wait_for("state-running")?;
    let ended = running.wait()?;
    assert_status(&ended, status::POWEROFF);
    assert_clean(&image);
    Ok(())
}

#[test]
fn debian_on_virtio_blk() -> Result<(), Error> {
    debian("disk-virtio-blk", "virtio-blk,{}", &[])
}

#[test]
fn debian_on_virtio_blk_with_msi_past_the_page_cache() -> Result<(), Error> {
    debian("disk-virtio-msi", "virtio-blk,{},nocache,sectorsize=512/4096", &["-W"])
}

#[test]
fn debian_on_nvme() -> Result<(), Error> {
    debian("disk-nvme", "nvme,{},ser=SN42", &[])
}

#[test]
fn debian_on_ahci() -> Result<(), Error> {
    debian("disk-ahci", "ahci-hd,{},ser=SN43", &[])
}

/// A file system in memory, which can be made larger. Unmounted when dropped.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn new(size: &str) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let disk = SmallDisk(directory);
        disk.mount(&format!("size={size}"));
        disk
    }

    fn mount(&self, options: &str) {
        let mut command = Command::new("mount");
        command.args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(self.0.path());
        assert!(command.status().is_ok_and(|status| status.success()), "{command:?}");
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0.path()).status();
    }
}

/// A sparse image on a full host: the machine stops, and goes on when there is space; the guest notices nothing.
#[test]
fn a_machine_waits_for_space() -> Result<(), Error> {
    for (name, device, modules, disk) in [
        ("full-virtio-blk", "virtio-blk", "virtio_pci,virtio_blk", "vda"),
        ("full-nvme", "nvme", "button", "nvme0n1"),
    ] {
        let host = SmallDisk::new("8M");
        let image = host.0.path().join("image");
        let file = std::fs::File::create(&image).expect("an image");
        file.set_len(32 << 20).expect("its size");
        let slot = format!("4,{device},{}", image.display());
        let mut running = Machine::new(name)
            .words(&format!("apiary.load={modules}"))
            .program(&["dd", "if=/dev/urandom", &format!("of=/dev/{disk}"), "bs=64k", "count=400"])
            .program(&["dd", &format!("if=/dev/{disk}"), "of=/dev/null", "bs=64k"])
            .options(&["-s", &slot])
            .start()?;
        running.wait_for_notice("no space left on the host: the machine has stopped")?;
        let status = guest::program("bhyvectl", &["--list"]);
        let list = String::from_utf8_lossy(&status.stdout).into_owned();
        let line = list.lines().find(|line| line.contains(running.name())).unwrap_or_default();
        assert!(line.contains("paused"), "{list}");
        host.mount("remount,size=64M");
        let ended = running.wait()?;
        assert_status(&ended, status::POWEROFF);
        let well = ended.console.lines().filter(|line| line.trim_end() == "apiary: status: 0").count();
        assert_eq!(well, 2, "{}", ended.console);
        assert!(std::fs::metadata(&image).expect("the image").len() == 32 << 20);
    }
    Ok(())
}

/// An image that is made larger while the guest runs: the guest sees it at once.
#[test]
fn a_guest_sees_its_disk_grow() -> Result<(), Error> {
    for (name, device, modules, disk) in [
        ("grow-virtio-blk", "virtio-blk", "virtio_pci,virtio_blk", "vda"),
        ("grow-nvme", "nvme", "button", "nvme0n1"),
    ] {
        let directory = tempfile::tempdir().expect("a directory");
        let image = directory.path().join("image");
        let file = std::fs::File::create(&image).expect("an image");
        file.set_len(8 << 20).expect("its size");
        let mut running = Machine::new(name)
            .words(&format!("apiary.load={modules}"))
            .end(End::Commands)
            .options(&["-s", &format!("4,{device},{}", image.display())])
            .start()?;
        running.wait_for("apiary: commands")?;
        let size = format!("cat /sys/block/{disk}/size");
        assert_eq!(running.command(&size)?.output.trim(), "16384");
        file.set_len(24 << 20).expect("its size");
        let seen = running.command(&format!("until [ \"$({size})\" = 49152 ]; do sleep 0.05; done"))?;
        assert_eq!(seen.status, 0);
        let end = format!("dd if=/dev/zero of=/dev/{disk} bs=1M seek=23 count=1 conv=notrunc");
        assert_eq!(running.command(&end)?.status, 0, "what is new can be written");
        running.send("poweroff -f\n")?;
        assert_status(&running.wait()?, status::POWEROFF);
    }
    Ok(())
}
