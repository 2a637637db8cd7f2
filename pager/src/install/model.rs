//! A model checker: all interleavings of faults, population, a removal and the end of the population, on two pages.
//!
//! The kernel and the threads of the guest are small state machines. The pager fills pages with its real code
//! (`kernel`), by its real rules (`reason`). Each step of the pager runs with every choice of what guests do before
//! each of its ioctls. Every state that results is explored once.
//!
//! Checked in each state: a read returns the content of the source, or zero if the page was given back (and only zero
//! after the removal has returned), or fails if the source has failed. At the end no thread waits.

use std::cell::{Cell, RefCell};
use std::collections::HashSet;

use crate::install::kernel::{self, Drained, Fill, InstallObserver, PageOps, Target};
use crate::install::page_state::PageState;
use crate::install::reason::InstallReason;
use crate::region::PAGE_BYTES as PAGE;
use crate::uffd::Errno;

const ZERO: u8 = 0;
const SOURCE: u8 = 7;
const POISON: u8 = 0xff;

/// A thread of the guest: it gives back the page of `removes`, if there is one, and then reads its pages in turn.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Guest {
    removes: Option<usize>,
    removing: Removing,
    reads: Vec<usize>,
    waits: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Removing {
    Not,
    /// The event is queued. The thread continues after it was read.
    Queued,
    Read,
    /// Pages can be filled again, and this page is not removed yet.
    Unblocked,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
enum Demand {
    Idle,
    /// A fault was read.
    Look(usize),
    /// The page and its state. The page was loaded by that state.
    Install(usize, PageState),
    /// The page was installed, and no thread was woken by that.
    Wake(usize),
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
enum Populating {
    Look(usize),
    Install(usize),
    Release,
    Ended,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct World {
    memory: [Option<u8>; 2],
    registered: bool,
    /// The number of removals in progress. Pages cannot be filled meanwhile.
    changing: u8,
    faults: Vec<usize>,
    events: Vec<usize>,
    guests: Vec<Guest>,
    removal_returned: [bool; 2],
    removal_began: [bool; 2],
    /// A page that the source does not have.
    lost: Option<usize>,
    states: [PageState; 2],
    released: bool,
    /// Whether the faulting thread is woken only after all loaded pages are installed.
    wakes_last: bool,
    /// Whether pages have to come from another host.
    remote: bool,
    /// The faults that wait for that, while others are answered.
    waiting: Vec<usize>,
    /// The pages that have come.
    come: [bool; 2],
    inbox: Vec<usize>,
    demand: Demand,
    populating: Populating,
    gave_up: bool,
}

impl World {
    fn can_step(&self, guest: usize) -> bool {
        let Guest { removes, removing, reads, waits } = &self.guests[guest];
        if *removing == Removing::Queued || *waits {
            return false;
        }
        removes.is_some() || !reads.is_empty()
    }

    fn step_guest(&mut self, number: usize) {
        let mut guest = self.guests[number].clone();
        if let Some(page) = guest.removes {
            match guest.removing {
                Removing::Not if self.registered => {
                    self.changing += 1;
                    self.removal_began[page] = true;
                    self.events.push(page);
                    guest.removing = Removing::Queued;
                }
                Removing::Read => {
                    self.changing -= 1;
                    guest.removing = Removing::Unblocked;
                }
                Removing::Not | Removing::Unblocked => {
                    self.removal_began[page] = true;
                    self.memory[page] = None;
                    self.removal_returned[page] = true;
                    guest.removes = None;
                }
                Removing::Queued => unreachable!("it waits"),
            }
        } else {
            let page = guest.reads[0];
            match self.memory[page] {
                None if self.registered => {
                    self.faults.push(page);
                    guest.waits = true;
                }
                seen => {
                    // In unregistered memory the kernel fills in zeros.
                    let seen = seen.unwrap_or(ZERO);
                    self.memory[page] = Some(seen);
                    self.check(page, seen);
                    guest.reads.remove(0);
                }
            }
        }
        self.guests[number] = guest;
    }

    fn check(&self, page: usize, seen: u8) {
        let right = match seen {
            SOURCE => self.lost != Some(page) && !self.removal_returned[page],
            ZERO => self.removal_began[page],
            POISON => self.lost == Some(page) && !self.removal_returned[page],
            _ => false,
        };
        assert!(right, "page {page} reads {seen}: {self:?}");
    }

    fn wake(&mut self, page: usize) {
        // The kernel drops an unread message when its thread is woken.
        self.faults.retain(|&fault| fault != page);
        for guest in &mut self.guests {
            if guest.removes.is_none() && guest.reads.first() == Some(&page) {
                guest.waits = false;
            }
        }
    }

    /// As `Inbox::receive`, with the slice lock held.
    fn receive(&mut self) -> usize {
        let count = self.faults.len() + self.events.len();
        self.inbox.append(&mut self.faults);
        for page in self.events.drain(..) {
            self.states[page] = PageState::Removed;
            for guest in &mut self.guests {
                if guest.removes == Some(page) && guest.removing == Removing::Queued {
                    guest.removing = Removing::Read;
                }
            }
        }
        count
    }

    fn demand_can_step(&self) -> bool {
        self.demand != Demand::Idle
            || !self.inbox.is_empty()
            || !(self.faults.is_empty() && self.events.is_empty())
    }
}

/// A state inside a step of the pager. At each `turn` the script says what guests do meanwhile.
struct Run {
    world: RefCell<World>,
    script: RefCell<Vec<(usize, usize)>>,
    at: Cell<usize>,
}

impl Run {
    /// Chooses one of `options` by the script. At its end, the script grows by first choices.
    fn choose(&self, options: usize) -> usize {
        let (at, mut script) = (self.at.get(), self.script.borrow_mut());
        if at == script.len() {
            script.push((0, options));
        }
        assert_eq!(script[at].1, options, "the run is not repeatable");
        self.at.set(at + 1);
        script[at].0
    }

    /// Lets guests run. With `must`, at least one step is made, because the pager waits for it.
    fn turn(&self, must: bool) {
        let mut must = must;
        loop {
            let able: Vec<usize> = {
                let world = self.world.borrow();
                (0..world.guests.len()).filter(|&guest| world.can_step(guest)).collect()
            };
            assert!(!must || !able.is_empty(), "no guest can run: {:?}", self.world.borrow());
            let choice = self.choose(able.len() + usize::from(!must));
            let Some(&guest) = able.get(choice) else { return };
            self.world.borrow_mut().step_guest(guest);
            must = false;
        }
    }

    fn fill(&self, host_addr: u64, pages: usize, with: u8, wakes: bool) -> Result<usize, Errno> {
        self.turn(false);
        let mut world = self.world.borrow_mut();
        let first = host_addr as usize / PAGE;
        for page in first..first + pages {
            let refused = match world.memory[page] {
                _ if world.changing > 0 => libc::EAGAIN,
                _ if !world.registered => libc::ENOENT,
                Some(_) => libc::EEXIST,
                None => {
                    world.memory[page] = Some(with);
                    if wakes {
                        world.wake(page);
                    }
                    continue;
                }
            };
            return if page == first { Err(Errno(refused)) } else { Ok((page - first) * PAGE) };
        }
        Ok(pages * PAGE)
    }
}

impl PageOps for Run {
    fn copy(&self, host_addr: u64, bytes: &[u8]) -> Result<usize, Errno> {
        self.fill(host_addr, bytes.len() / PAGE, SOURCE, true)
    }
    fn copy_without_waking(&self, host_addr: u64, bytes: &[u8]) -> Result<usize, Errno> {
        self.fill(host_addr, bytes.len() / PAGE, SOURCE, false)
    }
    fn zero(&self, host_addr: u64, len: usize) -> Result<usize, Errno> {
        self.fill(host_addr, len / PAGE, ZERO, true)
    }
    fn poison(&self, host_addr: u64, len: usize) -> Result<usize, Errno> {
        self.fill(host_addr, len / PAGE, POISON, true)
    }
    fn wake(&self, host_addr: u64, _: usize) -> Result<(), Errno> {
        self.turn(false);
        self.world.borrow_mut().wake(host_addr as usize / PAGE);
        Ok(())
    }
}

/// As `SliceObserver`.
struct ModelObserver<'a> {
    run: &'a Run,
    reason: InstallReason,
    own: bool,
    answered: bool,
}

impl InstallObserver for ModelObserver<'_> {
    fn wants(&self, page: u64) -> bool {
        self.reason.wants(self.run.world.borrow().states[page as usize])
    }
    fn filled(&mut self, first_page: u64, pages: usize) {
        for page in first_page..first_page + pages as u64 {
            self.run.world.borrow_mut().states[page as usize] = self.reason.filled();
            self.answered |= Some(page) == self.reason.fault_page();
        }
    }
    fn existing(&mut self, page: u64) {
        let mut world = self.run.world.borrow_mut();
        world.states[page as usize] = world.states[page as usize].found();
        self.answered |= Some(page) == self.reason.fault_page();
    }
    fn gone(&mut self, page: u64) {
        self.run.world.borrow_mut().states[page as usize] = PageState::Removed;
        self.answered |= Some(page) == self.reason.fault_page();
    }
    fn drain_events(&mut self) -> Drained {
        if !self.own {
            return Drained::GiveUp;
        }
        if self.run.world.borrow_mut().receive() == 0 {
            self.run.turn(true);
        }
        Drained::Retry
    }
}

/// Installs with the slice lock held. Returns whether the page of the fault is dealt with.
fn install(run: &Run, first: usize, pages: usize, fill: Fill<'_>, reason: InstallReason) -> bool {
    if run.world.borrow().released {
        return true;
    }
    let own = !matches!(reason, InstallReason::Populate);
    let mut observer = ModelObserver { run, reason, own, answered: false };
    let host_addr = (first * PAGE) as u64;
    let target = Target { first_page: first as u64, pages, host_addr, page_bytes: PAGE };
    kernel::install(run, target, fill, &mut observer).expect("nothing is refused");
    observer.answered
}

/// The pages that are loaded with `page`: both, or only `page` if one is lost.
fn chunk(world: &World, page: usize) -> (usize, usize) {
    if world.lost.is_some() { (page, 1) } else { (0, 2) }
}

/// As `Handler::serve_until_stopped`, in steps between which the lock is free.
fn step_demand(run: &Run) {
    let bytes = [SOURCE; 2 * PAGE];
    let (demand, lost, wakes_last) = {
        let world = run.world.borrow();
        (world.demand.clone(), world.lost, world.wakes_last)
    };
    let next = match demand {
        Demand::Idle => {
            let mut world = run.world.borrow_mut();
            if world.inbox.is_empty() {
                world.receive();
            }
            if world.inbox.is_empty() { Demand::Idle } else { Demand::Look(world.inbox.remove(0)) }
        }
        Demand::Look(page) => {
            let mut world = run.world.borrow_mut();
            match world.states[page] {
                PageState::Missing if world.remote && !world.come[page] => {
                    world.waiting.push(page);
                    Demand::Idle
                }
                state => Demand::Install(page, state),
            }
        }
        Demand::Install(page, seen) => {
            let fault_page = page as u64;
            let answered = match seen {
                PageState::Missing if lost == Some(page) => {
                    install(run, page, 1, Fill::Poison, InstallReason::Poison { fault_page })
                }
                PageState::Missing => {
                    let (first, pages) = chunk(&run.world.borrow(), page);
                    let bytes = &bytes[..pages * PAGE];
                    let fill =
                        if wakes_last { Fill::CopyWithoutWaking(bytes) } else { Fill::Copy(bytes) };
                    install(
                        run,
                        first,
                        pages,
                        fill,
                        InstallReason::Load { fault_page, zero: false },
                    )
                }
                PageState::Present | PageState::Removed => {
                    install(run, page, 1, Fill::Zero, InstallReason::FillZero { fault_page })
                }
                PageState::Poisoned => {
                    install(run, page, 1, Fill::Poison, InstallReason::Poison { fault_page })
                }
            };
            match answered {
                true if wakes_last && seen == PageState::Missing => Demand::Wake(page),
                true => Demand::Idle,
                false => Demand::Look(page),
            }
        }
        Demand::Wake(page) => {
            run.wake((page * PAGE) as u64, PAGE).expect("nothing is refused");
            Demand::Idle
        }
    };
    run.world.borrow_mut().demand = next;
}

/// As `Handler::take_arrived`: the wait of the first fault has ended.
fn arrive(world: &mut World) {
    let page = world.waiting.remove(0);
    world.come[page] = true;
    world.inbox.push(page);
}

/// As `Loader::run`.
fn step_populating(run: &Run) {
    let bytes = [SOURCE; 2 * PAGE];
    let populating = run.world.borrow().populating.clone();
    let next = match populating {
        Populating::Look(2) => Populating::Release,
        Populating::Look(page) => {
            let mut world = run.world.borrow_mut();
            match world.states[page] {
                PageState::Missing if world.lost == Some(page) => {
                    world.gave_up = true;
                    Populating::Look(page + 1)
                }
                PageState::Missing => Populating::Install(page),
                _ => Populating::Look(page + 1),
            }
        }
        Populating::Install(page) => {
            let (first, pages) = chunk(&run.world.borrow(), page);
            install(run, first, pages, Fill::Copy(&bytes[..pages * PAGE]), InstallReason::Populate);
            Populating::Look(page)
        }
        Populating::Release => {
            let mut world = run.world.borrow_mut();
            if !world.gave_up && !world.states.contains(&PageState::Poisoned) {
                (world.registered, world.released) = (false, true);
                (0..2).for_each(|page| world.wake(page));
            }
            Populating::Ended
        }
        Populating::Ended => Populating::Ended,
    };
    run.world.borrow_mut().populating = next;
}

/// Every state that a step leads to, for every choice of what guests do meanwhile.
fn outcomes(world: &World, step: impl Fn(&Run)) -> Vec<World> {
    let mut script: Vec<(usize, usize)> = Vec::new();
    let mut worlds = HashSet::new();
    loop {
        let run = Run {
            world: RefCell::new(world.clone()),
            script: RefCell::new(script),
            at: Cell::new(0),
        };
        step(&run);
        worlds.insert(run.world.into_inner());
        script = run.script.into_inner();
        // The next script: the last choice that has another option takes it.
        while script.last().is_some_and(|&(choice, options)| choice + 1 == options) {
            script.pop();
        }
        match script.last_mut() {
            Some(last) => last.0 += 1,
            None => return worlds.into_iter().collect(),
        }
    }
}

/// Explores all states from this one. Returns their number.
fn explore(start: World) -> usize {
    let mut seen = HashSet::from([start.clone()]);
    let mut left = vec![start];
    while let Some(world) = left.pop() {
        let mut next = Vec::new();
        for guest in (0..world.guests.len()).filter(|&guest| world.can_step(guest)) {
            let mut world = world.clone();
            world.step_guest(guest);
            next.push(world);
        }
        if world.demand_can_step() {
            next.extend(outcomes(&world, step_demand));
        }
        if !world.waiting.is_empty() {
            let mut world = world.clone();
            arrive(&mut world);
            next.push(world);
        }
        if world.populating != Populating::Ended {
            next.extend(outcomes(&world, step_populating));
        }
        if next.is_empty() {
            let done = |guest: &Guest| guest.removes.is_none() && guest.reads.is_empty();
            assert!(world.guests.iter().all(done), "a thread waits forever: {world:?}");
        }
        for world in next {
            if seen.insert(world.clone()) {
                left.push(world);
            }
        }
    }
    seen.len()
}

fn world(
    guests: &[(Option<usize>, &[usize])],
    populated: bool,
    wakes_last: bool,
    lost: Option<usize>,
) -> World {
    let guest = |&(removes, reads): &(Option<usize>, &[usize])| Guest {
        removes,
        removing: Removing::Not,
        reads: reads.to_vec(),
        waits: false,
    };
    World {
        memory: [None; 2],
        registered: true,
        changing: 0,
        faults: Vec::new(),
        events: Vec::new(),
        guests: guests.iter().map(guest).collect(),
        removal_returned: [false; 2],
        removal_began: [false; 2],
        lost,
        states: [PageState::Missing; 2],
        released: false,
        wakes_last,
        remote: false,
        waiting: Vec::new(),
        come: [false; 2],
        inbox: Vec::new(),
        demand: Demand::Idle,
        populating: if populated { Populating::Look(0) } else { Populating::Ended },
        gave_up: false,
    }
}

#[test]
fn every_interleaving_reads_right_and_ends() {
    let mut worlds = 0;
    for (populated, wakes_last) in [(false, false), (false, true), (true, false), (true, true)] {
        for lost in [None, Some(1)] {
            let guests: [&[(Option<usize>, &[usize])]; 4] = [
                &[(None, &[0, 1]), (Some(0), &[0])],
                &[(Some(0), &[0, 1]), (None, &[1])],
                &[(Some(1), &[1]), (Some(0), &[0])],
                &[(None, &[0]), (None, &[0]), (Some(0), &[])],
            ];
            for guests in guests {
                let start = world(guests, populated, wakes_last, lost);
                worlds += explore(World { remote: true, ..start.clone() }) + explore(start);
            }
        }
    }
    println!("{worlds} worlds");
    assert!(worlds > 10_000, "{worlds}: something is not explored");
}

/// The model finds the bug that it is for: content comes back because a state was not checked again.
#[test]
#[should_panic(expected = "reads 7")]
fn a_missed_removal_is_found() {
    let mut start = world(&[(Some(0), &[0])], true, false, None);
    // The removal is read, and not applied.
    start.guests[0].removing = Removing::Read;
    start.changing = 1;
    start.removal_began[0] = true;
    explore(start);
}
