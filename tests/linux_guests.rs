//! Linux guests through the program: refusals before a guest runs, and how a guest ends.

use std::fs;

use crate::kernel;
use crate::support::{Sample, needs_vm, restore, snap};

/// A folder with a kernel in it.
fn folder_with(kernel: &[u8]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    fs::write(folder.path().join("kernel"), kernel).expect("it is written");
    folder
}

/// `snap create` with this kernel is refused with these messages, and leaves no file.
#[track_caller]
fn refused(kernel: &[u8], args: &[&str], messages: &[&str]) {
    let folder = folder_with(kernel);
    let path = |name: &str| folder.path().join(name).display().to_string();
    fs::write(path("initrd"), vec![7; 8 << 20]).expect("it is written");
    let args = args.iter().map(|arg| arg.replace("FOLDER", &path("")));
    let ran = snap(
        ["create".into(), path("out.snap"), "--kernel".into(), path("kernel")]
            .into_iter()
            .chain(args),
    );
    ran.failed(1, messages);
    assert!(!folder.path().join("out.snap").exists());
}

#[test]
fn invalid_kernels_are_named() {
    refused(b"#!/bin/sh\n", &[], &["kernel: neither an ELF vmlinux nor a bzImage"]);
    refused(b"", &[], &["neither an ELF vmlinux nor a bzImage"]);
    let mut elf = kernel::elf(&kernel::power_off(), true, 0);
    elf[4] = 1;
    refused(&elf, &[], &["not an executable for x86-64"]);
    elf[4] = 2;
    refused(&elf[..40], &[], &["damaged: the ELF header is cut short"]);
    let mut bzimage = vec![0; 4096];
    bzimage[0x202..0x208].copy_from_slice(b"HdrS\x05\x02");
    refused(&bzimage, &[], &["a bzImage of boot protocol 0x0205 without a 64-bit entry point"]);
}

#[test]
fn files_that_do_not_fit_are_refused_with_their_size() {
    let kernel = kernel::elf(&kernel::power_off(), true, 100 << 20);
    refused(&kernel, &["--memory", "64M"], &["needs memory up to", "and the guest has 67108864"]);
    let kernel = kernel::elf(&kernel::power_off(), true, 0);
    let long = "x".repeat(2048);
    refused(
        &kernel,
        &["--cmdline", &long],
        &["command line of 2048 bytes, this kernel takes at most 2047"],
    );
    refused(
        &kernel,
        &["--memory", "8M", "--initrd", "FOLDERinitrd"],
        &["of 8388608 bytes does not fit, room for", "give the guest more memory"],
    );
    refused(&kernel, &["--initrd", "FOLDERnone"], &["cannot open", "none"]);
    // A file without a length, as a pipe of the shell's `<(...)`, is not an empty initrd.
    for none in ["/dev/null", "FOLDER"] {
        refused(&kernel, &["--initrd", none], &["is not a regular file"]);
    }
    refused(&kernel, &["--when", "ready"], &["--when ready is only for the demo guest"]);
}

#[test]
fn the_end_of_a_guest_has_its_message() {
    needs_vm!();
    let ends = |code: &[u8], message: &str| {
        let folder = folder_with(&kernel::elf(code, true, 0));
        let (kernel, out) = (folder.path().join("kernel"), folder.path().join("out.snap"));
        let args = ["create".as_ref(), out.as_os_str(), "--kernel".as_ref(), kernel.as_os_str()];
        snap(args).failed(5, &[message]);
        assert!(!out.exists());
    };
    ends(&kernel::power_off(), "the guest powered off");
    ends(&kernel::out(0x602, 1), "the guest requested a reset");
    // An undefined instruction without an interrupt table.
    ends(&[0x0f, 0x0b], "triple fault");
}

/// The guest requests a snapshot, and then continues: it prints its command line, and powers off.
#[test]
fn a_guest_is_snapshotted_at_its_request_and_powers_off() {
    needs_vm!();
    let request = &kernel::out(0x680, 1)[..7];
    let code = [request, kernel::PRINT_CMDLINE_PVH, &kernel::power_off()].concat();
    let folder = folder_with(&kernel::elf(&code, true, 0));
    let (kernel, out) = (folder.path().join("kernel"), folder.path().join("out.snap"));
    let kernel = ["--kernel".as_ref(), kernel.as_os_str(), "--cmdline".as_ref(), "hello".as_ref()];
    snap(["create".as_ref(), out.as_os_str()].into_iter().chain(kernel)).ok();
    for mode in [&["--lazy"][..], &["--clock", "keep"]] {
        let args = ["restore".as_ref(), out.as_os_str()];
        let ran = snap(args.into_iter().chain(mode.iter().map(std::ffi::OsStr::new))).ok();
        assert_eq!(ran.stdout, "hello\n");
        assert!(ran.stderr.contains("the guest powered off"), "{}", ran.stderr);
    }
}

/// The ends of a restored guest: each has its message, and the same code in both modes.
#[test]
fn the_end_of_a_restored_guest_has_its_message() {
    needs_vm!();
    let ends = |code: &[u8], exit_code: i32, message: &str| {
        let request = &kernel::out(0x680, 1)[..7];
        let folder = folder_with(&kernel::elf(&[request, code].concat(), true, 0));
        let (kernel, out) = (folder.path().join("kernel"), folder.path().join("out.snap"));
        let args = ["create".as_ref(), out.as_os_str(), "--kernel".as_ref(), kernel.as_os_str()];
        snap(args).ok();
        for mode in [&["--report", "text"][..], &["--lazy"]] {
            let args = ["restore".as_ref(), out.as_os_str()];
            let ran = snap(args.into_iter().chain(mode.iter().map(std::ffi::OsStr::new)));
            ran.failed(exit_code, &[message]);
        }
    };
    ends(&kernel::power_off(), 0, "the guest powered off");
    ends(&kernel::out(0x602, 1), 5, "the guest requested a reset");
    // By the keyboard controller.
    ends(&kernel::out(0x64, 0xfe), 5, "the guest requested a reset");
    ends(&[0x0f, 0x0b], 5, "triple fault");
}

/// A snapshot of a CPU with a feature that no CPU has is refused with the feature's name, and restored by force.
#[test]
fn a_snapshot_of_another_cpu_is_refused() {
    use snapfmt::{Contents, Snapshot, StateBlob, WriteOptions};
    use vmm::state::{STATE_KIND, STATE_VERSION, VmState};

    needs_vm!();
    let sample = Sample::small();
    let snapshot = Snapshot::open(&sample.file).expect("it opens");
    let blob = snapshot.state(STATE_KIND).expect("it can be read").expect("it is there");
    let mut state = VmState::decode(STATE_KIND, blob.version, &blob.bytes).expect("it is whole");
    let leaf = state.vcpus_mut()[0].cpuid.iter_mut().find(|leaf| leaf.0.function == 7);
    // AVX-512 for Xeon Phi (PF, ER), which no present machine has.
    leaf.expect("every CPU has this leaf").0.ebx |= 1 << 26 | 1 << 27;
    let mut metadata = snapshot.metadata().expect("it can be read");
    metadata.other.remove("host_cpu");
    let data: Vec<_> = snapshot.populated().collect();
    let memory = snapshot.memory();
    let states = [StateBlob { bytes: state.encode(), version: STATE_VERSION, ..blob }];
    let contents =
        Contents::new(snapshot.regions(), &memory, &data).states(&states).metadata(metadata);
    let file = sample.folder.path().join("other.snap");
    let go_on = |_| std::ops::ControlFlow::Continue(());
    snapfmt::write_snapshot(&file, contents, &WriteOptions::default(), &go_on).expect("it is made");
    for mode in [&["--lazy", "--beats", "1"][..], &["--beats", "1"]] {
        let ran = restore(&file, mode);
        assert_eq!(ran.stdout, "");
        let message = "other.snap: this host's CPU lacks features that the guest uses";
        let features = "CPUID 0x7.0 Ebx bit 26, CPUID 0x7.0 Ebx bit 27";
        ran.failed(1, &[&format!("{message}: {features}; --force-cpu")]);
        restore(&file, &[mode, &["--force-cpu"]].concat()).ok();
    }
}
