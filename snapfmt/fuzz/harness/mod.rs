//! The functions of the fuzz targets. libFuzzer calls them on nightly; `tests/fuzz_corpus.rs` calls them on stable,
//! with the seeds and some thousand mutations of them.
#![allow(dead_code, reason = "each target and test uses a part of it")]

pub(crate) mod exercise;
pub(crate) mod forge;
pub(crate) mod seal;
pub(crate) mod sealed;

use forge::{Forge, Slot};
use snapfmt::Snapshot;

/// Small snapshots of each codec, 2 MiB + 32 KiB of memory in two regions, two leaves, two states.
pub(crate) const TEMPLATES: [&[u8]; 3] = [
    include_bytes!("../templates/raw.snap"),
    include_bytes!("../templates/lz4.snap"),
    include_bytes!("../templates/zstd.snap"),
];

/// A layer of the lz4 template.
pub(crate) const LAYER: &[u8] = include_bytes!("../templates/layer.snap");
/// Its number among the templates.
pub(crate) const LAYER_NUMBER: u8 = 3;
/// The number of its parent, with the unchanged layer on top.
pub(crate) const PARENT_NUMBER: u8 = 5;

/// A snapshot with a working set, whose pages are at the front.
pub(crate) const HOT: &[u8] = include_bytes!("../templates/hot.snap");
/// Its number among the templates.
pub(crate) const HOT_NUMBER: u8 = 4;

/// A snapshot with the feature BOUND; the others are older.
pub(crate) const BOUND: &[u8] = include_bytes!("../templates/bound.snap");
/// Its number among the templates.
pub(crate) const BOUND_NUMBER: u8 = 6;

/// A sealed snapshot, with a state and a working set. Patches change what is encrypted in it.
pub(crate) const SEALED: &[u8] = include_bytes!("../templates/sealed.snap");
/// Its number among the templates.
pub(crate) const SEALED_NUMBER: u8 = 7;
/// Its number for patches of the bytes of the file, which are not encrypted again.
pub(crate) const CIPHERTEXT_NUMBER: u8 = 8;

/// In place of a template's number: the rest of the input is the file.
pub(crate) const AS_IS: u8 = 0xff;

/// A patch with this as its part sets the length of the file.
pub(crate) const SET_LENGTH: u8 = 0xff;

/// Input: the template's number (1 byte), which checksums to correct afterwards (1 byte, see [`seal`]), then patches.
///
/// A patch is a part (1 byte: 0 the header, 1 the section table, then the sections), an offset in
/// it (2 bytes), a length (1 byte, modulo 16, plus 1) and as many bytes. So the fuzzer's inputs
/// are a few bytes long, every one of them means something, and an empty one is a good file.
pub(crate) fn open_and_read(input: &[u8]) {
    let [template, seals, patches @ ..] = input else {
        return;
    };
    if *template == SEALED_NUMBER {
        let opened = sealed::Opened::new(SEALED);
        let file = opened.sealed(patched_in(&opened.plain, SEALED, patches), *seals);
        let _ = exercise::read_sealed(&file, sealed::KEY);
        return;
    }
    let mut file = match *template {
        CIPHERTEXT_NUMBER => patched(SEALED, patches),
        AS_IS => patches.to_vec(),
        LAYER_NUMBER => patched(LAYER, patches),
        HOT_NUMBER => patched(HOT, patches),
        BOUND_NUMBER => patched(BOUND, patches),
        PARENT_NUMBER => patched(TEMPLATES[1], patches),
        number => patched(TEMPLATES[usize::from(number) % TEMPLATES.len()], patches),
    };
    seal::seal(&mut file, *seals);
    // Any result is allowed except a panic, or two results that contradict each other.
    let chain = |layers: [&[u8]; 2]| {
        Snapshot::chain(layers).and_then(|snapshot| exercise::read_everything(&snapshot))
    };
    let _ = match *template {
        LAYER_NUMBER => chain([&file, TEMPLATES[1]]),
        PARENT_NUMBER => chain([LAYER, &file]),
        CIPHERTEXT_NUMBER => exercise::read_sealed(&file, sealed::KEY),
        _ => exercise::read_file(&file[..]),
    };
}

fn patched(template: &[u8], patches: &[u8]) -> Vec<u8> {
    patched_in(template, template, patches)
}

/// A changed copy of `content`, whose parts are where those of the template are.
fn patched_in(content: &[u8], template: &[u8], mut patches: &[u8]) -> Vec<u8> {
    let parts = seal::parts(template);
    let mut file = content.to_vec();
    while let [part, a, b, len, rest @ ..] = patches {
        let offset = usize::from(u16::from_le_bytes([*a, *b]));
        if *part == SET_LENGTH {
            file.resize(offset, 0);
            patches = rest;
            continue;
        }
        let (bytes, rest) = rest.split_at((usize::from(*len) % 16 + 1).min(rest.len()));
        let start = parts[usize::from(*part) % parts.len()] + offset;
        for (at, byte) in (start..).zip(bytes) {
            if let Some(target) = file.get_mut(at) {
                *target = *byte;
            }
        }
        patches = rest;
    }
    file
}

/// Input: codec, and 4 for a file with the feature BOUND (1 byte), pages (2 bytes), a difference to the right payload
/// length (1 byte), the slot of the first page's entry (2 bytes), the last byte of the padding (1 byte), the payload.
pub(crate) fn chunk(input: &[u8]) {
    let [codec, a, b, difference, c, d, padding, payload @ ..] = input else {
        return;
    };
    let pages = u16::from_le_bytes([*a, *b]);
    let mut forge = Forge::new(4096 * 512);
    forge.bound = *codec & 4 != 0;
    let list: Vec<u32> = (0..u32::from(pages).min(512)).collect();
    let place = forge.chunk(*codec % 4, pages, &list, payload, |chunk| {
        let declared = (payload.len() as u32).wrapping_add_signed((*difference as i8).into());
        chunk[8..12].copy_from_slice(&declared.to_le_bytes());
        if let Some(last) = chunk.last_mut() {
            *last |= *padding;
        }
    });
    for page in list {
        let slot = if page == 0 { u16::from_le_bytes([*c, *d]) % 512 } else { page as u16 };
        forge.entry(page, place.entry(Slot(slot)));
    }
    let _ = exercise::read_file(forge.finish());
}
