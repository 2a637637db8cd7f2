//! Code of tiny guests that drive one virtio device, in 32-bit mode, without interrupts.

/// Where the guest's rings are.
pub(crate) const DESCRIPTORS: u32 = 0x30_0000;
pub(crate) const AVAILABLE: u32 = DESCRIPTORS + 0x1000;
pub(crate) const USED: u32 = DESCRIPTORS + 0x2000;
/// The first device's window.
pub(crate) const DEVICE: u32 = 0xd000_0000;

pub(crate) const NEXT: u32 = 1;
pub(crate) const WRITE: u32 = 2;

/// mov dword \[address\], value
pub(crate) fn set(address: u32, value: u32) -> Vec<u8> {
    [&[0xc7, 0x05][..], &address.to_le_bytes(), &value.to_le_bytes()].concat()
}

/// Sets the device up, with these features (the low half) and one queue of 16.
pub(crate) fn start(features: u32, queue: u32) -> Vec<u8> {
    [
        // Reset, ACKNOWLEDGE | DRIVER; features, VERSION_1; FEATURES_OK.
        (0x70, 0),
        (0x70, 3),
        (0x24, 0),
        (0x20, features),
        (0x24, 1),
        (0x20, 1),
        (0x70, 11),
        // Descriptors, available and used ring; DRIVER_OK.
        (0x30, queue),
        (0x38, 16),
        (0x80, DESCRIPTORS),
        (0x90, AVAILABLE),
        (0xa0, USED),
        (0x44, 1),
        (0x70, 15),
    ]
    .map(|(register, value)| set(DEVICE + register, value))
    .concat()
}

/// The chain of these buffers (address, length, WRITE or 0), as request number `count`, from 1 on, of the queue; waits
/// until it is returned.
pub(crate) fn submit(queue: u32, count: u8, buffers: &[(u32, u32, u32)]) -> Vec<u8> {
    let mut code = Vec::new();
    for (index, &(gpa, len, flags)) in (0..).zip(buffers) {
        let last = index as usize + 1 == buffers.len();
        let next = if last { 0 } else { NEXT | (index + 1) << 16 };
        let at = DESCRIPTORS + index * 16;
        for (offset, value) in [(0, gpa), (4, 0), (8, len), (12, flags | next)] {
            code.extend(set(at + offset, value));
        }
    }
    // Every entry of the ring is descriptor 0.
    code.extend(set(AVAILABLE, u32::from(count) << 16));
    code.extend(set(DEVICE + 0x50, queue));
    // 1: cmp word [used index], count; jne 1b
    code.extend([0x66, 0x83, 0x3d]);
    code.extend((USED + 2).to_le_bytes());
    code.extend([count, 0x75, 0xf6]);
    code
}

/// rep stosd of a letter.
pub(crate) fn fill(gpa: u32, len: u32, letter: u8) -> Vec<u8> {
    // mov edi, gpa; mov ecx, len / 4; mov eax, letters
    let args = [(0xbf, gpa), (0xb9, len / 4), (0xb8, u32::from_le_bytes([letter; 4]))];
    let load = |(register, value): (u8, u32)| [&[register][..], &value.to_le_bytes()].concat();
    [args.map(load).concat(), vec![0xfc, 0xf3, 0xab]].concat()
}

/// Prints the letter at this address, `0` for a zero, and a newline.
pub(crate) fn show(gpa: u32) -> Vec<u8> {
    [
        &[0xa0][..], // mov al, [gpa]
        &gpa.to_le_bytes(),
        &[0x84, 0xc0, 0x75, 0x02, 0xb0, b'0'], // test al, al; jnz +2; mov al, '0'
        &[0x66, 0xba, 0xf8, 0x03, 0xee, 0xb0, b'\n', 0xee], // mov dx, 0x3f8; out; newline; out
    ]
    .concat()
}

/// Requests a snapshot.
pub(crate) fn request() -> Vec<u8> {
    crate::kernel::out(0x680, 1)[..7].to_vec()
}
