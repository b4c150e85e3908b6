//! The machine's disks: opened from a device's variables, looked after (stopped for and tried again when the host fails, told of when they
//! have another size), closed at the end.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use block::{
    CacheMode, Disk, DiskOptions, ErrorPolicy, Format, IoError, Limit, Limits, Rate, Secret, Source,
    TroubleSink,
};
use config::{Node, SettingError, ValueError};
use engine::GuestMemory;

use crate::MachineError;
use crate::clock::Timers;
use crate::lifecycle::Lifecycle;

/// How often a machine that waits for space looks whether there is some.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);
/// How often disks are asked for their size. The kernel tells of a file's size only together with every write to it, and of a
/// block device's not at all.
const SIZE_INTERVAL: Duration = Duration::from_secs(1);

/// The largest disk in memory (`ram=`), in MiB: 16 TiB.
const MAX_RAM_MIB: i64 = 16 << 20;

/// What a disk has met.
struct Trouble {
    disk: String,
    error: IoError,
}

/// The sender that every disk has.
struct Troubles(Mutex<Sender<Trouble>>);

impl TroubleSink for Troubles {
    fn trouble(&self, disk: &str, error: &IoError) {
        let sender = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Nobody listens any more: the machine is at its end.
        let _ = sender.send(Trouble { disk: disk.to_owned(), error: error.clone() });
    }
}

/// A disk, and who is to be told when it has another size.
struct Open {
    disk: Arc<Disk>,
    resized: Vec<Arc<dyn Fn() + Send + Sync>>,
}

/// The disks of a machine.
pub(crate) struct Disks {
    open: Mutex<Vec<Open>>,
    troubles: Arc<Troubles>,
    received: Mutex<Option<Receiver<Trouble>>>,
}

impl Disks {
    pub fn new() -> Arc<Self> {
        let (sender, received) = channel();
        Arc::new(Disks {
            open: Mutex::default(),
            troubles: Arc::new(Troubles(Mutex::new(sender))),
            received: Mutex::new(Some(received)),
        })
    }

    fn open_disks(&self) -> MutexGuard<'_, Vec<Open>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn all(&self) -> Vec<Arc<Disk>> {
        self.open_disks().iter().map(|open| open.disk.clone()).collect()
    }

    /// Has `resized` called when a disk has another size, from then on.
    pub fn on_resize(&self, disk: &Arc<Disk>, resized: impl Fn() + Send + Sync + 'static) {
        if let Some(open) = self.open_disks().iter_mut().find(|open| Arc::ptr_eq(&open.disk, disk)) {
            open.resized.push(Arc::new(resized));
        }
    }

    /// Looks whether disks have another size.
    fn look_at_sizes(&self) {
        let mut tell = Vec::new();
        for open in self.open_disks().iter() {
            if let Some(bytes) = open.disk.refresh_size() {
                tracing::warn!("disk {} has {bytes} bytes now", open.disk.name());
                tell.extend(open.resized.iter().cloned());
            }
        }
        tell.iter().for_each(|resized| resized());
    }

    /// Opens the disk that the variables of `node` describe. `name` is how messages call it, and its threads.
    ///
    /// # Errors
    /// A variable has an impossible value, or the image cannot be used.
    /// `change` has the last word on its options.
    pub fn open(
        &self,
        name: &str,
        node: &Node<'_>,
        memory: &GuestMemory,
        change: impl FnOnce(&mut DiskOptions),
    ) -> Result<Arc<Disk>, MachineError> {
        let (mut options, limits) = (options(name, node)?, limits(node)?);
        if let Some(path) = node.string("keyfile")? {
            let bytes = std::fs::read(&path).map_err(|source| MachineError::KeyFile { path, source })?;
            options.secret = Some(Secret::new(bytes));
        }
        change(&mut options);
        let disk = Arc::new(Disk::open(options, memory.clone(), self.troubles.clone())?);
        disk.set_limits(limits)
            .map_err(MachineError::host("starting the thread that keeps a disk's limits"))?;
        self.open_disks().push(Open { disk: disk.clone(), resized: Vec::new() });
        Ok(disk)
    }

    /// Starts what looks after the disks.
    ///
    /// # Errors
    /// The host refuses the thread.
    pub fn watch(
        self: &Arc<Self>,
        lifecycle: Arc<Lifecycle>,
        timers: Arc<Timers>,
    ) -> Result<Watch, MachineError> {
        let received = self.received.lock().unwrap_or_else(PoisonError::into_inner).take();
        let disks = self.clone();
        let thread = thread::Builder::new()
            .name("disks".into())
            .spawn(move || {
                if let Some(received) = received {
                    disks.look_after(&received, &lifecycle, &timers);
                }
            })
            .map_err(MachineError::host("starting the thread that watches disks"))?;
        Ok(Watch { troubles: self.troubles.clone(), thread: Some(thread) })
    }

    /// The thread: looks for new sizes, and stops the machine when a disk is in trouble. If space is all that is missing it looks
    /// again and again, and lets the machine go on when there is some; other failures wait for somebody who resumes the machine.
    fn look_after(&self, received: &Receiver<Trouble>, lifecycle: &Lifecycle, timers: &Timers) {
        loop {
            let Trouble { disk, error } = match received.recv_timeout(SIZE_INTERVAL) {
                Ok(trouble) => trouble,
                Err(RecvTimeoutError::Disconnected) => return,
                Err(RecvTimeoutError::Timeout) => {
                    self.look_at_sizes();
                    continue;
                }
            };
            // Paused already: then whoever resumes it tries again.
            let stopped = lifecycle.pause(|| timers.stop()).is_ok();
            let space = error == IoError::NoSpace;
            let hint = if space { "it goes on when there is space" } else { "bhyvectl --resume tries again" };
            tracing::error!("disk {disk}: {error}: the machine has stopped; {hint}");
            if stopped && space {
                self.wait_for_space(received, lifecycle, timers);
            }
        }
    }

    fn wait_for_space(&self, received: &Receiver<Trouble>, lifecycle: &Lifecycle, timers: &Timers) {
        loop {
            match received.recv_timeout(RETRY_INTERVAL) {
                // Of the same trouble; the machine runs if somebody has resumed it, and has to stop again.
                Ok(_) => {
                    let _ = lifecycle.pause(|| timers.stop());
                    continue;
                }
                Err(RecvTimeoutError::Disconnected) => return,
                Err(RecvTimeoutError::Timeout) => {}
            }
            let disks = self.all();
            disks.iter().for_each(|disk| disk.retry());
            disks.iter().for_each(|disk| disk.drain());
            match received.try_recv() {
                Ok(_) => continue,
                Err(_) => {
                    // Somebody may have resumed or ended it meanwhile.
                    if lifecycle.resume(|| timers.start()).is_ok() {
                        tracing::info!("the machine goes on");
                    }
                    return;
                }
            }
        }
    }

    /// Tries again what has failed; to be called when the machine is resumed.
    pub fn retry(&self) {
        self.all().iter().for_each(|disk| disk.retry());
    }

    /// The counters of every disk, each name with the disk's before it.
    pub fn stats(&self) -> Vec<(String, u64)> {
        let counters = |disk: &Arc<Disk>| {
            let name = disk.name().to_owned();
            disk.stats().list().into_iter().map(move |(counter, value)| (format!("{name} {counter}"), value))
        };
        self.all().iter().flat_map(counters).collect()
    }

    /// Waits for what is on its way and makes it stable. Errors are told; there is nobody left to act on them.
    pub fn close(&self) {
        for disk in self.all() {
            if let Err(error) = disk.close() {
                tracing::error!("disk {}: making it stable: {error}", disk.name());
            }
        }
        self.open_disks().clear();
    }
}

/// The thread that looks after the disks. Dropping it ends the thread.
pub(crate) struct Watch {
    troubles: Arc<Troubles>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Watch {
    fn drop(&mut self) {
        // A channel without a sender ends the thread.
        let (nobody, _) = channel();
        *self.troubles.0.lock().unwrap_or_else(PoisonError::into_inner) = nobody;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A disk's options from its variables (bhyve_config(5), "Block Device Settings"). Apiary's own are `format`, `cache`, `rerror`
/// and `werror`.
fn options(name: &str, node: &Node<'_>) -> Result<DiskOptions, SettingError> {
    let source = match node.integer("ram", 1..=MAX_RAM_MIB)? {
        Some(mebibytes) => Source::Ram((mebibytes as u64) << 20),
        None => {
            let path = node.required("path")?;
            let remote = path.starts_with("nbd://") || path.starts_with("nbd+unix://");
            if remote { Source::Nbd(path) } else { Source::Path(path.into()) }
        }
    };
    let mut options = DiskOptions::new(source);
    options.format = node.convert("format", format)?;
    options.name = name.to_owned();
    options.read_only = node.boolean("ro", false)?;
    options.discard = !node.boolean("nodelete", false)?;
    options.sectors = node
        .parsed::<config::SectorSize>("sectorsize")?
        .map(|size| block::SectorSize { logical: size.logical, physical: size.physical });
    let synchronous = node.boolean("direct", false)? || node.boolean("sync", false)?;
    let from_flags = match (node.boolean("nocache", false)?, synchronous) {
        (false, false) => CacheMode::Writeback,
        (true, false) => CacheMode::None,
        (false, true) => CacheMode::Writethrough,
        (true, true) => CacheMode::DirectSync,
    };
    options.cache = node.convert("cache", cache_mode)?.unwrap_or(from_flags);
    options.read_errors = node.convert("rerror", error_policy)?.unwrap_or_default();
    options.write_errors = node.convert("werror", error_policy)?.unwrap_or_default();
    Ok(options)
}

/// A disk's limits, each by operations or bytes per second.
fn limits(node: &Node<'_>) -> Result<Limits, SettingError> {
    let rate = |name: &str| -> Result<Option<Rate>, SettingError> {
        let limit = node.convert(name, config::pci::limit)?;
        Ok(limit.map(|(per_second, burst)| match burst {
            Some(burst) => Rate { per_second, burst },
            None => Rate::new(per_second),
        }))
    };
    Ok(Limits {
        read: Limit { operations: rate("riops")?, bytes: rate("rbps")? },
        write: Limit { operations: rate("wiops")?, bytes: rate("wbps")? },
        total: Limit { operations: rate("iops")?, bytes: rate("bps")? },
    })
}

fn format(text: &str) -> Result<Format, ValueError> {
    Format::from_name(text)
        .ok_or_else(|| ValueError::Word { value: text.to_owned(), accepted: "raw, qcow2, vmdk, vhdx, luks" })
}

fn cache_mode(text: &str) -> Result<CacheMode, ValueError> {
    match text {
        "writeback" => Ok(CacheMode::Writeback),
        "none" => Ok(CacheMode::None),
        "writethrough" => Ok(CacheMode::Writethrough),
        "directsync" => Ok(CacheMode::DirectSync),
        _ => Err(ValueError::Word {
            value: text.to_owned(),
            accepted: "writeback, none, writethrough, directsync",
        }),
    }
}

fn error_policy(text: &str) -> Result<ErrorPolicy, ValueError> {
    match text {
        "stop" => Ok(ErrorPolicy::Stop),
        "report" => Ok(ErrorPolicy::Report),
        "ignore" => Ok(ErrorPolicy::Ignore),
        _ => Err(ValueError::Word { value: text.to_owned(), accepted: "stop, report, ignore" }),
    }
}
