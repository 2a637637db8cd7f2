//! Pages memory of this process from a `Vec<u8>`: `cargo run -p snapvm-pager --example vec`.
#![allow(unsafe_code)]

use pager::{Pager, Region, Stats, VecSource};

const LEN: usize = 64 << 20;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // The content: each byte is the number of its page. It is loaded in chunks of 64 KiB.
    let content: Vec<u8> = (0..LEN).map(|at| (at / 4096) as u8).collect();
    let source = std::sync::Arc::new(VecSource::new(content, 64 << 10));
    // Empty memory.
    let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANON);
    // SAFETY: a new mapping at an address of the kernel's choice.
    let memory = unsafe { libc::mmap(std::ptr::null_mut(), LEN, prot, flags, -1, 0) };
    assert_ne!(memory, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
    // SAFETY: mapped until the process ends, accessed only through a raw pointer.
    let region = unsafe { Region::new(memory as u64, LEN as u64, 4096, 0) }?;
    let pager = Pager::builder(source).region(region).start()?;
    for page in [0, 77, 4095, 16_000, 78] {
        // SAFETY: inside the mapping.
        let byte = unsafe { memory.cast::<u8>().wrapping_add(page * 4096).read_volatile() };
        println!("page {page} begins with {byte}");
        assert_eq!(byte, page as u8);
    }
    let Stats { faults, pages, .. } = pager.stop();
    println!("{faults} faults loaded {} of {} pages", pages.present, pages.total);
    Ok(())
}
