//! What the vCPUs of one machine share, and what other threads may do to a vCPU.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread::Thread;
use std::time::Instant;

use engine::{IoHandler, VcpuId};

use crate::area::Area;
use crate::chips::{Attention, Chips, Time};
use crate::cpu::host_tsc;
use crate::memory::MemoryMap;

/// Locks a mutex whatever happened to its last holder: the data are plain values that are never half-written.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Bits of [`VcpuShared::attention`].
pub mod attention {
    /// Look at interrupts, signals and everything else.
    pub const EVENT: u32 = 1 << 0;
    /// Leave [`engine::Vcpu::run`].
    pub const KICK: u32 = 1 << 1;
    /// The memory map changed.
    pub const MAP: u32 = 1 << 2;
    /// Another vCPU wrote to pages of code.
    pub const CODE: u32 = 1 << 3;
}

/// The cross-thread side of one vCPU.
pub struct VcpuShared {
    /// Its registers and tables. Other threads set the attention word and take rights out of the TLB, nothing else.
    pub area: Arc<Area>,
    /// Pages of code that others wrote, by guest-physical address, until it has heard of them.
    changed_code: Mutex<Vec<u64>>,
    /// The thread that runs it, while it may sleep.
    sleeper: Mutex<Option<Thread>>,
    /// It is about to sleep or sleeps.
    sleeping: AtomicBool,
    /// Guest TSC minus host TSC.
    pub tsc_offset: AtomicU64,
    /// Counters, published by the owner now and then.
    pub counters: Mutex<Counters>,
    /// It waits in HLT with interrupts disabled.
    pub dead_halt: AtomicBool,
    /// It has not been started, or waits for SIPI again.
    pub waits_for_sipi: AtomicBool,
}

impl VcpuShared {
    /// For a vCPU that does not exist yet.
    ///
    /// # Errors
    /// The host has no address space to give.
    pub fn new() -> io::Result<Self> {
        Ok(VcpuShared {
            area: Arc::new(Area::new()?),
            changed_code: Mutex::default(),
            sleeper: Mutex::default(),
            sleeping: AtomicBool::new(false),
            tsc_offset: AtomicU64::new(0),
            counters: Mutex::default(),
            dead_halt: AtomicBool::new(false),
            waits_for_sipi: AtomicBool::new(false),
        })
    }

    /// What the vCPU has to look at before its next block: bits of [`attention`].
    pub fn attention(&self) -> &AtomicU32 {
        self.area.attention()
    }

    /// Takes the list of pages of code that others wrote.
    pub fn take_changed_code(&self) -> Vec<u64> {
        std::mem::take(&mut *lock(&self.changed_code))
    }

    /// Sets attention bits and wakes the vCPU if it sleeps.
    pub fn notify(&self, bits: u32) {
        self.attention().fetch_or(bits, Ordering::SeqCst);
        if self.sleeping.load(Ordering::SeqCst)
            && let Some(thread) = lock(&self.sleeper).as_ref()
        {
            thread.unpark();
        }
    }

    /// Sleeps on the calling thread until attention is asked for.
    pub fn sleep(&self) {
        *lock(&self.sleeper) = Some(std::thread::current());
        self.sleeping.store(true, Ordering::SeqCst);
        while self.attention().load(Ordering::SeqCst) == 0 {
            std::thread::park();
        }
        self.sleeping.store(false, Ordering::SeqCst);
    }
}

/// What a vCPU counts. Names in statistics are bhyve's where it has them.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counters {
    /// Instructions that the interpreter executed block by block.
    pub instructions: u64,
    /// Instructions of translated code that the interpreter executed.
    pub handler_calls: u64,
    /// How often an instruction had to be decoded for that.
    pub sites_decoded: u64,
    /// Jumps whose target was not in the table.
    pub target_misses: u64,
    /// Branches that were linked.
    pub links: u64,
    /// Blocks decoded.
    pub blocks_decoded: u64,
    /// Blocks translated.
    pub blocks_translated: u64,
    /// Stores to pages that hold decoded code.
    pub code_writes: u64,
    /// MMIO accesses.
    pub mmio: u64,
    /// IN instructions.
    pub port_in: u64,
    /// OUT instructions.
    pub port_out: u64,
    /// HLT instructions.
    pub halts: u64,
    /// External interrupts delivered.
    pub interrupts: u64,
    /// NMIs delivered.
    pub nmis: u64,
    /// Exceptions delivered.
    pub exceptions: u64,
    /// CPUID instructions.
    pub cpuid: u64,
    /// RDMSR instructions.
    pub rdmsr: u64,
    /// WRMSR instructions.
    pub wrmsr: u64,
    /// Control-register accesses.
    pub control_registers: u64,
    /// TLB flushes.
    pub tlb_flushes: u64,
    /// Blocks that ran both ways.
    pub blocks_compared: u64,
    /// Instructions of these.
    pub instructions_compared: u64,
    /// Comparisons that were made again because there was a difference.
    pub comparisons_repeated: u64,
}

impl Counters {
    /// Name and value of each.
    pub fn list(&self) -> Vec<(String, u64)> {
        let exits = self.mmio
            + self.port_in
            + self.port_out
            + self.halts
            + self.interrupts
            + self.cpuid
            + self.rdmsr
            + self.wrmsr
            + self.control_registers;
        let mut list = vec![
            ("total number of vm exits", exits),
            ("vm exits due to external interrupt", self.interrupts),
            ("number of times hlt was intercepted", self.halts),
            ("number of times in/out was intercepted", self.port_in + self.port_out),
            ("number of times cpuid was intercepted", self.cpuid),
            ("number of times rdmsr was intercepted", self.rdmsr),
            ("number of times wrmsr was intercepted", self.wrmsr),
            ("number of times %cr access was intercepted", self.control_registers),
            ("vm exits for instruction emulation", self.mmio),
            ("vm exits due to exceptions", self.exceptions),
            ("number of NMIs delivered to vcpu", self.nmis),
            ("instructions interpreted", self.instructions + self.handler_calls),
            ("instructions decoded for handlers", self.sites_decoded),
            ("jump targets looked up", self.target_misses),
            ("branches linked", self.links),
            ("blocks decoded", self.blocks_decoded),
            ("blocks translated", self.blocks_translated),
            ("stores to code pages", self.code_writes),
            ("tlb flushes", self.tlb_flushes),
        ];
        if self.blocks_compared != 0 {
            list.extend([
                ("blocks compared", self.blocks_compared),
                ("instructions compared", self.instructions_compared),
                ("instructions run once", self.instructions),
                ("comparisons repeated", self.comparisons_repeated),
            ]);
        }
        list.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
    }
}

/// Where the interrupt chips deliver wake-ups; separate from [`Shared`] because the chips are part of that.
pub struct Doorbells {
    /// One entry a vCPU.
    pub vcpus: Arc<Vec<VcpuShared>>,
}

impl Attention for Doorbells {
    fn attention(&self, vcpu: VcpuId) {
        if let Some(vcpu) = self.vcpus.get(vcpu as usize) {
            vcpu.notify(attention::EVENT);
        }
    }
}

/// Time of the machine: the host's monotonic clock since the machine was made, and the TSC.
pub struct MachineTime {
    start: Instant,
    vcpus: Arc<Vec<VcpuShared>>,
    tsc_hz: u64,
}

impl MachineTime {
    /// Time that starts now.
    pub fn new(vcpus: Arc<Vec<VcpuShared>>) -> Self {
        MachineTime { start: Instant::now(), vcpus, tsc_hz: host_tsc_hz() }
    }
}

impl Time for MachineTime {
    fn now_ns(&self) -> u64 {
        self.start.elapsed().as_nanos() as u64
    }

    fn tsc(&self, vcpu: VcpuId) -> u64 {
        let offset = self.vcpus.get(vcpu as usize).map_or(0, |v| v.tsc_offset.load(Ordering::Relaxed));
        host_tsc().wrapping_add(offset)
    }

    fn tsc_hz(&self) -> u64 {
        self.tsc_hz
    }
}

/// Frequency of the host's TSC, measured once against the monotonic clock.
pub fn host_tsc_hz() -> u64 {
    static HZ: std::sync::OnceLock<u64> = std::sync::OnceLock::new();
    *HZ.get_or_init(|| {
        const MEASURE_NS: u128 = 20_000_000;
        let (start, tsc) = (Instant::now(), host_tsc());
        loop {
            let (elapsed, now) = (start.elapsed().as_nanos(), host_tsc());
            if elapsed >= MEASURE_NS {
                return (u128::from(now - tsc) * 1_000_000_000 / elapsed) as u64;
            }
            std::hint::spin_loop();
        }
    })
}

/// Lets threads run one at a time, in the order in which they ask.
#[derive(Default)]
pub struct Turns {
    queue: Mutex<Queue>,
    /// Another is served.
    next: Condvar,
}

#[derive(Default)]
struct Queue {
    /// The number that the next one gets.
    asked: u64,
    /// Whose turn it is.
    served: u64,
}

impl Turns {
    /// Waits for the calling thread's turn.
    pub fn begin(&self) {
        let mut queue = lock(&self.queue);
        let own = queue.asked;
        queue.asked += 1;
        while queue.served != own {
            queue = self.next.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Ends it.
    pub fn end(&self) {
        lock(&self.queue).served += 1;
        self.next.notify_all();
    }
}

/// One machine as all its vCPUs see it.
pub struct Shared {
    /// The rest of the board.
    pub io: Arc<dyn IoHandler>,
    /// Interrupt chips.
    pub chips: Arc<Chips>,
    /// Per-vCPU parts.
    pub vcpus: Arc<Vec<VcpuShared>>,
    /// RDMSR and WRMSR of unknown registers fault.
    pub strict_msr: bool,
    /// Makes a LOCKed access that spans pages, or goes to a device, one at a time.
    pub split_lock: Mutex<()>,
    /// Makes the marking of a page as one that code depends on, and the taking of store permissions for it, one act.
    pub marking: Mutex<()>,
    /// Makes vCPUs run one at a time, where every block runs both ways.
    pub turns: Turns,
    map: RwLock<Arc<MemoryMap>>,
    /// The TSC offset that vCPUs share unless the guest sets them apart.
    tsc_offset: Mutex<u64>,
}

impl Shared {
    /// A machine without memory.
    pub fn new(
        io: Arc<dyn IoHandler>,
        chips: Arc<Chips>,
        vcpus: Arc<Vec<VcpuShared>>,
        strict_msr: bool,
    ) -> Self {
        // The guest's TSC starts at zero, as at power-on.
        let tsc_offset = Mutex::new(host_tsc().wrapping_neg());
        Shared {
            io,
            chips,
            vcpus,
            strict_msr,
            split_lock: Mutex::new(()),
            marking: Mutex::new(()),
            turns: Turns::default(),
            map: RwLock::default(),
            tsc_offset,
        }
    }

    /// The offset for a vCPU whose TSC is loaded with a value that makes its offset `wanted`. vCPUs are loaded one after
    /// another; those that were saved in step get one offset, so that they stay in step.
    pub fn common_tsc_offset(&self, wanted: u64) -> u64 {
        let mut common = lock(&self.tsc_offset);
        if (wanted.wrapping_sub(*common) as i64).unsigned_abs() >= host_tsc_hz() {
            *common = wanted;
        }
        *common
    }

    /// The current memory map.
    pub fn map(&self) -> Arc<MemoryMap> {
        self.map.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Replaces the memory map by what `change` makes of it and tells every vCPU.
    pub fn change_map<T>(&self, change: impl FnOnce(&mut MemoryMap) -> T) -> T {
        let mut map = self.map.write().unwrap_or_else(PoisonError::into_inner);
        let mut new = MemoryMap::clone(&map);
        let result = change(&mut new);
        *map = Arc::new(new);
        drop(map);
        for vcpu in self.vcpus.iter() {
            vcpu.notify(attention::MAP);
        }
        result
    }

    /// Tells the vCPUs other than `writer` that a page of code was written.
    pub fn tell_code_changed(&self, writer: VcpuId, gpa: u64) {
        for (id, vcpu) in self.vcpus.iter().enumerate() {
            if id as u32 != writer {
                lock(&vcpu.changed_code).push(gpa);
                vcpu.attention().fetch_or(attention::CODE, Ordering::SeqCst);
            }
        }
    }

    /// Whether every vCPU that was started waits in HLT with interrupts disabled, and no NMI, INIT or start-up IPI is on
    /// its way to any. (A vCPU that wakes withdraws its `dead_halt` before it takes its signals.)
    pub fn all_halted(&self) -> bool {
        self.vcpus.iter().enumerate().all(|(id, v)| {
            let waits = v.waits_for_sipi.load(Ordering::SeqCst) || v.dead_halt.load(Ordering::SeqCst);
            waits && !self.chips.has_signals(id as u32)
        })
    }
}
