//! A model checker: all interleavings of writes, the sweep, loads, removals, failed saves and resets, on two pages.
//!
//! The kernel, the guest's threads and the threads of this crate are small state machines ([`world`], [`threads`],
//! [`saver`]). Each step of one of them is an access to memory, a system call, or what is done while a lock is held. The
//! rules by which states change are the real ones: [`Phase`](super::phase::Phase) and [`CutState`](super::states::CutState).
//! Every state that results is explored once.
//!
//! Checked: each save that has not failed has the memory of its cut, as a whole file and as changes on the one before.
//! At the end no thread waits.

mod saver;
mod setup;
mod threads;
mod world;

use std::collections::HashSet;
use std::panic::{self, AssertUnwindSafe};

use setup::{Bug, Op, Setup};
use world::World;

/// Explores all states. Returns their number.
fn explore(setup: &Setup) -> usize {
    let start = World::new(setup);
    let mut seen = HashSet::from([start.clone()]);
    let mut left = vec![start];
    while let Some(world) = left.pop() {
        let next = world.next(setup);
        assert!(!next.is_empty() || world.is_done(), "a thread waits forever: {world:?}");
        for world in next {
            if seen.insert(world.clone()) {
                left.push(world);
            }
        }
    }
    seen.len()
}

const WRITES: &[&[Op]] = &[&[Op::Write(0), Op::Write(1)], &[Op::Write(0)]];
/// With a pager, another thread of the guest would mean 20 times as many states, and shows no more mistakes.
const FEW_WRITES: &[&[Op]] = &[&[Op::Write(0), Op::Write(1)]];
const REMOVES: &[&[Op]] = &[&[Op::Remove(0), Op::Write(0), Op::Write(1)]];

fn setups() -> impl Iterator<Item = Setup> {
    let flags = |bits: u32| [1, 2, 4, 8].map(|bit| bits & bit != 0);
    // If each block has one page, copies are always short.
    (0..16).filter(|bits| bits & 12 != 8).flat_map(move |bits| {
        let [tracks, paged, one_block, short] = flags(bits);
        let guests = if paged { FEW_WRITES } else { WRITES };
        let setup = Setup { tracks, paged, one_block, short, guests, bug: None };
        let removes = (paged && one_block).then_some(Setup { guests: REMOVES, ..setup });
        [Some(setup), removes].into_iter().flatten()
    })
}

#[test]
fn every_interleaving_saves_the_memory_of_its_cut() {
    let worlds: usize = setups().map(|setup| explore(&setup)).sum();
    println!("{worlds} worlds");
    assert!(worlds > 100_000, "{worlds}: something is not explored");
}

/// Each mistake is found in a setup at least. The messages of the panics are those of the searches.
#[test]
fn every_mistake_is_found() {
    for bug in [
        Bug::WriteBeforeCopy,
        Bug::WriteBeforeRead,
        Bug::ClaimedIsSaved,
        Bug::UnnotedWrite,
        Bug::UnnotedLoad,
        Bug::LoadInCut,
        Bug::CutDuringCopy,
        Bug::ForgottenFailure,
        Bug::ResetInWindow,
        Bug::UnseenRemoval,
        Bug::ProtectedAtEnd,
        Bug::StaleAnswer,
    ] {
        let found = setups().any(|setup| {
            let setup = Setup { bug: Some(bug), ..setup };
            panic::catch_unwind(AssertUnwindSafe(|| explore(&setup))).is_err()
        });
        assert!(found, "{bug:?} is not found");
    }
}
