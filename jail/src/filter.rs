//! A role's table as a program of classic BPF, which the kernel runs at each system call.
//!
//! The program checks the architecture, then finds the call in a binary tree, then checks its arguments. Of an argument
//! only the low 32 bits are compared: the kernel uses no more of those that the table checks.

use std::sync::OnceLock;

use libc::{c_long, sock_filter};

use crate::role::Role;
use crate::table::{self, Rule, When};

const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
const JUMP: u16 = (libc::BPF_JMP | libc::BPF_JA) as u16;
const IF_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
const IF_AT_LEAST: u16 = (libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K) as u16;
const IF_ANY_BIT: u16 = (libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K) as u16;
const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;

const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
const TRAP: u32 = libc::SECCOMP_RET_TRAP;

/// AUDIT_ARCH_X86_64 of linux/audit.h: EM_X86_64, 64 bits, little endian.
const ARCH: u32 = 62 | 0x8000_0000 | 0x4000_0000;

/// Offsets in `struct seccomp_data`.
const NUMBER_AT: u32 = 0;
const ARCH_AT: u32 = 4;
const ARGS_AT: u32 = 16;

/// The program of a role, which is made once.
pub(crate) fn program(role: Role) -> &'static [sock_filter] {
    static PROGRAMS: [OnceLock<Vec<sock_filter>>; Role::ALL.len()] =
        [const { OnceLock::new() }; Role::ALL.len()];
    PROGRAMS[role as usize].get_or_init(|| make(role))
}

fn make(role: Role) -> Vec<sock_filter> {
    let mut rules: Vec<&Rule> = table::of(role).iter().flat_map(|part| part.iter()).collect();
    // Stable: of one call, the checks stay in the order of the table.
    rules.sort_by_key(|rule| rule.call);
    let mut program = vec![
        statement(LOAD, ARCH_AT),
        branch(IF_EQUAL, ARCH, 1, 0),
        statement(RETURN, TRAP),
        statement(LOAD, NUMBER_AT),
    ];
    program.extend(tree(&segments(&rules)));
    program
}

/// Numbers of calls from `first` on, up to the next segment, and what is done with them.
struct Segment {
    first: u32,
    allowed: bool,
    checks: Vec<sock_filter>,
}

/// All numbers, in order. Neighbours that are allowed without conditions are one segment.
fn segments(rules: &[&Rule]) -> Vec<Segment> {
    let refused = |first| Segment { first, allowed: false, checks: vec![statement(RETURN, TRAP)] };
    let mut segments = vec![refused(0)];
    for rules in rules.chunk_by(|one, other| one.call == other.call) {
        let first = number(rules[0].call);
        if segments.last().is_some_and(|last| last.first == first) {
            segments.pop();
        }
        let allowed = rules.iter().any(|rule| matches!(rule.when, When::Always));
        if !(allowed && segments.last().is_some_and(|last| last.allowed)) {
            segments.push(Segment { first, allowed, checks: checks(rules) });
        }
        segments.push(refused(first + 1));
    }
    segments
}

/// Finds the segment of a number.
fn tree(segments: &[Segment]) -> Vec<sock_filter> {
    match segments {
        [] => vec![statement(RETURN, TRAP)],
        [segment] => segment.checks.clone(),
        _ => {
            let (lower, upper) = segments.split_at(segments.len() / 2);
            let (first, lower, upper) = (upper[0].first, tree(lower), tree(upper));
            // A conditional jump reaches 255 instructions, an unconditional one all.
            let mut node = match u8::try_from(lower.len()) {
                Ok(len) => vec![branch(IF_AT_LEAST, first, len, 0)],
                Err(_) => {
                    vec![branch(IF_AT_LEAST, first, 0, 1), statement(JUMP, lower.len() as u32)]
                }
            };
            node.extend(lower);
            node.extend(upper);
            node
        }
    }
}

/// The checks of one call: the first that applies decides. A list of values has 1 to 256.
fn checks(rules: &[&Rule]) -> Vec<sock_filter> {
    // The cheapest first.
    if rules.iter().any(|rule| matches!(rule.when, When::Always)) {
        return vec![statement(RETURN, ALLOW)];
    }
    let mut program = Vec::new();
    for rule in rules {
        match rule.when {
            When::Always => {}
            When::OneOf(arg, values) => {
                program.push(load(arg));
                // All values but the last jump over the others to its RETURN.
                let values_after = (0..values.len()).rev();
                for (value, after) in values.iter().zip(values_after) {
                    let last = after == 0;
                    program.push(branch(IF_EQUAL, *value, after as u8, last.into()));
                }
                program.push(statement(RETURN, ALLOW));
            }
            When::Own(arg) => {
                program.push(load(arg));
                program
                    .extend([branch(IF_EQUAL, std::process::id(), 0, 1), statement(RETURN, ALLOW)]);
            }
            When::Has(arg, mask) => {
                program.push(load(arg));
                program.extend([branch(IF_ANY_BIT, mask, 0, 1), statement(RETURN, ALLOW)]);
            }
            When::Lacks(arg, mask) => {
                program.push(load(arg));
                program.extend([branch(IF_ANY_BIT, mask, 1, 0), statement(RETURN, ALLOW)]);
            }
            When::Fails(errno) => {
                program.push(statement(RETURN, libc::SECCOMP_RET_ERRNO | errno as u32));
            }
        }
    }
    program.push(statement(RETURN, TRAP));
    program
}

fn number(call: c_long) -> u32 {
    call as u32
}

/// The low half of an argument.
fn load(arg: u8) -> sock_filter {
    statement(LOAD, ARGS_AT + 8 * u32::from(arg))
}

fn statement(code: u16, k: u32) -> sock_filter {
    branch(code, k, 0, 0)
}

fn branch(code: u16, k: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter { code, jt, jf, k }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the kernel would do with a call of these arguments.
    fn outcome(program: &[sock_filter], arch: u32, call: u32, args: [u64; 6]) -> u32 {
        let (mut at, mut value) = (0, 0);
        loop {
            let sock_filter { code, jt, jf, k } = program[at];
            at += 1;
            let mut jump = |taken| at += usize::from(if taken { jt } else { jf });
            match code {
                LOAD => {
                    value = match k {
                        NUMBER_AT => call,
                        ARCH_AT => arch,
                        _ => args[(k - ARGS_AT) as usize / 8] as u32,
                    }
                }
                JUMP => at += k as usize,
                IF_EQUAL => jump(value == k),
                IF_AT_LEAST => jump(value >= k),
                IF_ANY_BIT => jump(value & k != 0),
                RETURN => return k,
                _ => unreachable!("{code:#x}"),
            }
        }
    }

    /// What the table says of it.
    fn expected(role: Role, call: u32, args: [u64; 6]) -> u32 {
        let rules = table::of(role).iter().flat_map(|part| part.iter());
        let rules: Vec<_> = rules.filter(|rule| rule.call == c_long::from(call)).collect();
        let arg = |arg: u8| args[usize::from(arg)] as u32;
        let allows = |rule: &&Rule| match rule.when {
            When::Always => true,
            When::OneOf(at, values) => values.contains(&arg(at)),
            When::Own(at) => arg(at) == std::process::id(),
            When::Has(at, mask) => arg(at) & mask != 0,
            When::Lacks(at, mask) => arg(at) & mask == 0,
            When::Fails(_) => false,
        };
        if rules.iter().any(allows) {
            return ALLOW;
        }
        match rules.first().map(|rule| &rule.when) {
            Some(When::Fails(errno)) => libc::SECCOMP_RET_ERRNO | *errno as u32,
            _ => TRAP,
        }
    }

    #[test]
    fn the_program_does_what_the_table_says() {
        for role in Role::ALL {
            let program = program(role);
            assert!(program.len() < libc::BPF_MAXINSNS as usize, "{role}: {}", program.len());
            let listed = table::of(role).iter().flat_map(|part| part.iter());
            let mut values = vec![0, 1, 2, 3, 4, 7, u32::MAX, std::process::id()];
            for rule in listed {
                match rule.when {
                    When::OneOf(_, list) => values.extend(list),
                    When::Has(_, mask) | When::Lacks(_, mask) => values.extend([mask, !mask]),
                    _ => {}
                }
            }
            for call in (0..600).chain([u32::MAX, 0x4000_0000]) {
                for value in &values {
                    let args = [u64::from(*value); 6];
                    let found = outcome(program, ARCH, call, args);
                    assert_eq!(found, expected(role, call, args), "{role}: {call}({value:#x})");
                }
            }
        }
    }

    #[test]
    fn calls_of_other_architectures_are_refused() {
        const I386: u32 = 3 | 0x4000_0000;
        const X32: u32 = 0x4000_0000;
        for role in Role::ALL {
            let program = program(role);
            assert_eq!(outcome(program, I386, libc::SYS_write as u32, [0; 6]), TRAP);
            assert_eq!(outcome(program, ARCH, libc::SYS_write as u32 | X32, [0; 6]), TRAP);
        }
    }
}
