//! The few pieces of the KVM API (Linux `Documentation/virt/kvm/api.rst`) that `kvm-ioctls` does not offer: an
//! ioeventfd of a given width without a value, the statistics descriptor, and a view of `struct kvm_run` that
//! stays usable while `VcpuFd` is borrowed.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};

use engine::{Doorbell, DoorbellAddress, Result};
use kvm_bindings::{
    KVM_INTERNAL_ERROR_DELIVERY_EV, KVM_INTERNAL_ERROR_EMULATION,
    KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES, KVM_INTERNAL_ERROR_SIMUL_EX,
    KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON, KVMIO, kvm_ioeventfd, kvm_ioeventfd_flag_nr_datamatch,
    kvm_ioeventfd_flag_nr_deassign, kvm_ioeventfd_flag_nr_pio, kvm_run,
};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::{ioctl, ioctl_with_ref};
use vmm_sys_util::{ioctl_io_nr, ioctl_iow_nr};

use crate::error::last_os_error;

ioctl_iow_nr!(KVM_IOEVENTFD, KVMIO, 0x79, kvm_ioeventfd);
ioctl_io_nr!(KVM_GET_STATS_FD, KVMIO, 0xce);

/// Connects or disconnects a doorbell (api.rst §4.59).
pub(crate) fn ioeventfd(vm: &impl AsRawFd, doorbell: Doorbell, event: &EventFd, connect: bool) -> Result<()> {
    let (addr, pio) = match doorbell.address {
        DoorbellAddress::Port(port) => (u64::from(port), true),
        DoorbellAddress::Mmio(gpa) => (gpa, false),
    };
    let mut flags = 0;
    if pio {
        flags |= 1 << kvm_ioeventfd_flag_nr_pio;
    }
    if doorbell.value.is_some() {
        flags |= 1 << kvm_ioeventfd_flag_nr_datamatch;
    }
    if !connect {
        flags |= 1 << kvm_ioeventfd_flag_nr_deassign;
    }
    let request = kvm_ioeventfd {
        datamatch: doorbell.value.unwrap_or(0),
        addr,
        len: doorbell.len,
        fd: event.as_raw_fd(),
        flags,
        ..Default::default()
    };
    // SAFETY: the descriptor is a VM's, and the kernel only reads the structure, which outlives the call.
    let answer = unsafe { ioctl_with_ref(vm, KVM_IOEVENTFD(), &request) };
    if answer != 0 {
        return Err(last_os_error(if connect {
            "connecting a doorbell"
        } else {
            "disconnecting a doorbell"
        }));
    }
    Ok(())
}

/// The binary statistics of a VM or a vCPU (api.rst §4.134); `None` where the kernel has none (before 5.14).
pub(crate) fn stats_fd(of: &impl AsRawFd) -> Option<File> {
    // SAFETY: the ioctl takes no argument; it returns a new descriptor or an error.
    let fd: RawFd = unsafe { ioctl(of, KVM_GET_STATS_FD()) };
    // SAFETY: a descriptor that the kernel just returned belongs to us alone.
    (fd >= 0).then(|| unsafe { File::from_raw_fd(fd) })
}

/// A mapping of a vCPU's `struct kvm_run`, separate from the one inside `VcpuFd`, so that another thread can ask
/// for an immediate exit and the exit's details can be read while `VcpuFd::run`'s borrow lives.
#[derive(Debug)]
pub(crate) struct RunPage {
    run: NonNull<kvm_run>,
    len_bytes: usize,
}

// SAFETY: the mapping is process-wide memory; what is shared between threads is one byte, accessed atomically.
unsafe impl Send for RunPage {}
// SAFETY: as above; every other field is read on the vCPU's own thread, between runs.
unsafe impl Sync for RunPage {}

impl RunPage {
    /// Maps the run structure of a vCPU. `len_bytes` is the VM's `run_size`.
    pub(crate) fn map(vcpu: &impl AsRawFd, len_bytes: usize) -> Result<RunPage> {
        debug_assert!(len_bytes >= size_of::<kvm_run>());
        // SAFETY: a fresh mapping at an address the kernel chooses overlaps nothing of ours.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len_bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                vcpu.as_raw_fd(),
                0,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(last_os_error("mapping a vCPU's run structure"));
        }
        match NonNull::new(address.cast()) {
            Some(run) => Ok(RunPage { run, len_bytes }),
            None => Err(last_os_error("mapping a vCPU's run structure")),
        }
    }

    /// Makes the next (or current, if a signal follows) KVM_RUN return at once, or takes that back.
    pub(crate) fn set_immediate_exit(&self, value: bool) {
        // SAFETY: the byte lies in our mapping, which lives as long as `self`; all our accesses are atomic.
        let flag = unsafe { AtomicU8::from_ptr(&raw mut (*self.run.as_ptr()).immediate_exit) };
        flag.store(value.into(), Ordering::SeqCst);
    }

    /// Bytes per element of the port access that KVM_RUN just returned with.
    pub(crate) fn io_element_bytes(&self) -> usize {
        // SAFETY: the mapping is live and the kernel has filled this member for KVM_EXIT_IO; any bits are valid.
        usize::from(unsafe { (*self.run.as_ptr()).__bindgen_anon_1.io.size })
    }

    /// What KVM says about an internal error it just returned with.
    pub(crate) fn internal_error(&self) -> String {
        // SAFETY: the mapping is live; the member is plain integers, for which any bits are valid.
        let internal = unsafe { (*self.run.as_ptr()).__bindgen_anon_1.internal };
        let words = (internal.ndata as usize).min(internal.data.len());
        let data = &internal.data[..words];
        match internal.suberror {
            KVM_INTERNAL_ERROR_EMULATION => {
                let mut text = "KVM could not emulate an instruction".to_owned();
                // The flag word comes first; then length and bytes of the instruction (api.rst "emulation_failure").
                let has_bytes = data
                    .first()
                    .is_some_and(|f| f & u64::from(KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES) != 0);
                if has_bytes && data.len() >= 3 {
                    let raw: Vec<u8> = data[1..].iter().flat_map(|word| word.to_le_bytes()).collect();
                    let len = usize::from(raw[0]).min(15).min(raw.len() - 1);
                    text.push(':');
                    for byte in &raw[1..=len] {
                        text.push_str(&format!(" {byte:02x}"));
                    }
                }
                text
            }
            KVM_INTERNAL_ERROR_SIMUL_EX => {
                format!("KVM met an exception while it delivered another (details {data:#x?})")
            }
            KVM_INTERNAL_ERROR_DELIVERY_EV => {
                format!("KVM could not finish delivering an event (details {data:#x?})")
            }
            KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => {
                format!("the processor left the guest for a reason KVM does not know (details {data:#x?})")
            }
            other => format!("KVM internal error {other} (details {data:#x?})"),
        }
    }
}

impl Drop for RunPage {
    fn drop(&mut self) {
        // SAFETY: the range is exactly the one that `map` got, and no reference into it is left.
        unsafe { libc::munmap(self.run.as_ptr().cast(), self.len_bytes) };
    }
}
