//! Giving guest memory to KVM, part of it while the guest already runs.
//!
//! KVM_SET_USER_MEMORY_REGION is not free: without two-dimensional paging the kernel allocates a reverse
//! map for every page of the slot, 40 MB for 16 GiB, and takes 7 to 70 ms for it. A restored guest
//! needs almost none of its memory for its first instructions. So the ranges that are known to hold
//! something are plugged first, and the rest in pieces by a thread of their own, after the vCPUs
//! were started.
//!
//! When the guest touches RAM that is not plugged yet, KVM finds no memory slot and exits with
//! KVM_EXIT_MMIO. Such an access is done here, on the guest's memory, after its piece was plugged; the
//! guest notices nothing. This works for data only, which is why the caller's first ranges must hold
//! every page that is not zero: the guest's page tables (a walk that meets a missing slot ends in a
//! page fault; a table of zeros means a page fault anyway) and its code are then among them. If KVM
//! gives up on an instruction while something is unplugged, all is plugged and it is tried once more.
//!
//! An MMIO exit at RAM that was plugged before the vCPU was entered is a different thing: on hosts that
//! emulate guest instructions, this is how a page that cannot be read looks.
#![allow(unsafe_code)]

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::error::{KvmError, NameCall};
use crate::pieces::{Piece, split};

/// Guest memory as KVM memory slots; slot number = index into `pieces`.
pub(crate) struct Memslots {
    vm: Arc<VmFd>,
    /// Keeps the mappings that the slots refer to.
    memory: Arc<GuestMemoryMmap>,
    /// By rising address, without gaps inside a region.
    pieces: Vec<Piece>,
    states: Mutex<Vec<PieceState>>,
    plugged: Condvar,
    /// Number of pieces plugged so far.
    plugged_count: AtomicU64,
    /// Guest accesses that were done here because their memory came late.
    late_accesses: AtomicU64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PieceState {
    Pending,
    InProgress,
    /// With the value of `plugged_count` after it.
    Plugged(u64),
}

/// What a vCPU may rely on: pieces plugged up to here were there before its KVM_RUN.
#[derive(Clone, Copy)]
pub(crate) struct PluggedMark(u64);

/// What an MMIO exit means.
pub(crate) enum MmioAt {
    /// RAM whose slot came only after the vCPU was entered; it is plugged now.
    LateRam,
    /// RAM whose slot was there all the time.
    PluggedRam,
    /// No RAM there.
    Outside,
}

impl Memslots {
    /// Plugs the 2 MiB-aligned hull of `first`, or everything when that is `None`.
    pub(crate) fn plug_first(
        vm: Arc<VmFd>,
        memory: Arc<GuestMemoryMmap>,
        first: Option<&[Range<u64>]>,
    ) -> Result<Memslots, KvmError> {
        let regions: Vec<Piece> = memory
            .iter()
            .map(|region| Piece {
                gpa: region.start_addr().0,
                len: region.len(),
                host_addr: region.as_ptr() as u64,
            })
            .collect();
        let (pieces, is_first) = match first {
            None => (regions.clone(), vec![true; regions.len()]),
            Some(first) => split(&regions, first),
        };
        let memslots = Memslots {
            vm,
            memory,
            states: Mutex::new(vec![PieceState::Pending; pieces.len()]),
            pieces,
            plugged: Condvar::new(),
            plugged_count: AtomicU64::new(0),
            late_accesses: AtomicU64::new(0),
        };
        for (slot, _) in is_first.iter().enumerate().filter(|(_, first)| **first) {
            memslots.plug(slot)?;
        }
        Ok(memslots)
    }

    pub(crate) fn memory(&self) -> &Arc<GuestMemoryMmap> {
        &self.memory
    }

    pub(crate) fn late_accesses(&self) -> u64 {
        self.late_accesses.load(Ordering::Relaxed)
    }

    /// To be taken before KVM_RUN.
    pub(crate) fn mark(&self) -> PluggedMark {
        PluggedMark(self.plugged_count.load(Ordering::SeqCst))
    }

    pub(crate) fn is_complete(&self, mark: PluggedMark) -> bool {
        mark.0 == self.pieces.len() as u64
    }

    /// Plugs all that is left.
    pub(crate) fn plug_all(&self) -> Result<(), KvmError> {
        (0..self.pieces.len()).try_for_each(|slot| self.plug(slot))
    }

    /// Says what lies at `gpa`, and plugs it if it is RAM.
    pub(crate) fn mmio_at(&self, gpa: u64, mark: PluggedMark) -> Result<MmioAt, KvmError> {
        let after = self.pieces.partition_point(|piece| piece.gpa <= gpa);
        let Some(slot) = after.checked_sub(1) else {
            return Ok(MmioAt::Outside);
        };
        if gpa - self.pieces[slot].gpa >= self.pieces[slot].len {
            return Ok(MmioAt::Outside);
        }
        self.plug(slot)?;
        match self.lock()[slot] {
            PieceState::Plugged(count) if count <= mark.0 => Ok(MmioAt::PluggedRam),
            _ => {
                self.late_accesses.fetch_add(1, Ordering::Relaxed);
                Ok(MmioAt::LateRam)
            }
        }
    }

    /// Reads guest memory as the kernel would for the guest: see [`Memslots::copy`].
    pub(crate) fn read(&self, gpa: u64, data: &mut [u8]) -> io::Result<()> {
        // SAFETY: `data` is valid for writes of its length, and nothing else refers to it.
        unsafe { self.copy(gpa, data.as_mut_ptr(), data.len(), libc::process_vm_readv) }
    }

    /// Writes guest memory as the kernel would for the guest: see [`Memslots::copy`].
    pub(crate) fn write(&self, gpa: u64, data: &[u8]) -> io::Result<()> {
        // SAFETY: `data` is valid for reads of its length, and process_vm_writev only reads it.
        unsafe { self.copy(gpa, data.as_ptr().cast_mut(), data.len(), libc::process_vm_writev) }
    }

    /// Plugs one piece, or waits until the thread that is doing so has finished.
    fn plug(&self, slot: usize) -> Result<(), KvmError> {
        {
            let mut states = self.lock();
            while states[slot] == PieceState::InProgress {
                states = self.plugged.wait(states).unwrap_or_else(PoisonError::into_inner);
            }
            if states[slot] != PieceState::Pending {
                return Ok(());
            }
            states[slot] = PieceState::InProgress;
        }
        // Not under the lock, so that a vCPU never waits for a piece it does not need.
        let result = self.set_region(slot);
        let mut states = self.lock();
        states[slot] = match result {
            Ok(()) => PieceState::Plugged(self.plugged_count.fetch_add(1, Ordering::SeqCst) + 1),
            Err(_) => PieceState::Pending,
        };
        self.plugged.notify_all();
        result
    }

    fn set_region(&self, slot: usize) -> Result<(), KvmError> {
        let piece = &self.pieces[slot];
        let region = kvm_userspace_memory_region {
            // `split` keeps the number of pieces far below 2^16.
            slot: slot as u32,
            flags: 0,
            guest_phys_addr: piece.gpa,
            memory_size: piece.len,
            userspace_addr: piece.host_addr,
        };
        // SAFETY: the host range is part of a region of `self.memory`, which lives at least as long as
        // `self.vm`'s vCPUs can run (the machine drops them first), no Rust reference ever points
        // into it, and the pieces do not overlap.
        unsafe { self.vm.set_user_memory_region(region) }.call("KVM_SET_USER_MEMORY_REGION")
    }

    /// Copies at most a page between guest memory and `data`, by a system call rather than by loads
    /// and stores: a page that cannot be read is then an error and not a SIGBUS, and no Rust access
    /// races with the guest's.
    ///
    /// # Safety
    /// `data` must be valid for what `call` does with its first argument over `len` bytes.
    unsafe fn copy(&self, gpa: u64, data: *mut u8, len: usize, call: ProcessVm) -> io::Result<()> {
        let end = gpa.checked_add(len as u64);
        let piece = self
            .pieces
            .iter()
            .find(|p| p.gpa <= gpa && end.is_some_and(|end| end <= p.gpa + p.len))
            .ok_or_else(|| io::Error::from_raw_os_error(libc::EFAULT))?;
        let local = libc::iovec { iov_base: data.cast(), iov_len: len };
        let remote = libc::iovec {
            iov_base: (piece.host_addr + (gpa - piece.gpa)) as *mut libc::c_void,
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

    fn lock(&self) -> MutexGuard<'_, Vec<PieceState>> {
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

/// Plugs what is left, in a thread of its own; dropping it stops and joins the thread.
pub(crate) struct LatePlugger {
    cancelled: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl LatePlugger {
    /// `None` when nothing is left to plug. `on_error` is called when KVM refuses a piece.
    pub(crate) fn start(
        memslots: Arc<Memslots>,
        on_error: impl FnOnce(KvmError) + Send + 'static,
    ) -> io::Result<Option<LatePlugger>> {
        if memslots.is_complete(memslots.mark()) {
            return Ok(None);
        }
        let cancelled = Arc::new(AtomicBool::new(false));
        let stop = Arc::clone(&cancelled);
        let plug_rest = move || {
            for slot in 0..memslots.pieces.len() {
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                if let Err(error) = memslots.plug(slot) {
                    return on_error(error);
                }
            }
        };
        let thread = std::thread::Builder::new().name("memslots".into()).spawn(plug_rest)?;
        Ok(Some(LatePlugger { cancelled, thread: Some(thread) }))
    }
}

impl Drop for LatePlugger {
    fn drop(&mut self) {
        self.cancelled.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // Nothing in it panics.
            let _ = thread.join();
        }
    }
}
