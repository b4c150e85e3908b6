//! The memory that one vCPU's generated code addresses relative to GS: registers, what the run loop tells the code, the TLB
//! and the table of known jump targets, in one mapping with a fixed layout.
//!
//! Only the vCPU's own thread uses it, but for two things that other threads may do: set [`Front::attention`], and take
//! store permissions out of the TLB.

use std::io;
use std::mem::offset_of;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;

use crate::tlb::{PRIVILEGES, Privilege, Tables};
use crate::translate::cache::Epoch;
use crate::translate::spans::MAX_SPANS;
use crate::translate::targets::Targets;
use crate::user::UserRegs;

/// What generated code and the run loop exchange. Plain words, because generated code reads and writes them.
#[repr(C)]
pub struct RunState {
    /// RIP of the first byte of the page that the running code lies in.
    pub page: u64,
    /// A value that one instruction keeps over a second memory access.
    pub temporary: u64,
    /// Where an indirect branch goes once its other effects are done.
    pub destination: u64,
    /// Where translated code goes on after Rust code ran.
    pub resume: u64,
    /// Stack pointer of Rust code, while translated code has its own stack.
    pub host_stack: u64,
    /// Stack pointer of translated code, while Rust code runs.
    pub shadow_stack: u64,
    /// Where its stack begins.
    pub shadow_top: u64,
    /// The [`crate::cpu::Cpu`], for calls from generated code.
    pub cpu: u64,
    /// MXCSR of Rust code.
    pub host_mxcsr: u32,
    /// 1 while the guest's x87 state is in the host's registers, or was when Rust code was called.
    pub x87_live: u32,
    /// 1 while the guest's vector registers are, in system code.
    pub vectors_live: u32,
    /// Numbers of the present mapping of code: of all pages, of global pages. A branch from page to page holds while the
    /// number is the one it was linked for.
    pub epochs: [u32; 2],
    /// The branch that translated code was left through, if it can be linked; else [`NO_LINK`].
    pub link: u32,
    /// Host addresses of the running block's spans.
    pub spans: [u64; MAX_SPANS],
}

/// No branch.
pub const NO_LINK: u32 = u32::MAX;

/// The part of the mapping that is not tables.
#[repr(C, align(4096))]
pub struct Front {
    /// Registers.
    pub user: UserRegs,
    /// The run loop's words.
    pub run: RunState,
    /// What the vCPU has to look at; see [`crate::shared::attention`].
    pub attention: AtomicU32,
}

/// Numbers of mappings that may be used up between two looks at whether there are more.
const EPOCHS_IN_RESERVE: u32 = 1 << 16;

/// Bytes of a stack of translated code: return addresses of guest code and of host code in pairs.
const SHADOW_BYTES: usize = 64 << 10;

/// A stack of translated code. It grows into the guard, which faults, and then begins anew.
#[repr(C, align(4096))]
pub struct Shadow {
    guard: [u8; 4096],
    words: [u64; SHADOW_BYTES / 8],
    /// What is found where nothing has been pushed: an address to return to, and a RIP.
    bottom: [u64; 512],
}

/// The whole mapping.
#[repr(C)]
pub struct Layout {
    /// Registers and words.
    pub front: Front,
    /// Return addresses, for each privilege.
    pub shadows: [Shadow; PRIVILEGES.len()],
    /// TLB.
    pub tlb: Tables,
    /// Known targets of jumps.
    pub targets: Targets,
}

/// Offset of a register from GS.
pub const fn gpr_offset(number: usize) -> i32 {
    (offset_of!(Layout, front) + offset_of!(Front, user) + offset_of!(UserRegs, gpr) + 8 * number) as i32
}

/// Offset of a field of [`UserRegs`] from GS.
macro_rules! user_offset {
    ($field:ident) => {
        (std::mem::offset_of!($crate::area::Layout, front)
            + std::mem::offset_of!($crate::area::Front, user)
            + std::mem::offset_of!($crate::user::UserRegs, $field)) as i32
    };
}
pub(crate) use user_offset;

/// Offset of a field of [`RunState`] from GS.
macro_rules! run_offset {
    ($field:ident) => {
        (std::mem::offset_of!($crate::area::Layout, front)
            + std::mem::offset_of!($crate::area::Front, run)
            + std::mem::offset_of!($crate::area::RunState, $field)) as i32
    };
}
pub(crate) use run_offset;

/// Offset of the attention word from GS.
pub const ATTENTION_OFFSET: i32 = (offset_of!(Layout, front) + offset_of!(Front, attention)) as i32;

/// One vCPU's mapping.
pub struct Area {
    base: NonNull<Layout>,
}

// SAFETY: a mapping is not tied to a thread; what may be touched by which thread is said at each method.
unsafe impl Send for Area {}
// SAFETY: as above.
unsafe impl Sync for Area {}

impl Area {
    /// A fresh one: registers as after power-on, nothing in the tables. Untouched pages of the tables take no memory.
    ///
    /// # Errors
    /// The host has no address space to give.
    pub fn new() -> io::Result<Self> {
        let len = size_of::<Layout>();
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no existing memory.
        let base = unsafe {
            libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast::<Layout>()).ok_or(io::ErrorKind::OutOfMemory)?;
        let area = Area { base };
        // SAFETY: the mapping is large enough, aligned to a page, and nobody else knows it. Zeroes are valid for all but the
        // registers and the first entries of the tables.
        unsafe { std::ptr::write(&raw mut (*base.as_ptr()).front.user, UserRegs::default()) };
        area.tlb().init();
        for number in 0..PRIVILEGES.len() {
            // SAFETY: a field of the mapping that no reference leads to.
            let guard = unsafe { &raw mut (*base.as_ptr()).shadows[number].guard };
            // SAFETY: whole pages of the mapping.
            if unsafe { libc::mprotect(guard.cast(), size_of::<[u8; 4096]>(), libc::PROT_NONE) } != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(area)
    }

    /// The base address, which GS has while generated code runs.
    pub fn base(&self) -> u64 {
        self.base.as_ptr() as u64
    }

    /// The attention word.
    pub fn attention(&self) -> &AtomicU32 {
        // SAFETY: an atomic inside the mapping, which lives as long as `self`.
        unsafe { &(*self.base.as_ptr()).front.attention }
    }

    /// The TLB.
    pub fn tlb(&self) -> &Tables {
        // SAFETY: all of its fields are atomics inside the mapping.
        unsafe { &(*self.base.as_ptr()).tlb }
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new` and belongs to this value.
        unsafe { libc::munmap(self.base.as_ptr().cast(), size_of::<Layout>()) };
    }
}

/// A RIP that leaving for is what a return to it does: there is nothing to be tried first.
pub const SOME_RIP: u64 = 0;

/// The owning vCPU's access to its registers.
pub struct Owner {
    area: Arc<Area>,
    /// For each privilege, how far its stack of translated code is filled: the stack pointer.
    shadow_stacks: [u64; PRIVILEGES.len()],
    /// They were emptied since one was selected.
    returns_forgotten: bool,
}

impl Owner {
    /// Takes possession.
    ///
    /// # Safety
    /// Only one owner exists at a time for an area.
    pub unsafe fn new(area: Arc<Area>) -> Self {
        let mut owner = Owner { area, shadow_stacks: [0; PRIVILEGES.len()], returns_forgotten: false };
        owner.forget_returns();
        owner
    }

    /// The mapping.
    pub fn area(&self) -> &Area {
        &self.area
    }

    /// The run loop's words.
    pub fn run(&mut self) -> &mut RunState {
        // SAFETY: only the owner touches them, and it is borrowed.
        unsafe { &mut (*self.area.base.as_ptr()).front.run }
    }

    /// The mapping that a branch can be linked for: until it ends, pages of code stay where they are.
    pub fn epoch(&mut self, global: bool) -> Epoch {
        let index = usize::from(global);
        let offset = run_offset!(epochs) + size_of::<u32>() as i32 * index as i32;
        Epoch { offset, number: self.run().epochs[index] }
    }

    /// The mapping of code changes; that of global pages only if not `keep_global`.
    pub fn end_epoch(&mut self, keep_global: bool) {
        let epochs = &mut self.run().epochs;
        epochs[0] = epochs[0].saturating_add(1);
        if !keep_global {
            epochs[1] = epochs[1].saturating_add(1);
        }
        self.forget_returns();
    }

    /// Whether [`Owner::end_epoch`] is about to run out of numbers.
    pub fn epochs_are_used_up(&mut self) -> bool {
        self.run().epochs.iter().any(|number| *number >= u32::MAX - EPOCHS_IN_RESERVE)
    }

    /// Where a stack of translated code begins.
    fn shadow_top(&self, privilege: Privilege) -> u64 {
        // SAFETY: a field of the mapping; its address is taken, no reference made.
        let bottom = unsafe { &raw const (*self.area.base.as_ptr()).shadows[privilege as usize].bottom };
        bottom as u64
    }

    /// Sets where a return leads when nothing is on the stack of translated code: to `nowhere`, if it is one to either of two
    /// RIPs ([`SOME_RIP`]).
    pub fn prepare_returns(&mut self, privilege: Privilege, nowhere: u64, rips: [u64; 2]) {
        // SAFETY: only the owner touches it, and it is borrowed.
        let bottom = unsafe { &mut (*self.area.base.as_ptr()).shadows[privilege as usize].bottom };
        // A return that is not the top pair's looks at the next one too.
        bottom[..4].copy_from_slice(&[nowhere, rips[0], nowhere, rips[1]]);
    }

    /// Makes the stack of a privilege that of the code that is about to run.
    pub fn select_returns(&mut self, privilege: Privilege) {
        let (top, stack) = (self.shadow_top(privilege), self.shadow_stacks[privilege as usize]);
        self.returns_forgotten = false;
        let run = self.run();
        run.shadow_top = top;
        run.shadow_stack = stack;
    }

    /// Keeps what is on the stack of the code that just ran.
    pub fn keep_returns(&mut self, privilege: Privilege) {
        if !self.returns_forgotten {
            let top = self.shadow_top(privilege);
            self.shadow_stacks[privilege as usize] = self.run().shadow_stack.min(top);
        }
    }

    /// Whether the stacks were emptied while Rust code ran for translated code, which then has to be left.
    pub fn are_returns_forgotten(&self) -> bool {
        self.returns_forgotten
    }

    /// Empties the stacks: their host addresses are not to be returned to.
    pub fn forget_returns(&mut self) {
        self.returns_forgotten = true;
        for privilege in PRIVILEGES {
            self.shadow_stacks[privilege as usize] = self.shadow_top(privilege);
        }
    }

    /// The table of jump targets.
    pub fn targets(&mut self) -> &mut Targets {
        // SAFETY: only the owner touches it, and it is borrowed.
        unsafe { &mut (*self.area.base.as_ptr()).targets }
    }
}

impl Deref for Owner {
    type Target = UserRegs;

    #[inline(always)]
    fn deref(&self) -> &UserRegs {
        // SAFETY: only the owner touches the registers, and it is borrowed.
        unsafe { &(*self.area.base.as_ptr()).front.user }
    }
}

impl DerefMut for Owner {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut UserRegs {
        // SAFETY: as above, borrowed exclusively.
        unsafe { &mut (*self.area.base.as_ptr()).front.user }
    }
}
