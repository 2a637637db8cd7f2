//! Faults of a guest whose snapshot is in a bucket.

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use pager::Populate;
use snapfmt::{ReadAt, Snapshot};
use support::fake::{Fate, depth, times_sent};
use support::guest::Guest;
use support::{Bench, KEY};

/// 64 MiB, of which the first answers contain 256 KiB in front and 1 MiB at the end.
const PAGES: usize = 16 << 10;
/// Pages of a block of the cache.
const BLOCK: usize = 64;

/// The pages in the middle of blocks that are not cached after opening.
fn far(count: usize) -> Vec<usize> {
    let blocks = (8..PAGES / BLOCK - 8).map(|block| block * BLOCK + BLOCK / 2);
    // Not one after the other: that would be read ahead.
    let far: Vec<usize> = (0..7).flat_map(|start| blocks.clone().skip(start).step_by(7)).collect();
    far[..count].to_vec()
}

fn snapshot(bench: &Bench) -> Arc<Snapshot> {
    let opened = Arc::new(bench.open().snapshot);
    bench.fake.take_received();
    opened
}

#[test]
fn faults_of_one_slice_wait_together() {
    let bench = Bench::start(PAGES, Duration::from_millis(100));
    let snapshot = snapshot(&bench);
    let name = "faults_of_one_slice_wait_together";
    let Some(guest) = Guest::start(name, &snapshot, 1, Populate::Off) else { return };
    // The first look-up of each part of the index takes no request: the last MiB is there.
    guest.check_all(&bench.memory, &far(64), 16);
    let received = bench.fake.take_received();
    assert!(bench.fake.most_concurrent() >= 12, "{}", bench.fake.most_concurrent());
    assert!(times_sent(&received, KEY).values().all(|times| *times == 1), "{received:?}");
    assert!(depth(&received) <= 8, "{}: {received:?}", depth(&received));
    let stats = guest.pager.stop();
    assert_eq!((stats.faults, stats.installed.demand), (64, 64));
}

#[test]
fn a_fault_on_a_cached_page_does_not_wait_for_one_that_is_not() {
    let bench = Bench::start(PAGES, Duration::ZERO);
    let snapshot = snapshot(&bench);
    let name = "a_fault_on_a_cached_page_does_not_wait_for_one_that_is_not";
    let Some(guest) = Guest::start(name, &snapshot, 1, Populate::Off) else { return };
    let holds = Arc::new(AtomicBool::new(true));
    let held = Arc::clone(&holds);
    bench.fake.decide(move |_, _| {
        while held.load(Ordering::SeqCst) {
            thread::sleep(Duration::from_millis(1));
        }
        Fate::Answer
    });
    let waits = far(20);
    thread::scope(|scope| {
        let (guest, bench) = (&guest, &bench);
        let threads: Vec<_> =
            waits.iter().map(|page| scope.spawn(|| guest.check(&bench.memory, *page))).collect();
        let begun = Instant::now();
        while guest.pager.faults() < waits.len() as u64 {
            assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", guest.pager.stats());
            thread::yield_now();
        }
        // These come while 20 faults wait, and no answer does.
        for page in 0..8 {
            guest.check(&bench.memory, page * 7);
        }
        assert!(threads.iter().all(|thread| !thread.is_finished()));
        holds.store(false, Ordering::SeqCst);
    });
    guest.pager.stop();
}

#[test]
fn slices_loaders_and_guests_fetch_each_block_once() {
    let bench = Bench::start(PAGES, Duration::from_millis(5));
    let snapshot = snapshot(&bench);
    let name = "slices_loaders_and_guests_fetch_each_block_once";
    let start = |populate| Guest::start(name, &snapshot, 2, populate);
    let (Some(one), Some(two)) = (start(Populate::Full), start(Populate::Off)) else { return };
    thread::scope(|scope| {
        for guest in [&one, &two] {
            let bench = &bench;
            scope.spawn(move || guest.check_all(&bench.memory, &far(200), 4));
        }
    });
    one.pager.wait_complete(Duration::from_secs(60));
    let received = bench.fake.take_received();
    let times = times_sent(&received, KEY);
    // A block that was sent twice was sent again by a second request for a late one.
    let twice = times.values().filter(|times| **times > 1).count();
    assert!(twice <= received.len() / 20, "{twice} of {}: {received:?}", received.len());
    one.pager.stop();
    two.pager.stop();
}

#[test]
fn an_outage_shorter_than_the_patience_is_only_a_wait() {
    let bench = Bench::start(PAGES, Duration::ZERO);
    let snapshot = snapshot(&bench);
    let name = "an_outage_shorter_than_the_patience_is_only_a_wait";
    let Some(guest) = Guest::start(name, &snapshot, 1, Populate::Off) else { return };
    // The patience is a second.
    let begun = Instant::now();
    bench.fake.decide(move |_, _| match begun.elapsed() < Duration::from_millis(500) {
        true => Fate::Status(503, "SlowDown"),
        false => Fate::Answer,
    });
    guest.check_all(&bench.memory, &far(8), 8);
    assert!(begun.elapsed() >= Duration::from_millis(500));
    assert!(guest.pager.failure().is_none());
    assert_eq!(guest.pager.stop().pages.poisoned, 0);
}

#[test]
fn an_outage_longer_than_the_patience_fails_the_pages_that_need_it() {
    let bench = Bench::start(PAGES, Duration::ZERO);
    let snapshot = snapshot(&bench);
    let name = "an_outage_longer_than_the_patience_fails_the_pages_that_need_it";
    let Some(guest) = Guest::start(name, &snapshot, 1, Populate::Off) else { return };
    bench.fake.decide(|_, _| Fate::Reset);
    let begun = Instant::now();
    thread::scope(|scope| {
        for page in far(6) {
            let guest = &guest;
            scope.spawn(move || {
                let error = guest.read_by_syscall(page).expect_err("the page fails");
                // EFAULT
                assert_eq!(error.raw_os_error(), Some(14), "{error}");
            });
        }
    });
    // All of them have waited at the same time.
    assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
    guest.check(&bench.memory, 3);
    let cause = pager::with_causes(guest.pager.failure().expect("it is kept"));
    assert!(cause.contains("tried") && cause.contains(KEY), "{cause}");
    // The outage is over: other pages come.
    bench.fake.decide(|_, _| Fate::Answer);
    guest.check(&bench.memory, far(7)[6]);
    assert_eq!(guest.pager.stop().pages.poisoned, 6);
}

#[test]
fn a_pager_stops_while_the_server_is_silent() {
    let bench = Bench::start(PAGES, Duration::ZERO);
    let snapshot = snapshot(&bench);
    let name = "a_pager_stops_while_the_server_is_silent";
    let Some(guest) = Guest::start(name, &snapshot, 1, Populate::Off) else { return };
    bench.fake.decide(|_, _| Fate::Late(Duration::from_secs(30)));
    let memory = Arc::clone(&guest.memory);
    // After the stop the page reads as zeros: nothing else uses this memory.
    let touch = thread::spawn(move || {
        let at = vm_memory::GuestAddress((far(1)[0] * 4096) as u64);
        vm_memory::Bytes::<vm_memory::GuestAddress>::read_obj::<u8>(&*memory, at).expect("inside")
    });
    while guest.pager.faults() == 0 {
        thread::yield_now();
    }
    let begun = Instant::now();
    guest.pager.stop();
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    touch.join().expect("it continues");
}

/// Every fiftieth request for a fault is answered after a second. Requests for announced blocks are not sent twice.
#[test]
fn late_requests_are_sent_twice_for_faults_only() {
    let bench = Bench::start(PAGES, Duration::from_millis(20));
    let snapshot = snapshot(&bench);
    let name = "late_requests_are_sent_twice_for_faults_only";
    let Some(guest) = Guest::start(name, &snapshot, 1, Populate::Off) else { return };
    let slow = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&slow);
    bench.fake.decide(move |number, _| match number % 50 == 49 {
        true => {
            count.fetch_add(1, Ordering::SeqCst);
            Fate::Late(Duration::from_secs(1))
        }
        false => Fate::Answer,
    });
    guest.check_all(&bench.memory, &far(150), 1);
    let (slow, received) = (slow.load(Ordering::SeqCst), bench.fake.take_received());
    assert!(slow >= 3, "{slow}");
    // On a busy machine other requests are late too, and use the second requests up. The benchmark has the times.
    let again = received.len() - 150;
    assert!((1..=150 / 20).contains(&again), "{again} requests again, {slow} slow");
    guest.pager.stop();

    bench.fake.decide(|_, _| Fate::Late(Duration::from_millis(300)));
    let storage = snapshot.storage();
    let rest = far(220)[160..].to_vec();
    for page in &rest {
        storage.expect((page * 4096) as u64..(page * 4096 + 1) as u64);
    }
    thread::sleep(Duration::from_millis(100));
    let begun = Instant::now();
    while rest.iter().any(|page| storage.would_wait((page * 4096) as u64..(page * 4096 + 1) as u64))
    {
        assert!(begun.elapsed() < Duration::from_secs(30));
        thread::sleep(Duration::from_millis(5));
    }
    let received = bench.fake.take_received();
    assert!(times_sent(&received, KEY).values().all(|times| *times == 1), "{received:?}");
}
