//! Devices as a driver sees them: a correct driver and hostile drivers.

mod states;

use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::fake_driver::*;
use super::{
    AllowedFolders, BackendState, Disk, DiskError, EventLoop, Host, ImagePath, OverlayPlace,
    VirtioDevice, VirtioState,
};
use crate::control::Stop;
use crate::devices::MmioDevice;

const HEADER: u64 = 0x8000;
const RESULT: u64 = 0x9000;
const DATA: u64 = 0xa000;
const SECTORS: u64 = 64;

fn image() -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    for sector in 0..SECTORS {
        file.write_all(&[sector as u8 + 1; 512]).unwrap();
    }
    file
}

fn block(path: &Path, read_only: bool) -> Driver {
    let event_loop = EventLoop::start().unwrap();
    let disk = Disk::open(path, read_only).unwrap();
    let device = VirtioDevice::create(&event_loop, Host::Disk(disk)).unwrap();
    let mut driver = Driver::attach(device, memory());
    driver.start();
    driver
}

fn set_header(driver: &Driver, kind: u32, sector: u64) {
    driver.memory.write_obj(kind, GuestAddress(HEADER)).unwrap();
    driver.memory.write_obj(0u32, GuestAddress(HEADER + 4)).unwrap();
    driver.memory.write_obj(sector, GuestAddress(HEADER + 8)).unwrap();
    driver.memory.write_obj(0xffu8, GuestAddress(RESULT)).unwrap();
}

/// One block request with one buffer of data. Returns status and used length.
fn request(driver: &mut Driver, kind: u32, sector: u64, data: (u64, u32, u16)) -> (u8, u32) {
    set_header(driver, kind, sector);
    let used = driver.run(&[(HEADER, 16, 0), data, (RESULT, 1, WRITE)]);
    (driver.memory.read_obj(GuestAddress(RESULT)).unwrap(), used)
}

fn bytes(driver: &Driver, gpa: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    driver.memory.read_slice(&mut bytes, GuestAddress(gpa)).unwrap();
    bytes
}

#[test]
fn all_that_a_device_writes_is_recorded() {
    let image = image();
    let mut driver = block(image.path(), false);
    for (kind, data) in [(0, (DATA, 512, WRITE)), (1, (DATA, 512, 0)), (8, (DATA, 20, WRITE))] {
        driver.writes.take().unwrap();
        assert_eq!(request(&mut driver, kind, 3, data).0, 0);
        let pages: Vec<u64> = driver
            .writes
            .take()
            .unwrap()
            .ranges()
            .into_iter()
            .flat_map(|r| r.step_by(4096))
            .collect();
        let mut expected = vec![USED & !0xfff, RESULT];
        expected.extend((kind != 1).then_some(DATA));
        expected.sort_unstable();
        assert_eq!(pages, expected, "request {kind}");
    }
}

/// What was done since is forgotten: the rings' positions, and what the guest has written to the disk.
#[test]
fn a_disk_with_an_overlay_is_put_back() {
    let image = image();
    let event_loop = EventLoop::start().unwrap();
    let disk = Disk::open_below(image.path(), &OverlayPlace::Memory).unwrap();
    let device = VirtioDevice::create(&event_loop, Host::Disk(disk)).unwrap();
    let mut driver = Driver::attach(device, memory());
    driver.start();
    let write = |driver: &mut Driver, sector: u64, byte: u8| {
        driver.memory.write_slice(&[byte; 512], GuestAddress(DATA)).unwrap();
        assert_eq!(request(driver, 1, sector, (DATA, 512, 0)).0, 0);
    };
    let read = |driver: &mut Driver, sector: u64| {
        assert_eq!(request(driver, 0, sector, (DATA, 512, WRITE)).0, 0);
        bytes(driver, DATA, 512)[511]
    };
    write(&mut driver, 3, b'a');
    driver.device.pause();
    let (state, content) = (driver.device.state(), driver.device.content().unwrap());
    let before = bytes(&driver, 0, BROKEN_GPA as usize);
    driver.device.resume();
    for _ in 0..3 {
        write(&mut driver, 3, b'b');
        write(&mut driver, 40, b'c');
        assert_eq!((read(&mut driver, 3), read(&mut driver, 40)), (b'b', b'c'));
        driver.device.pause();
        driver.memory.write_slice(&before, GuestAddress(0)).unwrap();
        driver.device.reset(&state, content.as_deref()).unwrap();
        assert_eq!(driver.device.state(), state);
        assert_eq!(driver.device.content().unwrap(), content);
        driver.device.resume();
        assert_eq!((read(&mut driver, 3), read(&mut driver, 40)), (b'a', 41));
    }
    // A content that is not of this disk.
    driver.device.pause();
    driver.device.reset(&state, Some(b"nonsense")).unwrap_err();
}

#[test]
fn registers_describe_the_device() {
    let image = image();
    let mut driver = block(image.path(), false);
    assert_eq!(driver.get(0x00), u32::from_le_bytes(*b"virt"));
    assert_eq!((driver.get(0x04), driver.get(0x08)), (2, 2));
    assert_eq!(driver.get(0x34), 128);
    driver.set(0x30, 1);
    assert_eq!(driver.get(0x34), 0, "there is no second queue");
    assert_eq!(driver.get(0x100), SECTORS as u32);
    assert_eq!(driver.get(0x104), 0);
    assert_eq!(driver.get(0x1000 - 4), 0);
    // Registers have 32 bits; nothing else is answered or taken.
    let mut byte = [0xaa];
    driver.device.read(0, &mut byte);
    assert_eq!(byte, [0]);
    driver.device.write(STATUS, &[0]);
    driver.device.write(STATUS + 1, &[0; 4]);
    assert_eq!(driver.get(STATUS), 15);
    let mut half = [0; 2];
    driver.device.read(0x100, &mut half);
    assert_eq!(u16::from_le_bytes(half), SECTORS as u16);
}

#[test]
fn a_driver_that_skips_a_step_gets_no_device() {
    let image = image();
    let mut driver = block(image.path(), false);
    driver.set(STATUS, 0);
    assert_eq!(driver.get(STATUS), 0);
    driver.set(STATUS, 3);
    driver.set(STATUS, 3 | 8);
    assert_eq!(driver.get(STATUS), 3, "without VIRTIO_F_VERSION_1");
    driver.set(0x24, 1);
    driver.set(0x20, 1 | 1 << 20);
    driver.set(STATUS, 3 | 8);
    assert_eq!(driver.get(STATUS), 3, "with a feature that was not offered");
    driver.set(STATUS, 3 | 4);
    assert_eq!(driver.get(STATUS), 3, "DRIVER_OK before FEATURES_OK");
    driver.set_queue(QUEUE_SIZE, DESCRIPTORS, AVAILABLE, USED);
    assert_eq!(driver.get(0x44), 0, "a queue before FEATURES_OK");
    driver.set(0x20, 1);
    driver.set(STATUS, 3 | 8);
    driver.set(0x20, 0);
    driver.set(STATUS, 3 | 8 | 4);
    assert_eq!(driver.get(STATUS), 15, "features are fixed by FEATURES_OK");
    driver.set(STATUS, 1);
    assert_eq!(driver.get(STATUS), 15, "only a reset clears bits");
}

#[test]
fn a_disk_is_read_written_flushed_and_named() {
    let image = image();
    let mut driver = block(image.path(), false);
    assert_eq!(request(&mut driver, 0, 3, (DATA, 1024, WRITE)), (0, 1025));
    assert_eq!(bytes(&driver, DATA, 1024), [[4; 512], [5; 512]].concat());

    driver.memory.write_slice(&[0x5a; 512], GuestAddress(DATA)).unwrap();
    assert_eq!(request(&mut driver, 1, SECTORS - 1, (DATA, 512, 0)), (0, 1));
    let file = std::fs::read(image.path()).unwrap();
    assert_eq!(file[file.len() - 512..], [0x5a; 512]);
    assert_eq!(file[file.len() - 1024..][..512], [SECTORS as u8 - 1; 512]);

    set_header(&driver, 4, 0);
    assert_eq!(driver.run(&[(HEADER, 16, 0), (RESULT, 1, WRITE)]), 1);
    assert_eq!(bytes(&driver, RESULT, 1), [0]);
    assert_eq!(request(&mut driver, 8, 0, (DATA, 20, WRITE)), (0, 21));
    assert!(bytes(&driver, DATA, 20).starts_with(b"snap-"));
}

#[test]
fn framing_is_the_drivers_choice() {
    let image = image();
    let mut driver = block(image.path(), false);
    set_header(&driver, 0, 1);
    // The header in two buffers; data and status in one.
    let used = driver.run(&[(HEADER, 7, 0), (HEADER + 7, 9, 0), (DATA, 513, WRITE)]);
    assert_eq!(used, 513);
    assert_eq!(bytes(&driver, DATA, 513), [vec![2; 512], vec![0]].concat());
    // The same through an indirect table.
    driver.descriptor(0x7000, HEADER, 16, NEXT, 1);
    driver.descriptor(0x7010, DATA, 513, WRITE, 0);
    assert_eq!(driver.run(&[(0x7000, 32, INDIRECT)]), 513);
}

#[test]
fn impossible_requests_fail() {
    let image = image();
    let mut driver = block(image.path(), true);
    let mut status = |kind, sector, data| request(&mut driver, kind, sector, data).0;
    assert_eq!(status(1, 0, (DATA, 512, 0)), 1, "a write to a read-only disk");
    assert_eq!(status(0, SECTORS, (DATA, 512, WRITE)), 1, "behind the end");
    assert_eq!(status(0, SECTORS - 1, (DATA, 1024, WRITE)), 1, "over the end");
    assert_eq!(status(0, u64::MAX, (DATA, 512, WRITE)), 1);
    assert_eq!(status(0, u64::MAX / 512, (DATA, 512, WRITE)), 1);
    assert_eq!(status(0, 0, (DATA, 100, WRITE)), 1, "half a sector");
    assert_eq!(status(77, 0, (DATA, 512, WRITE)), 2, "unsupported");
    assert_eq!(status(0, 0, (DATA, 512, WRITE)), 0, "the next one is served");
    image.as_file().set_len(512).unwrap();
    assert_eq!(status(0, 1, (DATA, 512, WRITE)), 1, "the image has shrunk");
}

/// Each breaks the rules in one way; none is answered, and after a reset the device works.
#[test]
fn hostile_chains_break_only_the_device() {
    type Attack = (&'static str, fn(&mut Driver));
    let attacks: &[Attack] = &[
        ("a loop", |d| {
            d.descriptor(DESCRIPTORS, HEADER, 16, NEXT, 1);
            d.descriptor(DESCRIPTORS + 16, HEADER, 16, NEXT, 0);
        }),
        ("a next descriptor outside", |d| d.descriptor(DESCRIPTORS, HEADER, 16, NEXT, 999)),
        ("a buffer outside of memory", |d| {
            d.chain(0, &[(HEADER, 16, 0), (MEMORY_BYTES, 512, WRITE), (RESULT, 1, WRITE)]);
        }),
        ("a buffer over the end", |d| {
            d.chain(0, &[(HEADER, 16, 0), (MEMORY_BYTES - 8, 512, WRITE), (RESULT, 1, WRITE)]);
        }),
        ("an address that overflows", |d| {
            d.chain(0, &[(u64::MAX - 4, 16, 0), (RESULT, 1, WRITE)]);
        }),
        ("a length of 2^32 - 1", |d| {
            d.chain(0, &[(HEADER, 16, 0), (DATA, u32::MAX, WRITE), (RESULT, 1, WRITE)]);
        }),
        ("lengths over 2^32", |d| {
            d.chain(0, &[(HEADER, u32::MAX, 0), (DATA, u32::MAX, 0), (RESULT, 1, WRITE)]);
        }),
        ("reads after writes", |d| d.chain(0, &[(RESULT, 1, WRITE), (HEADER, 16, 0)])),
        ("no status", |d| d.chain(0, &[(HEADER, 16, 0)])),
        ("no header", |d| d.chain(0, &[(RESULT, 1, WRITE)])),
        ("an empty chain", |d| d.chain(0, &[(0, 0, 0)])),
        ("a table in a table", |d| {
            d.chain(0, &[(0x7000, 16, INDIRECT)]);
            d.descriptor(0x7000, 0x7000, 16, INDIRECT, 0);
        }),
        ("a table of no length", |d| d.chain(0, &[(0x7000, 0, INDIRECT)])),
        ("a table of half an entry", |d| d.chain(0, &[(0x7000, 24, INDIRECT)])),
        ("a table of 2^32 - 16 bytes", |d| d.chain(0, &[(0x7000, u32::MAX - 15, INDIRECT)])),
        ("a table outside of memory", |d| d.chain(0, &[(MEMORY_BYTES, 16, INDIRECT)])),
        ("an endless table", |d| {
            for at in (0x10000..0x20000).step_by(16) {
                d.descriptor(at, HEADER, 1, NEXT, ((at - 0x10000) / 16 + 1) as u16);
            }
            d.chain(0, &[(0x10000, 0x10000, INDIRECT)]);
        }),
        ("a table of buffers without a byte", |d| {
            for (index, at) in (0x10000..0x11800).step_by(16).enumerate() {
                d.descriptor(at, 0, 0, NEXT, index as u16 + 1);
            }
            d.descriptor(0x10000, HEADER, 16, NEXT, 1);
            d.descriptor(0x117f0, RESULT, 1, WRITE, 0);
            d.chain(0, &[(0x10000, 0x1800, INDIRECT)]);
        }),
        ("a head outside", |d| {
            d.memory.write_obj(500u16, GuestAddress(AVAILABLE + 4)).unwrap();
            d.memory.write_obj(1u16, GuestAddress(AVAILABLE + 2)).unwrap();
        }),
        ("an index that jumps", |d| {
            d.memory.write_obj(QUEUE_SIZE as u16 + 7, GuestAddress(AVAILABLE + 2)).unwrap();
        }),
    ];
    let image = image();
    let mut driver = block(image.path(), true);
    for (name, attack) in attacks {
        attack(&mut driver);
        if bytes(&driver, AVAILABLE + 2, 2) == [0, 0] {
            driver.offer(0);
        }
        driver.notify();
        assert_eq!(driver.wait_for_interrupt(), 2, "{name}");
        assert_eq!(driver.get(STATUS), 15 | NEEDS_RESET, "{name}");
        assert_eq!(driver.used(), 0, "{name}");
        driver.start();
        let served = request(&mut driver, 0, 0, (DATA, 512, WRITE));
        assert_eq!(served, (0, 513), "after {name}");
        driver.start();
    }
    assert_eq!(driver.stop(), None);
}

#[test]
fn impossible_queues_are_refused() {
    let image = image();
    let mut driver = block(image.path(), true);
    for (name, size, descriptors, available, used) in [
        ("size 0", 0, DESCRIPTORS, AVAILABLE, USED),
        ("size 3", 3, DESCRIPTORS, AVAILABLE, USED),
        ("too large", 256, DESCRIPTORS, AVAILABLE, USED),
        ("size 2^16", 1 << 16, DESCRIPTORS, AVAILABLE, USED),
        ("misaligned descriptors", 16, DESCRIPTORS + 8, AVAILABLE, USED),
        ("misaligned available ring", 16, DESCRIPTORS, AVAILABLE + 1, USED),
        ("misaligned used ring", 16, DESCRIPTORS, AVAILABLE, USED + 2),
        ("descriptors outside", 16, MEMORY_BYTES, AVAILABLE, USED),
        ("available ring outside", 16, DESCRIPTORS, u64::MAX - 1, USED),
        ("used ring over the end", 16, DESCRIPTORS, AVAILABLE, MEMORY_BYTES - 4),
    ] {
        driver.negotiate();
        driver.set_queue(size, descriptors, available, used);
        assert_eq!(driver.get(0x44), 0, "{name}");
        assert_eq!(driver.get(STATUS), 11 | NEEDS_RESET, "{name}");
        assert_eq!(driver.wait_for_interrupt(), 2, "{name}");
    }
    driver.start();
    assert_eq!(request(&mut driver, 0, 0, (DATA, 512, WRITE)), (0, 513));
}

/// A page that the host cannot supply: an access raises SIGBUS.
#[test]
fn an_unreadable_page_stops_the_guest_at_any_access_of_a_device() {
    let broken = BROKEN_GPA;
    type Chain = [(u64, u32, u16); 3];
    let cases: [(&str, Chain); 4] = [
        ("header", [(broken, 16, 0), (DATA, 512, WRITE), (RESULT, 1, WRITE)]),
        ("data to read", [(HEADER, 16, 0), (broken - 512, 1024, WRITE), (RESULT, 1, WRITE)]),
        ("status", [(HEADER, 16, 0), (DATA, 512, WRITE), (broken, 1, WRITE)]),
        ("indirect table", [(broken, 32, INDIRECT), (0, 0, 0), (0, 0, 0)]),
    ];
    for (name, chain) in cases {
        let image = image();
        let mut driver = block(image.path(), false);
        set_header(&driver, 0, 0);
        driver.chain(0, &chain);
        driver.offer(0);
        driver.notify();
        let stop = driver.wait_for_stop();
        assert_eq!(stop, Stop::MemoryError { gpa: Some(broken), host_addr: None }, "{name}");
        assert_eq!(driver.used(), 0, "{name} was answered");
        driver.device.pause();
    }
    let image = image();
    let mut driver = block(image.path(), false);
    driver.negotiate();
    driver.set_queue(QUEUE_SIZE, DESCRIPTORS, broken, USED);
    driver.set(STATUS, 15);
    let stop = driver.wait_for_stop();
    assert_eq!(stop, Stop::MemoryError { gpa: Some(broken + 2), host_addr: None }, "ring");
}

#[test]
fn unreadable_data_is_never_written_to_a_disk_as_zeros() {
    let image = image();
    let before = std::fs::read(image.path()).unwrap();
    let mut driver = block(image.path(), false);
    set_header(&driver, 1, 0);
    driver.chain(0, &[(HEADER, 16, 0), (BROKEN_GPA, 512, 0), (RESULT, 1, WRITE)]);
    driver.offer(0);
    driver.notify();
    assert!(!driver.wait_for_stop().is_resumable());
    assert_eq!(std::fs::read(image.path()).unwrap(), before);
}

#[test]
fn queued_requests_are_served_after_a_restore() {
    let image = image();
    let mut driver = block(image.path(), false);
    assert_eq!(request(&mut driver, 0, 0, (DATA, 512, WRITE)), (0, 513));
    driver.device.pause();
    // It is offered, and the device is notified, while the device is paused.
    set_header(&driver, 0, 7);
    driver.chain(0, &[(HEADER, 16, 0), (DATA, 512, WRITE), (RESULT, 1, WRITE)]);
    driver.offer(0);
    driver.notify();
    let state = driver.device.state();
    assert_eq!(driver.used(), 1);
    let memory = Arc::clone(&driver.memory);
    drop(driver);

    let saved = VirtioState::decode(&state).unwrap();
    assert_eq!(saved.encode(), state);
    let BackendState::Block(disk) = saved.device else { panic!("{saved:?}") };
    let disk = Disk::open_saved(&disk, ImagePath::Saved(&anywhere()), false).unwrap();
    let event_loop = EventLoop::start().unwrap();
    let device = VirtioDevice::restore(&event_loop, saved.transport, Host::Disk(disk)).unwrap();
    let mut driver = Driver::attach(device, memory);
    assert_eq!(driver.wait_for_interrupt(), 1);
    assert_eq!(driver.used(), 2);
    assert_eq!(bytes(&driver, DATA, 512), [8; 512]);
    assert_eq!(bytes(&driver, RESULT, 1), [0]);
}

#[test]
fn an_interrupt_that_was_not_delivered_comes_after_a_restore() {
    let image = image();
    let mut driver = block(image.path(), true);
    driver.notify();
    driver.device.pause();
    let mut saved = VirtioState::decode(&driver.device.state()).unwrap();
    saved.transport.interrupt_status = 1;
    let disk = Disk::open(image.path(), true).unwrap();
    let event_loop = EventLoop::start().unwrap();
    let device = VirtioDevice::restore(&event_loop, saved.transport, Host::Disk(disk)).unwrap();
    let mut driver = Driver::attach(device, memory());
    assert_eq!(driver.wait_for_interrupt(), 1);
}

#[test]
fn a_disk_has_one_writer_or_many_readers() {
    let image = image();
    let writer = Disk::open(image.path(), false).unwrap();
    for read_only in [true, false] {
        let second = Disk::open(image.path(), read_only);
        assert!(matches!(second, Err(DiskError::InUse { .. })), "{second:?}");
    }
    drop(writer);
    let _readers =
        [Disk::open(image.path(), true).unwrap(), Disk::open(image.path(), true).unwrap()];
    assert!(matches!(Disk::open(image.path(), false), Err(DiskError::InUse { .. })));
}

fn anywhere() -> AllowedFolders {
    AllowedFolders::new(["/".into()])
}

#[test]
fn a_disk_that_changed_is_refused_unless_forced() {
    let image = image();
    let saved = Disk::open(image.path(), false).unwrap().state().clone();
    Disk::open_saved(&saved, ImagePath::Saved(&anywhere()), false).unwrap();
    let refused = Disk::open_saved(&saved, ImagePath::Saved(&AllowedFolders::default()), false);
    assert!(matches!(refused, Err(DiskError::NotAllowed { .. })), "{refused:?}");

    let copy = tempfile::NamedTempFile::new().unwrap();
    std::fs::copy(image.path(), copy.path()).unwrap();
    let times = std::fs::FileTimes::new();
    let mtime = image.as_file().metadata().unwrap().modified().unwrap();
    copy.as_file().set_times(times.set_modified(mtime)).unwrap();
    Disk::open_saved(&saved, ImagePath::Given(copy.path()), false).expect("a copy with its times");

    // Another content with the same times; then other times.
    std::os::unix::fs::FileExt::write_all_at(copy.as_file(), b"other", 9000).unwrap();
    copy.as_file().set_times(times.set_modified(mtime)).unwrap();
    let refused = Disk::open_saved(&saved, ImagePath::Given(copy.path()), false).unwrap_err();
    assert!(refused.to_string().contains("CRC-32"), "{refused}");
    copy.as_file().set_times(times.set_modified(std::time::UNIX_EPOCH)).unwrap();
    let refused = Disk::open_saved(&saved, ImagePath::Given(copy.path()), false).unwrap_err();
    assert!(refused.to_string().contains("change time"), "{refused}");
    Disk::open_saved(&saved, ImagePath::Given(copy.path()), true).expect("forced");

    copy.as_file().set_len(512).unwrap();
    let refused = Disk::open_saved(&saved, ImagePath::Given(copy.path()), true).unwrap_err();
    assert!(refused.to_string().contains("length in bytes is 512"), "{refused}");
    std::fs::remove_file(copy.path()).unwrap();
    let missing = Disk::open_saved(&saved, ImagePath::Given(copy.path()), true);
    assert!(matches!(missing, Err(DiskError::Io { what: "open", .. })), "{missing:?}");
}

#[test]
fn files_that_are_not_disks_are_refused() {
    let file = tempfile::NamedTempFile::new().unwrap();
    assert!(matches!(Disk::open(file.path(), true), Err(DiskError::Size { len: 0, .. })));
    file.as_file().set_len(513).unwrap();
    assert!(matches!(Disk::open(file.path(), true), Err(DiskError::Size { len: 513, .. })));
    let folder = Disk::open(Path::new("/"), true);
    assert!(matches!(folder, Err(DiskError::NotAFile { .. })), "{folder:?}");
    assert!(matches!(Disk::open(Path::new("/dev/null"), true), Err(DiskError::NotAFile { .. })));
}

fn block_below(path: &Path, place: &OverlayPlace) -> Driver {
    let event_loop = EventLoop::start().unwrap();
    let disk = Disk::open_below(path, place).unwrap();
    let device = VirtioDevice::create(&event_loop, Host::Disk(disk)).unwrap();
    let mut driver = Driver::attach(device, memory());
    driver.start();
    driver
}

/// The whole disk, through the device.
fn whole_disk(driver: &mut Driver) -> Vec<u8> {
    let len = SECTORS as u32 * 512;
    assert_eq!(request(driver, 0, 0, (DATA, len, WRITE)), (0, len + 1));
    bytes(driver, DATA, len as usize)
}

#[test]
fn an_overlay_takes_the_writes_and_ends_with_the_guest() {
    let image = image();
    let before = std::fs::read(image.path()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    for place in [OverlayPlace::Memory, OverlayPlace::Folder(folder.path().into())] {
        let mut driver = block_below(image.path(), &place);
        // Another guest uses it too, and one that would write it is refused.
        let mut twin = block_below(image.path(), &place);
        assert!(matches!(Disk::open(image.path(), false), Err(DiskError::InUse { .. })));
        let mut expected = before.clone();
        assert_eq!(whole_disk(&mut driver), expected);
        // Inside of a block; over its end; two whole ones; the end of the disk; again.
        let writes = [(1, 2, 0xa1), (15, 3, 0xa2), (24, 16, 0xa3), (63, 1, 0xa4), (2, 1, 0xa5)];
        for (sector, count, byte) in writes {
            let len = count as usize * 512;
            driver.memory.write_slice(&vec![byte; len], GuestAddress(DATA)).unwrap();
            assert_eq!(request(&mut driver, 1, sector, (DATA, count * 512, 0)), (0, 1));
            expected[sector as usize * 512..][..len].fill(byte);
            assert_eq!(whole_disk(&mut driver), expected, "{sector}");
        }
        set_header(&driver, 4, 0);
        assert_eq!(driver.run(&[(HEADER, 16, 0), (RESULT, 1, WRITE)]), 1);
        assert_eq!(whole_disk(&mut twin), before, "a twin's writes are visible");
        assert_eq!(std::fs::read(image.path()).unwrap(), before);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);

        // Saved and restored, with the image at its path or a copy.
        driver.device.pause();
        let saved = VirtioState::decode(&driver.device.state()).unwrap();
        let content = driver.device.content().unwrap().unwrap();
        let BackendState::Overlay(overlay) = saved.device else { panic!("{saved:?}") };
        assert_eq!(overlay.blocks, 6);
        assert_eq!(content.len(), 4 + 6 * (4 + 4096));
        let reopen = |content: &[u8], blocks| {
            Disk::open_saved_below(
                &overlay.disk,
                ImagePath::Saved(&anywhere()),
                false,
                &place,
                blocks,
                content,
            )
        };
        let disk = reopen(&content, 6).unwrap();
        let event_loop = EventLoop::start().unwrap();
        let device = VirtioDevice::restore(&event_loop, saved.transport, Host::Disk(disk)).unwrap();
        let mut restored = Driver::attach(device, Arc::clone(&driver.memory));
        assert_eq!(whole_disk(&mut restored), expected);
        assert_eq!(restored.device.content().unwrap().unwrap(), content);

        for at in [0, 3, 4, 100, content.len() - 1] {
            assert!(matches!(reopen(&content[..at], 6), Err(DiskError::Overlay { .. })), "{at}");
        }
        for (at, byte) in [(0, 7), (4, 1), (7, 1), (4, 2)] {
            let mut bad = content.clone();
            bad[at] = byte;
            assert!(matches!(reopen(&bad, 6), Err(DiskError::Overlay { .. })), "{at}");
        }
        assert!(matches!(reopen(&content, 5), Err(DiskError::Overlay { .. })));
        assert!(matches!(reopen(&content, u32::MAX), Err(DiskError::Overlay { .. })));
        assert!(matches!(reopen(&[], 6), Err(DiskError::Overlay { .. })));
    }
    let nowhere = OverlayPlace::Folder(folder.path().join("none"));
    assert!(matches!(Disk::open_below(image.path(), &nowhere), Err(DiskError::Overlay { .. })));
}

#[test]
fn entropy_fills_the_given_buffers() {
    let event_loop = EventLoop::start().unwrap();
    let device = VirtioDevice::create(&event_loop, Host::Entropy).unwrap();
    let mut driver = Driver::attach(device, memory());
    driver.start();
    assert_eq!(driver.get(0x08), 4);
    assert_eq!(driver.run(&[(DATA, 64, WRITE), (DATA + 0x100, 64, WRITE)]), 128);
    let (first, second) = (bytes(&driver, DATA, 64), bytes(&driver, DATA + 0x100, 64));
    assert_ne!(first, second);
    assert_eq!(bytes(&driver, DATA + 64, 64), [0; 64]);
    driver.chain(0, &[(BROKEN_GPA, 64, WRITE)]);
    driver.offer(0);
    driver.notify();
    let stop = driver.wait_for_stop();
    assert_eq!(stop, Stop::MemoryError { gpa: Some(BROKEN_GPA), host_addr: None });
}

/// A fresh guest's memory is a shared file, a restored one's is private. Each gives its pages back differently.
#[test]
fn reported_pages_are_given_back() {
    const FREE: u64 = 0x4_0000;
    let private =
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY_BYTES as usize)]).unwrap();
    for memory in [memory(), Arc::new(private)] {
        let event_loop = EventLoop::start().unwrap();
        let host = Host::Balloon(super::BalloonState::default());
        let device = VirtioDevice::create(&event_loop, host).unwrap();
        let mut driver = Driver::attach(device, memory);
        driver.start_queues(3);
        assert_eq!(driver.get(0x08), 5);
        driver.memory.write_slice(&[7; 0x6000], GuestAddress(FREE)).unwrap();
        // Two pages, one page with parts of its neighbours, and half a page.
        let report =
            [(FREE, 0x2000, WRITE), (FREE + 0x2800, 0x2000, WRITE), (FREE + 0x5000, 0x800, WRITE)];
        driver.offer_in(2, 0, &report);
        driver.wait_used_in(2, 1);
        let page = |at: u64| bytes(&driver, FREE + at, 0x1000);
        assert_eq!([page(0), page(0x1000), page(0x3000)], [const { [0; 0x1000] }; 3]);
        assert_eq!([page(0x2000), page(0x4000), page(0x5000)], [const { [7; 0x1000] }; 3]);
        driver.device.pause();
        let state = VirtioState::decode(&driver.device.state()).unwrap();
        let BackendState::Balloon(balloon) = state.device else { panic!("{state:?}") };
        assert_eq!(balloon.returned_bytes, 3 << 12);
    }
}

#[test]
fn a_balloon_takes_pages_and_reports_their_number() {
    let event_loop = EventLoop::start().unwrap();
    let host = Host::Balloon(super::BalloonState::default());
    let mut driver = Driver::attach(VirtioDevice::create(&event_loop, host).unwrap(), memory());
    driver.start_queues(3);
    driver.memory.write_slice(&[7; 0x8000], GuestAddress(0x4_0000)).unwrap();
    driver.memory.write_obj([0x45u32, 0x41, 0x40], GuestAddress(DATA)).unwrap();
    driver.offer_in(0, 0, &[(DATA, 12, 0)]);
    driver.wait_used_in(0, 1);
    let first: Vec<u8> = (0..8).map(|page| bytes(&driver, 0x4_0000 + (page << 12), 1)[0]).collect();
    assert_eq!(first, [0, 0, 7, 7, 7, 0, 7, 7]);
    driver.device.write(0x104, &3u32.to_le_bytes());
    driver.device.write(0x100, &9u32.to_le_bytes());
    driver.device.write(0x106, &9u32.to_le_bytes());
    assert_eq!((driver.get(0x100), driver.get(0x104)), (0, 3));
    // Out again: nothing to do.
    driver.offer_in(1, 0, &[(DATA, 12, 0)]);
    driver.wait_used_in(1, 1);
    type Chain<'a> = &'a [(u64, u32, u16)];
    let attacks: [(u32, Chain<'_>); 4] = [
        (0, &[(DATA + 12, 4, 0)]),
        (0, &[(DATA, 13, 0)]),
        (0, &[(DATA, 4100, 0)]),
        (2, &[(DATA, 16, 0), (0x4_2000, 0x1000, WRITE)]),
    ];
    driver.memory.write_obj(u32::MAX, GuestAddress(DATA + 12)).unwrap();
    for (queue, chain) in attacks {
        driver.offer_in(queue, 0, chain);
        while driver.wait_for_interrupt() & 2 == 0 {}
        assert_eq!(driver.get(STATUS), 15 | NEEDS_RESET, "{chain:?}");
        driver.start_queues(3);
    }
    assert_eq!(bytes(&driver, 0x4_2000, 1), [7]);
}
