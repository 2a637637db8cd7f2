//! Guest memory as KVM memory slots, some of which are registered while the guest already runs.
//!
//! KVM_SET_USER_MEMORY_REGION takes time: without two-dimensional paging the kernel allocates a reverse map
//! for every page of the slot (40 MB for 16 GiB), which takes 7 to 70 ms. A restored guest needs almost none of
//! its memory for its first instructions. So the ranges that are known to hold something are registered first.
//! A separate thread registers the other slots after the vCPUs were started.
//!
//! When the guest accesses RAM whose slot is not registered yet, KVM finds no memory slot and exits with
//! KVM_EXIT_MMIO. This module then registers the slot and does the access itself, on the guest's memory. The
//! guest sees no difference. This works for data only, so the caller's first ranges must contain every page
//! that is not zero. The guest's page tables and its code are then among them. (A page table walk that meets
//! a missing slot ends in a page fault, and a table of zeros means a page fault anyway.) If KVM cannot emulate
//! an instruction while a slot is missing, all slots are registered and the instruction is tried once more.
//!
//! An MMIO exit at RAM whose slot was registered before the vCPU was entered has another cause: hosts that
//! emulate guest instructions report a page that cannot be read in this way.
#![allow(unsafe_code)]

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::error::{KvmError, NameCall};
use crate::slot_layout::{Slot, split};
use crate::written::WriteLog;

/// The memory slots of a guest. A slot's number is its index in `slots`.
pub(crate) struct MemorySlots {
    vm: Arc<VmFd>,
    /// The mappings that the slots refer to.
    memory: Arc<GuestMemoryMmap>,
    /// By rising address, without gaps inside a region.
    slots: Vec<Slot>,
    states: Mutex<Vec<SlotState>>,
    registered: Condvar,
    /// Number of slots that are registered so far.
    registered_count: AtomicU64,
    /// Guest accesses that were done here because their slot was registered late.
    late_accesses: AtomicU64,
    /// What this process writes. If it records, KVM records writes, too.
    writes: WriteLog,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SlotState {
    Pending,
    InProgress,
    /// With the value of `registered_count` after it was registered.
    Registered(u64),
}

/// What a vCPU may rely on: the slots up to this count were registered before its KVM_RUN.
#[derive(Clone, Copy)]
pub(crate) struct RegisteredMark(u64);

/// The meaning of an MMIO exit.
pub(crate) enum MmioAt {
    /// RAM whose slot was registered after the vCPU was entered.
    LateRam,
    /// RAM whose slot was registered before the vCPU was entered.
    RegisteredRam,
    /// No RAM there.
    Outside,
}

/// Guest memory has the secrets of the guest, and gigabytes. Where the kernel has no core dumps it does not know the
/// advice, and nothing is to do.
fn keep_out_of_core_dumps(memory: &GuestMemoryMmap) {
    for region in memory.iter() {
        // SAFETY: the advice changes no bytes of the mapping, which exists as long as `memory`.
        unsafe {
            libc::madvise(region.as_ptr().cast(), region.len() as usize, libc::MADV_DONTDUMP);
        }
    }
}

impl MemorySlots {
    /// Registers the slots of `first`, widened to 2 MiB; all slots when `first` is `None`.
    pub(crate) fn register_first(
        vm: Arc<VmFd>,
        memory: Arc<GuestMemoryMmap>,
        first: Option<&[Range<u64>]>,
        writes: WriteLog,
    ) -> Result<MemorySlots, KvmError> {
        keep_out_of_core_dumps(&memory);
        let regions: Vec<Slot> = memory
            .iter()
            .map(|region| Slot {
                gpa: region.start_addr().0,
                len: region.len(),
                host_addr: region.as_ptr() as u64,
            })
            .collect();
        let (slots, is_first) = match first {
            None => (regions.clone(), vec![true; regions.len()]),
            Some(first) => split(&regions, first),
        };
        let memory_slots = MemorySlots {
            vm,
            memory,
            states: Mutex::new(vec![SlotState::Pending; slots.len()]),
            slots,
            registered: Condvar::new(),
            registered_count: AtomicU64::new(0),
            late_accesses: AtomicU64::new(0),
            writes,
        };
        for (slot, _) in is_first.iter().enumerate().filter(|(_, first)| **first) {
            memory_slots.register(slot)?;
        }
        Ok(memory_slots)
    }

    pub(crate) fn memory(&self) -> &Arc<GuestMemoryMmap> {
        &self.memory
    }

    pub(crate) fn late_accesses(&self) -> u64 {
        self.late_accesses.load(Ordering::Relaxed)
    }

    /// The number of registered slots. The caller takes it before KVM_RUN.
    pub(crate) fn mark(&self) -> RegisteredMark {
        RegisteredMark(self.registered_count.load(Ordering::SeqCst))
    }

    pub(crate) fn is_complete(&self, mark: RegisteredMark) -> bool {
        mark.0 == self.slots.len() as u64
    }

    /// Registers all slots that are missing.
    pub(crate) fn register_all(&self) -> Result<(), KvmError> {
        (0..self.slots.len()).try_for_each(|slot| self.register(slot))
    }

    /// Returns what is at `gpa`. If it is RAM, its slot is registered after this call.
    pub(crate) fn mmio_at(&self, gpa: u64, mark: RegisteredMark) -> Result<MmioAt, KvmError> {
        let after = self.slots.partition_point(|slot| slot.gpa <= gpa);
        let Some(slot) = after.checked_sub(1) else {
            return Ok(MmioAt::Outside);
        };
        if gpa - self.slots[slot].gpa >= self.slots[slot].len {
            return Ok(MmioAt::Outside);
        }
        self.register(slot)?;
        match self.lock()[slot] {
            SlotState::Registered(count) if count <= mark.0 => Ok(MmioAt::RegisteredRam),
            _ => {
                self.late_accesses.fetch_add(1, Ordering::Relaxed);
                Ok(MmioAt::LateRam)
            }
        }
    }

    /// Reads guest memory as the kernel would for the guest: see [`MemorySlots::copy`].
    pub(crate) fn read(&self, gpa: u64, data: &mut [u8]) -> io::Result<()> {
        // SAFETY: `data` is valid for writes of its length, and nothing else refers to it.
        unsafe { self.copy(gpa, data.as_mut_ptr(), data.len(), libc::process_vm_readv) }
    }

    /// Writes guest memory as the kernel would for the guest: see [`MemorySlots::copy`].
    pub(crate) fn write(&self, gpa: u64, data: &[u8]) -> io::Result<()> {
        self.writes.note(gpa..gpa.saturating_add(data.len() as u64));
        // SAFETY: `data` is valid for reads of its length, and process_vm_writev only reads it.
        unsafe { self.copy(gpa, data.as_ptr().cast_mut(), data.len(), libc::process_vm_writev) }
    }

    /// The pages that were written to since they were taken last, as ascending ranges of guest physical addresses. `None`
    /// if they are not recorded. No vCPU may run.
    pub(crate) fn written(&self) -> Result<Option<Vec<Range<u64>>>, KvmError> {
        if !self.writes.is_recording() {
            return Ok(None);
        }
        // A slot that is registered after this has no writes yet.
        let registered: Vec<usize> = {
            let states = self.lock();
            let is_registered = |slot: &usize| matches!(states[*slot], SlotState::Registered(_));
            (0..self.slots.len()).filter(is_registered).collect()
        };
        for number in registered {
            let slot = &self.slots[number];
            let log = self.vm.get_dirty_log(number as u32, slot.len as usize);
            // KVM forgets what it returns.
            self.writes.note_bitmap(slot.gpa, &log.call("KVM_GET_DIRTY_LOG")?);
        }
        Ok(self.writes.ranges())
    }

    /// As [`MemorySlots::written`], and forgets them.
    pub(crate) fn take_written(&self) -> Result<Option<Vec<Range<u64>>>, KvmError> {
        let written = self.written()?;
        self.writes.take();
        Ok(written)
    }

    /// Registers one slot, or waits until the thread that registers it has finished.
    fn register(&self, slot: usize) -> Result<(), KvmError> {
        {
            let mut states = self.lock();
            while states[slot] == SlotState::InProgress {
                states = self.registered.wait(states).unwrap_or_else(PoisonError::into_inner);
            }
            if states[slot] != SlotState::Pending {
                return Ok(());
            }
            states[slot] = SlotState::InProgress;
        }
        // Not under the lock, so that a vCPU never waits for a slot that it does not need.
        let result = self.set_region(slot);
        let mut states = self.lock();
        states[slot] = match result {
            Ok(()) => {
                SlotState::Registered(self.registered_count.fetch_add(1, Ordering::SeqCst) + 1)
            }
            Err(_) => SlotState::Pending,
        };
        self.registered.notify_all();
        result
    }

    fn set_region(&self, slot: usize) -> Result<(), KvmError> {
        let range = &self.slots[slot];
        let region = kvm_userspace_memory_region {
            // `split` keeps the number of slots far below 2^16.
            slot: slot as u32,
            flags: if self.writes.is_recording() { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
            guest_phys_addr: range.gpa,
            memory_size: range.len,
            userspace_addr: range.host_addr,
        };
        // SAFETY: the host range is part of a region of `self.memory`, which lives at least as long as
        // `self.vm`'s vCPUs can run (the machine drops them first), no Rust reference ever points
        // into it, and the slots do not overlap.
        unsafe { self.vm.set_user_memory_region(region) }.call("KVM_SET_USER_MEMORY_REGION")
    }

    /// Copies at most a page between guest memory and `data`. It uses a system call, not loads and
    /// stores: so a page that cannot be read is an error and not a SIGBUS, and no Rust access
    /// races with the guest's.
    ///
    /// # Safety
    /// `data` must be valid for what `call` does with its first argument over `len` bytes.
    unsafe fn copy(&self, gpa: u64, data: *mut u8, len: usize, call: ProcessVm) -> io::Result<()> {
        let end = gpa.checked_add(len as u64);
        let slot = self
            .slots
            .iter()
            .find(|p| p.gpa <= gpa && end.is_some_and(|end| end <= p.gpa + p.len))
            .ok_or_else(|| io::Error::from_raw_os_error(libc::EFAULT))?;
        let local = libc::iovec { iov_base: data.cast(), iov_len: len };
        let remote = libc::iovec {
            iov_base: (slot.host_addr + (gpa - slot.gpa)) as *mut libc::c_void,
            iov_len: len,
        };
        // SAFETY: no preconditions.
        let pid = unsafe { libc::getpid() };
        // SAFETY: `local` is valid by this function's contract; `remote` lies inside guest memory,
        // which no Rust reference points into, and is checked by the kernel.
        let copied = unsafe { call(pid, &raw const local, 1, &raw const remote, 1, 0) };
        match usize::try_from(copied) {
            Ok(copied) if copied == len => Ok(()),
            Ok(_) => Err(io::Error::from_raw_os_error(libc::EFAULT)),
            Err(_) => Err(io::Error::last_os_error()),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<SlotState>> {
        self.states.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

type ProcessVm = unsafe extern "C" fn(
    libc::pid_t,
    *const libc::iovec,
    libc::c_ulong,
    *const libc::iovec,
    libc::c_ulong,
    libc::c_ulong,
) -> libc::ssize_t;

/// The thread that registers the remaining slots. Dropping this stops and joins the thread.
pub(crate) struct LateRegistration {
    cancelled: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl LateRegistration {
    /// `None` when all slots are registered. `on_error` is called when KVM refuses a slot.
    pub(crate) fn start(
        memory_slots: Arc<MemorySlots>,
        on_error: impl FnOnce(KvmError) + Send + 'static,
    ) -> io::Result<Option<LateRegistration>> {
        if memory_slots.is_complete(memory_slots.mark()) {
            return Ok(None);
        }
        let cancelled = Arc::new(AtomicBool::new(false));
        let stop = Arc::clone(&cancelled);
        let register_rest = move || {
            for slot in 0..memory_slots.slots.len() {
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                if let Err(error) = memory_slots.register(slot) {
                    return on_error(error);
                }
            }
        };
        let thread = std::thread::Builder::new().name("memslots".into()).spawn(register_rest)?;
        Ok(Some(LateRegistration { cancelled, thread: Some(thread) }))
    }
}

impl Drop for LateRegistration {
    fn drop(&mut self) {
        self.cancelled.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // Nothing in it panics.
            let _ = thread.join();
        }
    }
}
