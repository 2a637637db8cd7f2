//! Tiny kernels that replace Linux in tests: ELF files of a few instructions.
#![allow(dead_code, missing_docs, unreachable_pub)]

/// Where they are loaded and entered.
pub const LOAD_GPA: u32 = 0x10_0000;

/// Writes the command line and a newline to COM1, in 32-bit mode with PVH's start info in EBX.
pub const PRINT_CMDLINE_PVH: &[u8] = &[
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0x8b, 0x73, 0x18, // mov esi, [ebx + 24]
    0xac, 0x84, 0xc0, 0x74, 0x03, 0xee, 0xeb, 0xf8, // out dx, al for each byte up to a zero
    0xb0, b'\n', 0xee, // mov al, '\n'; out dx, al
];

/// The same in 64-bit mode, with the boot parameters in RSI.
pub const PRINT_CMDLINE_64: &[u8] = &[
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0x8b, 0xb6, 0x28, 0x02, 0, 0, // mov esi, [rsi + 0x228]
    0xac, 0x84, 0xc0, 0x74, 0x03, 0xee, 0xeb, 0xf8, // as above
    0xb0, b'\n', 0xee,
];

/// Puts a program at 0x8000 and starts the second CPU there; it writes "A\n" in an endless loop.
pub const START_SECOND_CPU: &[u8] = &[
    // mov dword [0x8000 ..], "mov dx, 0x3f8; 1: mov al, 'A'; out; mov al, '\n'; out; jmp 1b"
    0xc7, 0x05, 0x00, 0x80, 0, 0, 0xba, 0xf8, 0x03, 0xb0, //
    0xc7, 0x05, 0x04, 0x80, 0, 0, b'A', 0xee, 0xb0, b'\n', //
    0xc7, 0x05, 0x08, 0x80, 0, 0, 0xee, 0xeb, 0xf8, 0x90, //
    // The local APIC's spurious interrupt register: on.
    0xc7, 0x05, 0xf0, 0x00, 0xe0, 0xfe, 0xff, 0x01, 0, 0, //
    // The local APIC's interrupt command register: to CPU 1, INIT, then start-up at page 8.
    0xc7, 0x05, 0x10, 0x03, 0xe0, 0xfe, 0, 0, 0, 1, //
    0xc7, 0x05, 0x00, 0x03, 0xe0, 0xfe, 0x00, 0x45, 0, 0, //
    0xc7, 0x05, 0x00, 0x03, 0xe0, 0xfe, 0x08, 0x46, 0, 0, //
    0xeb, 0xfe, // jmp .
];

/// Writes a byte to a port, then loops.
pub fn out(port: u16, value: u8) -> Vec<u8> {
    let [low, high] = port.to_le_bytes();
    vec![0x66, 0xba, low, high, 0xb0, value, 0xee, 0xeb, 0xfe]
}

/// Powers off by ACPI's sleep control register.
pub fn power_off() -> Vec<u8> {
    out(0x600, 0x34)
}

/// An ELF executable with one segment of `memory_bytes`, and PVH's note if it has that entry.
pub fn elf(code: &[u8], pvh: bool, memory_bytes: u64) -> Vec<u8> {
    let headers = 64 + 56 * 2;
    let note_at = (headers + code.len()).next_multiple_of(4);
    let mut file = vec![0; 64];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"\x7fELF\x02\x01\x01");
    put(16, &2u16.to_le_bytes());
    put(18, &62u16.to_le_bytes());
    put(20, &1u32.to_le_bytes());
    put(24, &u64::from(LOAD_GPA).to_le_bytes());
    put(32, &64u64.to_le_bytes());
    put(52, &64u16.to_le_bytes());
    put(54, &56u16.to_le_bytes());
    put(56, &(1 + u16::from(pvh)).to_le_bytes());
    let mut segment = |kind: u32, offset: usize, gpa: u32, len: usize, memory: u64| {
        file.extend(kind.to_le_bytes());
        file.extend(5u32.to_le_bytes());
        let (offset, gpa, len) = (offset as u64, u64::from(gpa), len as u64);
        for field in [offset, gpa, gpa, len, memory, 4] {
            file.extend(field.to_le_bytes());
        }
    };
    segment(1, headers, LOAD_GPA, code.len(), memory_bytes.max(code.len() as u64));
    segment(4, note_at, 0, 20, 20);
    file.extend(code);
    file.resize(note_at, 0);
    for word in [4, 4, 18, u32::from_le_bytes(*b"Xen\0"), LOAD_GPA] {
        file.extend(word.to_le_bytes());
    }
    file
}
