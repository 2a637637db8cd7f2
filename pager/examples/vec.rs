//! Pages a plain process' memory from a `Vec<u8>`: `cargo run -p pager --example vec`.

use std::sync::Arc;

use pager::{Pager, Region, VecSource};

const LEN: usize = 64 << 20;

#[allow(unsafe_code)]
fn main() -> Result<(), Box<dyn std::error::Error>> {
    // The content: each byte says in which page it is. It comes in chunks of 64 KiB.
    let content: Vec<u8> = (0..LEN).map(|at| (at / 4096) as u8).collect();
    let source = Arc::new(VecSource::new(content, 64 << 10));

    // Memory in which nothing is yet.
    let (prot, flags) =
        (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a new mapping at an address of the kernel's choice.
    let memory = unsafe { libc::mmap(std::ptr::null_mut(), LEN, prot, flags, -1, 0) };
    if memory == libc::MAP_FAILED {
        return Err(std::io::Error::last_os_error().into());
    }
    // SAFETY: mapped until the process ends, accessed only through a raw pointer.
    let region = unsafe { Region::new(memory as u64, LEN as u64, 4096, 0) }?;
    let pager = Pager::builder(source).region(region).start()?;

    for page in [0, 77, 4095, 16_000, 78] {
        let first = memory.cast::<u8>().wrapping_add(page * 4096);
        // SAFETY: inside the mapping.
        let byte = unsafe { first.read_volatile() };
        println!("page {page} begins with {byte}");
        assert_eq!(byte, page as u8);
    }
    let stats = pager.stop();
    println!(
        "{} faults brought {} of {} pages",
        stats.faults, stats.pages.present, stats.pages.total
    );
    Ok(())
}
