//! Disk images in formats of other programs, recognized by their first and last bytes as in QEMU (the `*_probe`
//! functions in its `block/`). A guest that got one as its disk would see the format's tables instead of the disk.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// The length that has all signatures at the front.
const HEAD_BYTES: usize = 128;
/// The length that has those at the end.
const TAIL_BYTES: usize = 512;

/// Formats by a signature at a place in the head.
const HEADS: [(&str, usize, &[u8]); 18] = [
    ("qcow2", 0, b"QFI\xfb"),
    ("QED", 0, b"QED\0"),
    ("VMDK", 0, b"KDMV"),
    ("VMDK", 0, b"COWD"),
    ("VMDK", 0, &[0xbe, 0xba, 0xfe, 0xca, 0, 0, 0, 0]),
    ("VMDK", 0, b"# Disk DescriptorFile"),
    ("VHDX", 0, b"vhdxfile"),
    ("VHD", 0, b"conectix"),
    ("VDI", 64, &[0x7f, 0x10, 0xda, 0xbe]),
    ("Parallels", 0, b"WithoutFreeSpace"),
    ("Parallels", 0, b"WithouFreSpacExt"),
    ("Bochs", 0, b"Bochs Virtual HD Image"),
    ("cloop", 0, b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop"),
    ("gzip", 0, &[0x1f, 0x8b, 8]),
    ("xz", 0, b"\xfd7zXZ\0"),
    ("zstd", 0, &[0x28, 0xb5, 0x2f, 0xfd]),
    ("bzip2", 4, b"1AY&SY"),
    ("lz4", 0, &[0x04, 0x22, 0x4d, 0x18]),
];

/// Formats by a signature at the start of the last 512 bytes. A fixed VHD is a raw image with such an end.
const TAILS: [(&str, &[u8]); 2] = [("VHD", b"conectix"), ("DMG", b"koly")];

/// The format of an image of `len` bytes, if it is that of another program.
pub(super) fn foreign(image: &File, len: u64) -> io::Result<Option<&'static str>> {
    let (mut head, mut tail) = ([0; HEAD_BYTES], [0; TAIL_BYTES]);
    let head_bytes = HEAD_BYTES.min(len as usize);
    image.read_exact_at(&mut head[..head_bytes], 0)?;
    if let Some(tail_at) = len.checked_sub(TAIL_BYTES as u64) {
        image.read_exact_at(&mut tail, tail_at)?;
    }
    Ok(of_bytes(&head, &tail))
}

fn of_bytes(head: &[u8; HEAD_BYTES], tail: &[u8; TAIL_BYTES]) -> Option<&'static str> {
    let at_front = HEADS.iter().find(|(_, at, signature)| head[*at..].starts_with(signature));
    let at_end = || TAILS.iter().find(|(_, signature)| tail.starts_with(signature));
    at_front.map(|(name, ..)| *name).or_else(|| at_end().map(|(name, _)| *name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_signature_is_known_at_its_place_only() {
        for (name, at, signature) in HEADS {
            let (mut head, tail) = ([0; HEAD_BYTES], [0; TAIL_BYTES]);
            head[at..at + signature.len()].copy_from_slice(signature);
            assert_eq!(of_bytes(&head, &tail), Some(name));
            head.rotate_right(1);
            assert_eq!(of_bytes(&head, &tail), None, "{name}");
        }
        for (name, signature) in TAILS {
            let (head, mut tail) = ([0; HEAD_BYTES], [0; TAIL_BYTES]);
            tail[..signature.len()].copy_from_slice(signature);
            assert_eq!(of_bytes(&head, &tail), Some(name));
        }
    }

    #[test]
    fn content_of_disks_has_no_format() {
        let mut head = [0; HEAD_BYTES];
        // Zeros, a boot sector, an encrypted volume.
        for start in [&[][..], &[0xeb, 0x63, 0x90], b"LUKS\xba\xbe"] {
            head[..start.len()].copy_from_slice(start);
            assert_eq!(of_bytes(&head, &[0; TAIL_BYTES]), None);
        }
    }

    #[test]
    fn an_image_shorter_than_a_signature_has_none() {
        let file = tempfile::tempfile().expect("a file");
        for len in [0, 1, 100, 511] {
            file.set_len(len).expect("it grows");
            assert_eq!(foreign(&file, len).expect("it is read"), None);
        }
    }
}
