//! The instructions of the guests: a kernel for the 64-bit boot protocol, which works in ring 3, because that runs natively
//! even on hosts whose KVM emulates ring 0.
#![allow(unsafe_code)]

use std::arch::global_asm;

use crate::{AREA, BLOCK_BYTES, Work};

global_asm!(
    ".pushsection .rodata.live_guest, \"a\", @progbits",
    ".global live_guest_start",
    ".hidden live_guest_start",
    ".global live_guest_end",
    ".hidden live_guest_end",
    ".set LIVE_LOAD, 0x100000",
    // esi: the next random number. Uses eax.
    ".macro LIVE_RANDOM",
    "  mov eax, esi",
    "  shl eax, 13",
    "  xor esi, eax",
    "  mov eax, esi",
    "  shr eax, 17",
    "  xor esi, eax",
    "  mov eax, esi",
    "  shl eax, 5",
    "  xor esi, eax",
    ".endm",
    // rax: the offset of a random word of the area.
    ".macro LIVE_OFFSET",
    "  LIVE_RANDOM",
    "  mov eax, esi",
    "  imul rax, rbx",
    "  shr rax, 32",
    "  and eax, -4",
    ".endm",
    "live_guest_start:",
    "  jmp 1f",
    ".balign 8",
    // The work, the bytes of memory that are filled, the bytes of the area, and its steps for each byte on the console:
    // `code` fills them in.
    "8: .long 0, 0, 0, 0",
    "1:",
    "  cli",
    "  mov esp, 0x208000",
    // Page tables for the first GiB, for ring 3. This memory is zero.
    "  mov dword ptr [0x200000], 0x201007",
    "  mov dword ptr [0x201000], 0x202007",
    "  mov edi, 0x202000",
    "  mov eax, 0x87",
    "  mov ecx, 512",
    "2:",
    "  mov [rdi], eax",
    "  add eax, 0x200000",
    "  add edi, 8",
    "  dec ecx",
    "  jnz 2b",
    "  mov eax, 0x200000",
    "  mov cr3, rax",
    // Segments: code and data of ring 0, data and code of ring 3, and a task state segment that allows all ports.
    "  mov rax, 0x00209a0000000000",
    "  mov [0x203008], rax",
    "  mov rax, 0x0000920000000000",
    "  mov [0x203010], rax",
    "  mov rax, 0x0000f20000000000",
    "  mov [0x203018], rax",
    "  mov rax, 0x0020fa0000000000",
    "  mov [0x203020], rax",
    "  mov rax, 0x0000892040002067",
    "  mov [0x203028], rax",
    "  mov word ptr [0x204066], 0x68",
    "  mov word ptr [0x203100], 0x37",
    "  mov dword ptr [0x203102], 0x203000",
    "  lgdt [0x203100]",
    "  mov eax, 0x28",
    "  ltr ax",
    "  push 0x1b",
    "  push 0x208000",
    "  push 0x3002",
    "  push 0x23",
    "  lea rax, [rip + 3f]",
    "  push rax",
    "  iretq",
    "3:",
    "  mov esi, 0x12345679",
    "  mov ebx, [rip + 8b + 4]",
    "  mov edi, {area}",
    "  mov ecx, ebx",
    "  shr ecx, 2",
    "4:",
    "  LIVE_RANDOM",
    "  mov [rdi], esi",
    "  add edi, 4",
    "  dec ecx",
    "  jnz 4b",
    "  mov edi, {area}",
    "  mov ebx, [rip + 8b + 8]",
    "5:",
    "  mov r8d, [rip + 8b + 12]",
    "  mov eax, [rip + 8b]",
    "  cmp eax, {write}",
    "  je 20f",
    "  ja 30f",
    "10:",
    "  LIVE_OFFSET",
    "  mov edx, [rax + {area}]",
    "  dec r8d",
    "  jnz 10b",
    "  jmp 6f",
    "20:",
    "  LIVE_OFFSET",
    "  mov [rax + {area}], esi",
    "  dec r8d",
    "  jnz 20b",
    "  jmp 6f",
    "30:",
    "  mov [rdi], esi",
    "  add edi, {block_bytes}",
    "  lea eax, [rbx + {area}]",
    "  cmp edi, eax",
    "  jb 31f",
    "  mov edi, {area}",
    "31:",
    "  dec r8d",
    "  jnz 30b",
    "6:",
    "  mov edx, 0x3f8",
    "  out dx, al",
    "  jmp 5b",
    "live_guest_end:",
    ".popsection",
    area = const AREA,
    block_bytes = const BLOCK_BYTES,
    write = const Work::Write as u32,
);

unsafe extern "C" {
    static live_guest_start: u8;
    static live_guest_end: u8;
}

/// Where the guest reads what it is to do.
const PARAMS_AT: usize = 8;

/// The instructions of a guest that fills memory, and then does `work` in an area, its begin, with `steps` for each byte
/// on its console.
pub(crate) fn code(work: Work, filled_bytes: u32, area_bytes: u32, steps: u32) -> Vec<u8> {
    let (start, end) = (&raw const live_guest_start, &raw const live_guest_end);
    // SAFETY: the two symbols are the begin and the end of the constant data above.
    let code = unsafe { std::slice::from_raw_parts(start, end.addr() - start.addr()) };
    let mut code = code.to_vec();
    let params = [work as u32, filled_bytes, area_bytes, steps].map(u32::to_le_bytes).concat();
    code[PARAMS_AT..PARAMS_AT + params.len()].copy_from_slice(&params);
    code
}
