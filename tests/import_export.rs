//! Memory images and snapshots of other programs: imported, inspected, and exported again, bit for bit.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::{
    Ran, SNAP, Sample, end_of, names, needs_vm, run, signal, skip, snap, start, wait_for_handlers,
};

pub(crate) const PAGE: u64 = snapfmt::layout::PAGE_BYTES as u64;
pub(crate) const MIB: u64 = 1 << 20;
pub(crate) const GIB: u64 = 1 << 30;

/// A folder to work in.
pub(crate) struct Place(pub(crate) TempDir);

impl Place {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().expect("a temporary folder"))
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn text(&self, name: &str) -> String {
        self.path(name).to_string_lossy().into_owned()
    }

    /// A sparse file with some pages in it: text, noise and a written page of zeros.
    pub(crate) fn image(&self, name: &str, len: u64, at: &[u64]) -> PathBuf {
        let path = self.path(name);
        let file = File::create(&path).expect("it can be created");
        file.set_len(len).expect("it can be sized");
        for (number, offset) in at.iter().enumerate() {
            let page: Vec<u8> = match number % 3 {
                0 => format!("page at {offset:#x} ").bytes().cycle().take(4096).collect(),
                1 => noise(*offset),
                _ => vec![0; 4096],
            };
            file.write_all_at(&page, *offset).expect("it can be written");
        }
        path
    }

    pub(crate) fn import(&self, input: &Path, options: &[&str]) -> Ran {
        let mut command = Command::new(SNAP);
        command.arg("import").arg(input).arg("-o").arg(self.path("a.snap")).args(options);
        run(command)
    }

    pub(crate) fn export(&self, format: &str, out: &str) -> Ran {
        snap(["export", &self.text("a.snap"), "--format", format, "-o", &self.text(out)])
    }
}

/// A page that no codec makes smaller.
pub(crate) fn noise(seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    (0..PAGE / 8).flat_map(|_| next()).collect()
}

/// Compares without holding both in memory, and without reading holes of large files.
#[track_caller]
pub(crate) fn assert_same(one: &Path, other: &Path) {
    let open = |path: &Path| File::open(path).expect("it is there");
    let (a, b) = (open(one), open(other));
    let len = a.metadata().expect("it has a length").len();
    assert_eq!(len, b.metadata().expect("it has a length").len(), "lengths differ");
    let mut ranges = data_ranges(&a, len);
    ranges.extend(data_ranges(&b, len));
    for range in ranges {
        for at in range.clone().step_by(MIB as usize) {
            let block = MIB.min(range.end - at) as usize;
            let (mut x, mut y) = (vec![0; block], vec![0; block]);
            a.read_exact_at(&mut x, at).expect("it can be read");
            b.read_exact_at(&mut y, at).expect("it can be read");
            assert!(x == y, "{} and {} differ from {at:#x}", one.display(), other.display());
        }
    }
}

pub(crate) fn data_ranges(file: &File, len: u64) -> Vec<std::ops::Range<u64>> {
    use rustix::fs::{SeekFrom, seek};
    let mut ranges = Vec::new();
    let mut at = 0;
    while let Ok(start) = seek(file, SeekFrom::Data(at)) {
        at = seek(file, SeekFrom::Hole(start)).unwrap_or(len);
        ranges.push(start..at);
    }
    ranges
}

pub(crate) fn vmstate(arch: u64) -> Vec<u8> {
    let mut bytes = (0x0710_1984_0000_0000 | arch << 16).to_le_bytes().to_vec();
    bytes.extend((0..50_000u32).flat_map(u32::to_le_bytes));
    // The odd length shows whether padding is exported.
    bytes.push(7);
    bytes
}

#[test]
fn a_raw_image_is_exported_bit_for_bit() {
    let last = |len: u64| len - PAGE;
    for (len, pages) in [
        (PAGE, vec![0]),
        (7 * PAGE, vec![0, 2 * PAGE, 3 * PAGE, 6 * PAGE]),
        (2 * MIB + PAGE, vec![MIB, 2 * MIB - PAGE, 2 * MIB]),
        (64 * MIB, vec![]),
        (5 * GIB + 3 * PAGE, vec![0, 3 * GIB - PAGE, 3 * GIB, 4 * GIB, last(5 * GIB + 3 * PAGE)]),
    ] {
        for options in [&["--codec", "zstd"][..], &["--codec", "lz4", "--chunk-pages", "1"]] {
            let place = Place::new();
            let image = place.image("image", len, &pages);
            let ran = place.import(&image, &[options, &["--json"]].concat()).ok().json();
            assert_eq!(ran["memory_bytes"], len);
            assert_eq!(ran["source"], "raw");
            snap(["verify", &place.text("a.snap")]).ok();
            place.export("raw", "out").ok();
            assert_same(&image, &place.path("out"));
            let stored = place.path("out").metadata().expect("it is there").blocks() * 512;
            assert!(stored <= pages.len() as u64 * 64 * 1024, "{stored} bytes for {pages:x?}");
            assert_eq!(names(place.0.path()), ["a.snap", "image", "out"]);
        }
    }
}

#[test]
fn holes_are_not_read() {
    let place = Place::new();
    // 4 TiB: reading it would take an hour.
    let image = place.image("image", 4 << 40, &[GIB, (4 << 40) - PAGE]);
    let ran = place.import(&image, &["--json"]).ok().json();
    assert_eq!(ran["nonzero_bytes"], 2 * PAGE);
    place.export("raw", "out").ok();
    assert_same(&image, &place.path("out"));
}

#[test]
fn a_firecracker_pair_is_exported_bit_for_bit() {
    for (arch, gpa, len) in [(0x8664, 4 * GIB, 3 * GIB + MIB), (0xaaaa, 5 * GIB, 3 * GIB + MIB)] {
        let place = Place::new();
        let memory = place.image("mem", len, &[0, MIB, 3 * GIB - PAGE, 3 * GIB]);
        std::fs::write(place.path("state"), vmstate(arch)).expect("it can be written");
        let ran =
            place.import(&memory, &["--vmstate", &place.text("state"), "--holes-are-zeros"]).ok();
        assert!(ran.stdout.contains("firecracker"), "{}", ran.stdout);
        place.export("firecracker", "out").ok();
        assert_eq!(names(&place.path("out")), ["memory", "vmstate"]);
        assert_same(&memory, &place.path("out/memory"));
        assert_same(&place.path("state"), &place.path("out/vmstate"));
        for (name, mode) in [("out", 0o700), ("out/memory", 0o600), ("out/vmstate", 0o600)] {
            let found = place.path(name).metadata().expect("it is there").permissions().mode();
            assert_eq!(found & 0o777, mode, "{name}");
        }
        // The memory behind the first 3 GiB of the file is above the gap for devices.
        let gpa = format!("{gpa:#x}");
        let raw = snap(["cat", &place.text("a.snap"), "--gpa", &gpa, "--len", "19", "--raw"]).ok();
        assert_eq!(raw.stdout, "page at 0xc0000000 ");
    }
}

/// A folder like one of Cloud Hypervisor's, with its memory in this order of the file.
pub(crate) fn cloud_hypervisor(place: &Place, ranges: &[(u64, u64)]) -> PathBuf {
    let folder = place.path("ch");
    std::fs::create_dir(&folder).expect("it can be created");
    let table: Vec<Value> =
        ranges.iter().map(|(gpa, length)| json!({ "gpa": gpa, "length": length })).collect();
    let mapping = json!({ "slot": 0, "gpa": 0, "size": 1, "zone_id": "mem0",
                          "virtio_mem": false, "file_offset": 0 });
    let manager = json!({
        "memory_ranges": { "data": table },
        "guest_ram_mappings": [mapping],
        "start_of_device_area": 3 * GIB,
        "boot_ram": ranges.iter().map(|range| range.1).sum::<u64>(),
        "current_ram": ranges.iter().map(|range| range.1).sum::<u64>(),
        "arch_mem_regions": [{ "base": 0, "size": 3 * GIB, "r_type": "Ram" }],
        "hotplug_slots": [], "next_memory_slot": 1, "selected_slot": 0, "next_hotplug_slot": 0,
    });
    let leaf = |state: &str| json!({ "snapshots": {}, "snapshot_data": { "state": state } });
    let state = json!({
        "snapshots": {
            "cpu-manager": leaf("{}"),
            "memory-manager": leaf(&manager.to_string()),
            "device-manager": leaf("{\"device_tree\":{}}"),
        },
        "snapshot_data": { "state": "{\"clock\":null}" },
    });
    // Neither compact nor pretty JSON: the bytes must be the same.
    std::fs::write(folder.join("state.json"), format!("{state}  \n\n")).expect("it can be written");
    std::fs::write(folder.join("config.json"), b"{ \"cpus\" : 1 }").expect("it can be written");
    let len = ranges.iter().map(|range| range.1).sum();
    place.image("ch/memory-ranges", len, &[0, MIB, 2 * MIB, len - PAGE, len / 2]);
    folder
}

#[test]
fn a_cloud_hypervisor_folder_is_exported_bit_for_bit() {
    for ranges in [
        &[(0, 64 * MIB)][..],
        &[(0, 3 * GIB), (4 * GIB, GIB)],
        // Memory zones may come in any order, and blocks of virtio-mem touch each other.
        &[(4 * GIB, 8 * MIB), (6 * MIB, 2 * MIB), (0, 6 * MIB), (4 * GIB + 8 * MIB, 2 * MIB)],
    ] {
        let place = Place::new();
        let folder = cloud_hypervisor(&place, ranges);
        let ran = place.import(&folder, &["--json"]).ok();
        assert_eq!(ran.json()["source"], "cloud-hypervisor");
        assert_eq!(ran.stderr, "");
        snap(["verify", &place.text("a.snap")]).ok();
        place.export("cloud-hypervisor", "out").ok();
        for name in ["config.json", "state.json", "memory-ranges"] {
            assert_same(&folder.join(name), &place.path("out").join(name));
        }
        assert_eq!(names(&place.path("out")), ["config.json", "memory-ranges", "state.json"]);
        // The start of the file is at the address in the table.
        let gpa = format!("{:#x}", ranges[0].0);
        let raw = snap(["cat", &place.text("a.snap"), "--gpa", &gpa, "--len", "12", "--raw"]).ok();
        assert_eq!(raw.stdout, "page at 0x0 ");
    }
}

#[test]
fn other_files_of_a_folder_are_listed() {
    let place = Place::new();
    let folder = cloud_hypervisor(&place, &[(0, 4 * MIB)]);
    std::fs::write(folder.join("notes.txt"), b"mine").expect("it can be written");
    let ran = place.import(&folder, &[]).ok();
    assert!(ran.stderr.contains("notes.txt is not stored"), "{}", ran.stderr);
    let ran = place.import(&folder, &["--quiet", "--force"]).ok();
    assert_eq!((&*ran.stdout, &*ran.stderr), ("", ""));
}

/// The loadable segments of an ELF core: (offset, physical address, length).
pub(crate) fn segments(core: &File) -> Vec<(u64, u64, u64)> {
    let mut header = [0; 64];
    core.read_exact_at(&mut header, 0).expect("it has a header");
    let field = |bytes: &[u8], at: usize, len: usize| {
        let mut raw = [0; 8];
        raw[..len].copy_from_slice(&bytes[at..at + len]);
        u64::from_le_bytes(raw)
    };
    assert_eq!(header[..7], *b"\x7fELF\x02\x01\x01");
    assert_eq!((field(&header, 16, 2), field(&header, 18, 2)), (4, 62), "a core for x86_64");
    assert_eq!((field(&header, 52, 2), field(&header, 54, 2)), (64, 56));
    let (first, count) = (field(&header, 32, 8), field(&header, 56, 2));
    let mut loads = Vec::new();
    for number in 0..count {
        let mut program = [0; 56];
        core.read_exact_at(&mut program, first + number * 56).expect("it has program headers");
        let at = |at| field(&program, at, 8);
        match (number, field(&program, 0, 4)) {
            (0, 4) => assert_eq!(at(32), 0, "an empty note"),
            (1.., 1) => {
                assert_eq!(at(32), at(40), "p_filesz and p_memsz");
                assert_eq!(at(16), at(24), "p_vaddr and p_paddr");
                loads.push((at(8), at(24), at(32)));
            }
            other => panic!("program header {other:?}"),
        }
    }
    loads
}

#[test]
fn an_elf_core_has_memory_at_its_addresses() {
    let place = Place::new();
    let image = place.image("image", 4 * GIB, &[0, PAGE, 3 * GIB - PAGE, 3 * GIB]);
    place.import(&image, &["--region", "0:3G", "--region", "4G:1G"]).ok();
    place.export("elf", "core").ok();
    let (core, image) = (File::open(place.path("core")), File::open(&image));
    let (core, image) = (core.expect("it is there"), image.expect("it is there"));
    let loads = segments(&core);
    assert_eq!(loads, [(4096, 0, 3 * GIB), (4096 + 3 * GIB, 4 * GIB, GIB)]);
    assert_eq!(core.metadata().expect("it has a length").len(), 4096 + 4 * GIB);
    for (gpa, in_image) in
        [(0, 0), (PAGE, PAGE), (4 * GIB, 3 * GIB), (5 * GIB - PAGE, 4 * GIB - PAGE)]
    {
        let load = loads.iter().find(|load| (load.1..load.1 + load.2).contains(&gpa));
        let (offset, start, _) = load.expect("a segment has it");
        let (mut found, mut expected) = (vec![0; 4096], vec![0; 4096]);
        core.read_exact_at(&mut found, offset + (gpa - start)).expect("it can be read");
        image.read_exact_at(&mut expected, in_image).expect("it can be read");
        assert!(found == expected, "gpa {gpa:#x}");
    }

    let mut readelf = Command::new("readelf");
    readelf.args(["--wide", "--file-header", "--segments"]).arg(place.path("core"));
    match readelf.output() {
        Err(error) => skip("readelf", &error.to_string()),
        Ok(output) => {
            let ran = Ran::from(output).ok();
            assert_eq!(ran.stderr, "", "readelf complains");
            assert!(ran.stdout.contains("CORE (Core file)"), "{}", ran.stdout);
            assert_eq!(ran.stdout.matches("LOAD ").count(), 2, "{}", ran.stdout);
            assert!(ran.stdout.contains("0x0000000100000000"), "{}", ran.stdout);
        }
    }
}

#[test]
fn cat_prints_memory_by_guest_address() {
    let place = Place::new();
    let image = place.image("image", 4 * MIB, &[MIB, MIB + PAGE]);
    place.import(&image, &["--region", "0:3M", "--region", "1G:1M"]).ok();
    let file = place.text("a.snap");
    let dump = snap(["cat", &file, "--gpa", "0x100005", "--len", "16"]).ok().stdout;
    assert_eq!(
        dump,
        "00100005  61 74 20 30 78 31 30 30  30 30 30 20 70 61 67 65  |at 0x100000 page|\n00100015\n"
    );
    let zeros = snap(["cat", &file, "--gpa", "1G", "--len", "1M"]).ok().stdout;
    assert_eq!(
        zeros,
        "40000000  00 00 00 00 00 00 00 00  00 00 00 00 00 00 00 00  |................|\n*\n40100000\n"
    );
    // Across the border of two pages.
    let mut command = Command::new(SNAP);
    command.args(["cat", &file, "--gpa", "0x100ff0", "--len", "0x30", "--raw"]);
    let raw = command.output().expect("snap starts").stdout;
    let mut expected = vec![0; 0x30];
    let image = File::open(&image).expect("it is there");
    image.read_exact_at(&mut expected, 0x100ff0).expect("it can be read");
    assert!(raw == expected);
    snap(["cat", &file, "--gpa", "3M"]).failed(1, &["a.snap", "0x300000", "0x0..0x300000"]);
    snap(["cat", &file, "--gpa", "0x2ffff0"]).failed(1, &["no memory at gpa 0x300000"]);
    snap(["cat", &file, "--gpa", "0xffffffffffffffff"]).failed(1, &["above 2^64"]);
    snap(["cat", &file, "--gpa", "0xzz"]).failed(2, &["--gpa", "0xzz"]);
    snap(["cat", &file]).failed(2, &["--gpa"]);
}

#[test]
fn a_reader_that_stops_early_is_no_error() {
    let place = Place::new();
    let image = place.image("image", 64 * MIB, &[0]);
    place.import(&image, &[]).ok();
    let script = "\"$SNAP\" cat \"$FILE\" --gpa 0 --len 64M --raw | head -c 10; \
                  \"$SNAP\" pages \"$FILE\" | head -c 1";
    let mut command = Command::new("sh");
    command.args(["-c", script]).env("SNAP", SNAP).env("FILE", place.path("a.snap"));
    let ran = run(command).ok();
    assert_eq!((&*ran.stdout, &*ran.stderr), ("page at 0x0", ""));
}

/// The runs that `snap pages --json` prints, after checking that they fill memory exactly.
pub(crate) fn pages(file: &str) -> Vec<Value> {
    let header = snap(["info", "--json", file]).ok().json();
    let stdout = snap(["pages", "--json", file]).ok().stdout;
    let runs: Vec<Value> =
        stdout.lines().map(|line| serde_json::from_str(line).expect(line)).collect();
    let total = |kind: Option<&str>| -> u64 {
        let of_kind = |run: &&Value| kind.is_none_or(|kind| run["kind"] == kind);
        runs.iter().filter(of_kind).map(|run| run["pages"].as_u64().expect("a count")).sum()
    };
    assert_eq!(header["pages"]["total"], total(None));
    assert_eq!(header["pages"]["zero"], total(Some("zero")));
    assert_eq!(header["pages"]["data"], total(Some("data")));
    let mut expected = header["regions"].as_array().expect("a list").iter().flat_map(|region| {
        let [gpa, len] = ["gpa", "len"].map(|name| region[name].as_u64().expect("a number"));
        (gpa..gpa + len).step_by(PAGE as usize)
    });
    for run in &runs {
        let count = run["pages"].as_u64().expect("a count") as usize;
        assert_eq!(run["gpa"], expected.next().expect("more memory"));
        expected.by_ref().take(count - 1).for_each(drop);
    }
    assert_eq!(expected.next(), None);
    runs
}

#[test]
fn pages_streams_the_whole_index() {
    let place = Place::new();
    let at: Vec<u64> = (0..60).map(|page| 2 * MIB - 20 * PAGE + page * PAGE).collect();
    let image = place.image("image", 8 * MIB, &at);
    place.import(&image, &["--region", "0:2M", "--region", "1G:6M"]).ok();
    let file = place.text("a.snap");
    let runs = pages(&file);
    let kinds: Vec<_> = runs.iter().map(|run| run["kind"].as_str().expect("a name")).collect();
    assert_eq!((kinds[0], kinds[kinds.len() - 1]), ("zero", "zero"));
    // No run crosses the gap between the regions.
    assert!(runs.iter().any(|run| run["gpa"] == GIB), "{runs:?}");
    let data: Vec<_> = runs.iter().filter(|run| run["kind"] == "data").collect();
    assert!(data.iter().any(|run| run["codec"] == "zstd"), "{data:?}");
    assert!(data.iter().all(|run| run["chunk_offset"].as_u64().expect("a number") >= 4096));
    let text = snap(["pages", &file]).ok().stdout;
    assert_eq!(text.lines().count(), runs.len());
    assert!(text.starts_with("0x000000000000 "), "{text}");
    assert!(text.lines().all(|line| line.contains("zero") || line.contains("slot")), "{text}");

    let empty = Place::new();
    empty.import(&empty.image("image", 64 * MIB, &[]), &[]).ok();
    assert_eq!(pages(&empty.text("a.snap")), [json!({ "gpa": 0, "pages": 16384, "kind": "zero" })]);
}

#[test]
fn layers_are_exported_whole_and_distinguished() {
    let place = Place::new();
    let base = place.image("base", 8 * MIB, &[0, MIB, 3 * MIB]);
    place.import(&base, &[]).ok();
    std::fs::rename(place.path("a.snap"), place.path("base.snap")).expect("it can be renamed");
    let child = place.image("child", 8 * MIB, &[0, 5 * MIB]);
    place.import(&child, &[]).ok();
    let (whole, onto, layer) =
        (place.text("a.snap"), place.text("base.snap"), place.text("l.snap"));
    snap(["rebase", &whole, "--onto", &onto, "-o", &layer]).ok();
    std::fs::rename(&layer, &whole).expect("it can be renamed");
    place.export("raw", "out").ok();
    assert_same(&child, &place.path("out"));
    let runs = snap(["pages", "--json", &whole]).ok().stdout;
    let runs: Vec<Value> =
        runs.lines().map(|line| serde_json::from_str(line).expect(line)).collect();
    let kinds: Vec<_> = runs.iter().map(|run| run["kind"].as_str().expect("a name")).collect();
    assert_eq!(kinds, ["parent", "zero", "data", "zero"]);
    assert_eq!((&runs[0]["layer"], &runs[2]["gpa"]), (&json!(1), &json!(5 * MIB)));
    let map = snap(["info", &whole, "--map"]).ok().stdout;
    assert!(map.starts_with("0x000000000000 P...") && map.contains("p parent"), "{map}");
}

#[test]
fn the_map_shows_where_data_is() {
    let place = Place::new();
    // Cells of 32 KiB: the first is full of noise, one has a page of text, all others are zero.
    let image = place.image("image", 64 * MIB, &[40 * MIB]);
    let file = File::options().write(true).open(&image).expect("it opens");
    let full: Vec<u8> = (1..9).flat_map(noise).collect();
    file.write_all_at(&full, 0).expect("it can be written");
    place.import(&image, &["--chunk-pages", "8"]).ok();
    let file = place.text("a.snap");
    let map = snap(["info", &file, "--map"]).ok().stdout;
    let rows: Vec<_> = map.lines().collect();
    assert_eq!(rows.len(), 33, "{map}");
    assert_eq!(rows[0], format!("0x000000000000 R{}", ".".repeat(63)));
    assert_eq!(rows[20], format!("0x000002800000 z{}", ".".repeat(63)));
    assert_eq!(map.matches('.').count(), 32 * 64 - 2 + 1);
    assert!(rows[32].contains(". zero  r raw  z zstd") && rows[32].contains("32 KiB"), "{map}");
    assert!(!map.contains('\x1b'), "no terminal, no colours");

    let svg = place.text("map.svg");
    let option = format!("--map={svg}");
    assert_eq!(snap(["info", &file, &option]).ok().stdout, "");
    let picture = std::fs::read_to_string(&svg).expect("it is there");
    assert!(picture.starts_with("<svg ") && picture.ends_with("</svg>\n"));
    assert!(picture.contains("<title>0x2800000 zstd</title>"), "{picture}");
    snap(["info", &file, &option]).failed(1, &["map.svg exists"]);
    snap(["info", &file, "--map=map.bmp"]).failed(1, &["map.bmp", ".svg or .png"]);
    snap(["info", &file, "--map", "--json"]).failed(2, &["--json"]);
}

#[test]
fn invalid_imports_are_named_and_leave_no_files() {
    let place = Place::new();
    let odd = place.image("odd", 10_000, &[]);
    place.import(&odd, &[]).failed(3, &["odd", "10000 bytes", "4096"]);
    let empty = place.image("empty", 0, &[]);
    place.import(&empty, &[]).failed(3, &["empty is empty"]);
    place.import(&place.path("none"), &[]).failed(1, &["none", "No such file"]);
    place.import(Path::new("/dev/null"), &[]).failed(1, &["/dev/null", "not a regular file"]);
    let image = place.image("image", 4 * MIB, &[0]);
    for (region, code, messages) in [
        ("0:2M", 1, "expected 2097152"),
        ("0:8M", 1, "cut short"),
        ("0:100", 1, "not whole pages"),
        ("5", 2, "GPA:SIZE"),
    ] {
        place.import(&image, &["--region", region]).failed(code, &[messages]);
    }
    let twice = ["--region", "0:2M", "--region", "1M:2M"];
    place.import(&image, &twice).failed(1, &["--region", "overlap", "0x100000"]);

    let state = place.path("state");
    std::fs::write(&state, vmstate(0x8664)).expect("it can be written");
    let with_state = ["--vmstate", &*state.to_string_lossy()];
    let cut = place.image("cut", 4 * MIB - PAGE, &[0]);
    place.import(&cut, &with_state).failed(3, &["cut", "whole MiB", "cut short"]);
    std::fs::write(&state, [1; 100]).expect("it can be written");
    place.import(&image, &with_state).failed(3, &["state", "vmstate of Firecracker", "--region"]);
    place
        .import(&image, &[&with_state[..], &["--region", "0:4M", "--holes-are-zeros"]].concat())
        .ok();
    place.import(&image, &[]).failed(1, &["a.snap exists", "--force"]);
    place.import(&place.path("a.snap"), &["--force"]).failed(3, &["a.snap is a snapshot already"]);
    place.export("elf", "core").ok();
    place.import(&place.path("core"), &["--force"]).failed(3, &["core", "ELF"]);
    assert_eq!(names(place.0.path()), ["a.snap", "core", "cut", "empty", "image", "odd", "state"]);
}

#[test]
fn a_damaged_cloud_hypervisor_folder_is_refused() {
    for (name, contents, messages) in [
        ("state.json", None, &["ch/state.json", "No such file", "Cloud Hypervisor"][..]),
        ("config.json", None, &["ch/config.json", "No such file"]),
        ("memory-ranges", None, &["ch/memory-ranges", "No such file"]),
        ("state.json", Some(&b"{}"[..]), &["ch/state.json", "memory manager"]),
        ("memory-ranges", Some(&[7; 4096]), &["memory-ranges", "4096", "8388608", "cut short"]),
        ("memory-ranges", Some(&[7; 5000]), &["memory-ranges", "5000 bytes"]),
    ] {
        // A missing file cannot be damaged.
        let code = if contents.is_some() { 3 } else { 1 };
        let place = Place::new();
        let folder = cloud_hypervisor(&place, &[(0, 8 * MIB)]);
        let file = folder.join(name);
        match contents {
            None => std::fs::remove_file(file).expect("it can be removed"),
            Some(bytes) => std::fs::write(file, bytes).expect("it can be written"),
        }
        place.import(&folder, &[]).failed(code, messages);
        assert_eq!(names(place.0.path()), ["ch"]);
    }
}

#[test]
fn invalid_exports_are_named_and_leave_no_files() {
    let place = Place::new();
    let image = place.image("image", 4 * MIB, &[0]);
    place.import(&image, &[]).ok();
    place.export("firecracker", "out").failed(1, &["a.snap", "no Firecracker vmstate", "FCvs"]);
    place.export("cloud-hypervisor", "out").failed(1, &["no Cloud Hypervisor state.json", "CHst"]);
    place.export("vmdk", "out").failed(2, &["vmdk", "firecracker"]);
    place.export("raw", "missing/out").failed(1, &["missing/out", "No such file"]);
    std::fs::write(place.path("out"), b"mine").expect("it can be written");
    place.export("raw", "out").failed(1, &["out exists", "--force"]);
    assert_eq!(std::fs::read(place.path("out")).expect("it is there"), b"mine");
    let file = place.text("a.snap");
    snap(["export", &file, "--format", "raw", "-o", &place.text("out"), "--force"]).ok();
    assert_same(&image, &place.path("out"));
    assert_eq!(names(place.0.path()), ["a.snap", "image", "out"]);
}

#[test]
fn a_folder_is_replaced_only_by_force_and_when_nothing_is_lost() {
    let place = Place::new();
    let memory = place.image("mem", 4 * MIB, &[0]);
    std::fs::write(place.path("state"), vmstate(0x8664)).expect("it can be written");
    place.import(&memory, &["--vmstate", &place.text("state"), "--holes-are-zeros"]).ok();
    let force = ["--format", "firecracker", "--force", "-o"];
    let (file, out) = (place.text("a.snap"), place.text("out"));
    let export = || snap(["export", &file].into_iter().chain(force).chain([&*out]));
    place.export("firecracker", "out").ok();
    std::fs::write(place.path("out/memory"), b"other").expect("it can be written");
    place.export("firecracker", "out").failed(1, &["out exists", "--force"]);
    export().ok();
    assert_same(&memory, &place.path("out/memory"));
    std::fs::write(place.path("out/notes"), b"mine").expect("it can be written");
    export().failed(1, &["out is not replaced", "notes"]);
    assert_eq!(names(&place.path("out")), ["memory", "notes", "vmstate"]);
    assert_eq!(names(place.0.path()), ["a.snap", "mem", "out", "state"]);
}

#[test]
fn damage_is_found_while_exporting() {
    let place = Place::new();
    let image = place.image("image", 4 * MIB, &[0, PAGE, 2 * MIB]);
    place.import(&image, &[]).ok();
    let file = File::options().write(true).open(place.path("a.snap")).expect("it opens");
    file.write_all_at(&[0xff; 4], 4096 + 50).expect("it can be written");
    for format in ["raw", "elf"] {
        let messages = ["a.snap", "corrupt chunks at offset 4096", "expected", "found"];
        place.export(format, "out").failed(3, &messages);
    }
    snap(["cat", &place.text("a.snap"), "--gpa", "0"]).failed(3, &["a.snap", "corrupt chunks"]);
    assert_eq!(names(place.0.path()), ["a.snap", "image"]);
}

/// A snapshot of memory that takes a while to write out.
fn large(place: &Place) {
    let path = place.path("image");
    let file = File::create(&path).expect("it can be created");
    let block: Vec<u8> = (0..MIB / PAGE).flat_map(|page| noise(page + 1)).collect();
    for at in 0..512 {
        file.write_all_at(&block, at * MIB).expect("it can be written");
    }
    place.import(&path, &["--codec", "raw"]).ok();
}

#[test]
fn an_interrupted_export_leaves_nothing() {
    let place = Place::new();
    large(&place);
    let mut interrupted = 0;
    for (name, moment) in [("INT", 20), ("INT", 80), ("TERM", 150), ("KILL", 80), ("KILL", 150)] {
        let mut command = Command::new(SNAP);
        command.arg("export").arg(place.path("a.snap")).args(["--format", "raw", "-o"]);
        let child = start({
            command.arg(place.path("out"));
            command
        });
        wait_for_handlers(child.id());
        std::thread::sleep(Duration::from_millis(moment));
        signal(child.id(), name);
        let ran = Ran::from(end_of(child));
        if ran.code == Some(0) {
            // It ended before the signal.
            assert_same(&place.path("image"), &place.path("out"));
            std::fs::remove_file(place.path("out")).expect("it can be removed");
            continue;
        }
        interrupted += 1;
        assert!(!place.path("out").exists());
        if name != "KILL" {
            ran.failed(130, &["interrupted"]);
            assert_eq!(names(place.0.path()), ["a.snap", "image"]);
        }
    }
    assert!(interrupted > 0, "no signal came in time");
    // The next run cleans up after those that were killed.
    place.export("raw", "out").ok();
    assert_eq!(names(place.0.path()), ["a.snap", "image", "out"]);
}

#[test]
fn a_disk_that_fills_up_during_an_export_is_named_and_has_no_file() {
    let place = Place::new();
    large(&place);
    let disk = Place::new();
    let script = "mount -t tmpfs -o size=8m none \"$DISK\" || exit 77; \
                  \"$SNAP\" export \"$FILE\" --format raw -o \"$DISK/out\"; \
                  code=$?; ls -A \"$DISK\"; exit $code";
    let mut command = Command::new("unshare");
    command.args(["--map-root-user", "--mount", "sh", "-c", script]);
    command.env("DISK", disk.0.path()).env("SNAP", SNAP).env("FILE", place.path("a.snap"));
    let ran = run(command);
    if ran.code == Some(77) || ran.stderr.contains("unshare") {
        skip("a_disk_that_fills_up_during_an_export", "this user may not mount a tmpfs");
        return;
    }
    assert_eq!(ran.stdout, "", "left behind");
    ran.failed(1, &["out", "write", "No space left on device"]);
}

#[test]
fn a_snapshot_is_exported_and_imported_again() {
    needs_vm!();
    let sample = Sample::small();
    let file = sample.file.to_string_lossy().into_owned();
    pages(&file);
    assert!(snap(["info", &file, "--map"]).ok().stdout.contains("zstd"));
    let out = sample.folder.path().join("raw");
    let name = out.to_string_lossy();
    snap(["export", &file, "--format", "raw", "-o", &name]).ok();
    let again = sample.folder.path().join("again.snap");
    let again = again.to_string_lossy();
    snap(["import", &name, "-o", &again]).ok();
    let data = |file: &str| snap(["info", "--json", file]).ok().json()["pages"]["data"].clone();
    assert_eq!(data(&file), data(&again));
    // Memory alone is no guest.
    snap(["restore", &again]).failed(1, &["again.snap", "no state of a KVM guest"]);
}

#[test]
fn the_document_names_the_same_tags() {
    use snapvm::interchange::{CONFIG, MAPPED_RAM, STATE, VMSTATE};
    let text = include_str!("../docs/interchange.md");
    for kept in [VMSTATE, CONFIG, STATE, MAPPED_RAM] {
        let letters = kept.tag().to_le_bytes().escape_ascii().to_string();
        let line = format!("`{letters}` ({:#010x})", kept.tag());
        assert!(text.contains(&line), "{line}");
    }
}
