//! Memory in very many regions, as with virtio-mem: all commands that use a memory map, with thousands of regions.

use std::fs::File;

use crate::import_export::{MIB, PAGE, Place, assert_same, cloud_hypervisor, pages, segments};
use crate::support::snap;

/// Every second block of 2 MiB, and ranges of length 0 between them, as in a table of Cloud Hypervisor's.
fn blocks(count: u64) -> Vec<(u64, u64)> {
    let block = |number| [(number * 4 * MIB, 2 * MIB), (number * 4 * MIB + 2 * MIB, 0)];
    (0..count).flat_map(block).collect()
}

#[test]
fn thousands_of_blocks_are_exported_bit_for_bit() {
    const BLOCKS: u64 = 3000;
    let place = Place::new();
    let folder = cloud_hypervisor(&place, &blocks(BLOCKS));
    place.import(&folder, &[]).ok();
    let file = place.text("a.snap");
    snap(["verify", &file]).ok();
    place.export("cloud-hypervisor", "out").ok();
    for name in ["config.json", "state.json", "memory-ranges"] {
        assert_same(&folder.join(name), &place.path("out").join(name));
    }
    let info = snap(["info", "--json", &file]).ok().json();
    assert_eq!(info["regions"].as_array().map(Vec::len), Some(BLOCKS as usize));

    // The last page of the file is that of the last block.
    let (last, gpa) = (BLOCKS * 2 * MIB - PAGE, (BLOCKS - 1) * 4 * MIB + 2 * MIB - PAGE);
    let args = format!("{gpa:#x}");
    let raw = snap(["cat", &file, "--gpa", &args, "--len", "32", "--raw"]).ok();
    assert!(raw.stdout.starts_with(&format!("page at {last:#x} ")), "{}", raw.stdout);
    assert!(pages(&file).iter().any(|run| run["gpa"] == gpa && run["kind"] == "data"));
    place.export("elf", "core").ok();
    let core = File::open(place.path("core")).expect("it is there");
    let loads = segments(&core);
    assert_eq!(loads.len(), BLOCKS as usize);
    assert_eq!(loads.last().map(|load| load.1), Some((BLOCKS - 1) * 4 * MIB));
}

/// They are drawn and listed in a short output.
#[test]
fn thousands_of_blocks_have_a_short_summary() {
    let place = Place::new();
    place.import(&cloud_hypervisor(&place, &blocks(2000)), &[]).ok();
    let file = place.text("a.snap");
    let text = snap(["info", &file]).ok().stdout;
    assert!(text.lines().count() < 60, "{text}");
    assert!(text.contains("and 1984 regions more, 3.9 GiB in all"), "{text}");
    let map = snap(["info", &file, "--map"]).ok().stdout;
    // Cells of 2 MiB, 64 in a row: the gaps have none.
    assert_eq!(map.lines().count(), 2000_usize.div_ceil(64) + 1, "{map}");
    assert!(map.contains("in 2000 parts, drawn without gaps"), "{map}");
    assert!(map.lines().nth(1).is_some_and(|row| row.starts_with("0x000010000000 ")), "{map}");
    let svg = place.text("map.svg");
    snap(["info", &file, &format!("--map={svg}")]).ok();
    let picture = std::fs::read_to_string(&svg).expect("it is there");
    let middle = format!("<title>{:#x} ", 1000 * 4 * MIB);
    assert!(picture.contains(&middle), "no cell at {middle}");
}

#[test]
fn too_many_and_empty_regions_are_refused() {
    let place = Place::new();
    let image = place.image("image", 1025 * PAGE, &[]);
    let regions: Vec<String> = (0..1025).map(|page| format!("{}:4K", 2 * page * PAGE)).collect();
    let args: Vec<&str> = regions.iter().flat_map(|region| ["--region", region]).collect();
    place.import(&image, &args).failed(1, &["memory regions is 1025, allowed are 1 to 1024"]);
    let empty = ["--region", "0:0", "--region", "0:4100K"];
    place.import(&image, &empty).failed(1, &["--region", "the memory range at 0x0 is empty"]);
}
