//! The tables of docs/fleet.md.

use std::fmt::Write;

use super::model::{Fleet, Placement, simulate};

pub(crate) const HEAD: &str = "\
| hosts | starts/s | host hits | zone hits | zones send, GB/s | bucket sends, GB/s | links allow, starts/s |
|---|---|---|---|---|---|---|
";

/// All tables, for fleets of these sizes.
pub(crate) fn tables(fleet: &Fleet, sizes: &[u32]) -> String {
    let mut text = String::new();
    let zone = Some((100, 4 * fleet.cache_bytes));
    let affine = Placement::Affine;
    for (title, fleet) in [
        ("Each host has its cache", fleet.clone()),
        (
            "Each 100 hosts also share a cache four times as large as one of theirs",
            Fleet { zone, ..fleet.clone() },
        ),
        (
            "Starts of a snapshot go to the same eighth of the hosts",
            Fleet { placement: affine, ..fleet.clone() },
        ),
    ] {
        _ = write!(text, "{title}:\n\n{HEAD}");
        for &hosts in sizes {
            text += &row(&hosts.to_string(), &Fleet { hosts, ..fleet.clone() });
        }
        text += "\n";
    }
    _ = write!(text, "Caches of different sizes:\n\n{HEAD}");
    for percent in [1, 5, 10, 20] {
        let cache_bytes = fleet.hot_bytes * u64::from(fleet.images) * percent / 100;
        let name = format!("1000, {} GB each", cache_bytes as f64 / 1e9);
        text += &row(&name, &Fleet { hosts: 1000, cache_bytes, ..fleet.clone() });
    }
    text
}

/// The line of one fleet.
pub(crate) fn row(name: &str, fleet: &Fleet) -> String {
    let result = simulate(fleet);
    format!(
        "| {name} | {:.1} | {:.1} % | {:.1} % | {:.2} | {:.2} | {:.0} |\n",
        fleet.starts_s(),
        100.0 * result.host_hits,
        100.0 * result.zone_hits,
        fleet.gigabytes_s(result.zone_bytes, result.counted),
        fleet.gigabytes_s(result.bucket_bytes, result.counted),
        fleet.most_starts_s(&result),
    )
}
