//! Prints the first bytes of one page of a snapshot.
//!
//!     cargo run -p snapfmt --example read_page -- guest.snap 5

use std::error::Error;

use snapfmt::layout::PAGE_BYTES;
use snapfmt::{ChunkBuffer, PageIndex, Snapshot};

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(file), Some(number)) = (args.next(), args.next()) else {
        return Err("usage: read_page FILE PAGE".into());
    };
    let snapshot = Snapshot::open(file)?;
    let page = PageIndex(number.parse()?);

    // The buffer keeps the last chunk, so that its other pages are not decompressed again.
    let (mut buffer, mut bytes) = (ChunkBuffer::new(), [0; PAGE_BYTES]);
    snapshot.read_page(page, &mut buffer, &mut bytes)?;
    println!("page {number}: {:02x?}", &bytes[..32]);
    Ok(())
}
