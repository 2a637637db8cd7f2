//! A fleet of hosts that start clones of snapshots in a bucket: what the hosts' caches hit, and what the bucket sends.
//!
//!     cargo run --example fleet                            # the tables of docs/fleet.md: about 20 s
//!     cargo run --example fleet -- --hosts 500 --images 20 # one fleet
//!
//! The same options and seed always give the same output.

mod model;
mod report;

use std::process::ExitCode;

use model::{Fleet, Placement};
use report::{HEAD, row, tables};

const USAGE: &str = "\
A simulation of hosts that start clones of snapshots in a bucket.

    --hosts N           hosts [1, 10, 100, 1000, 10000]
    --starts N          starts that are simulated, half of them before counting [500 a host]
    --rate X            starts a second of each host [1.5]
    --images N          snapshots [1000]
    --skew X            popularity: the n-th snapshot is started in proportion to n^-X [1]
    --hot MB            bytes that a cold start fetches, in MB [40]
    --cache MB          bytes of each host's cache, in MB [4000]
    --zone HOSTS,MB     hosts that share a further cache, and its bytes: a proxy or peers [none]
    --placement P       random, or affine: starts of a snapshot go to the same eighth of the hosts [random]
    --link MBPS         bytes a second of each host's link, in MB [125]
    --seed N            [1]";

fn main() -> ExitCode {
    match parse(std::env::args().skip(1)) {
        Ok(None) => println!("{USAGE}"),
        Ok(Some((fleet, None))) => print!("{}", tables(&fleet, &[1, 10, 100, 1000, 10_000])),
        Ok(Some((fleet, Some(hosts)))) => print!("{HEAD}{}", row(&hosts.to_string(), &fleet)),
        Err(error) => {
            eprintln!("{error}\n\n{USAGE}");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

/// The fleet, and the number of hosts if one is given. `None`: help.
fn parse(args: impl Iterator<Item = String>) -> Result<Option<(Fleet, Option<u32>)>, String> {
    let (mut fleet, mut hosts) = (Fleet::default(), None);
    let mut args = args;
    while let Some(name) = args.next() {
        if name == "--help" || name == "-h" {
            return Ok(None);
        }
        let value = args.next().ok_or(format!("{name} needs a value"))?;
        let wrong = || format!("{name} {value}: not a possible value");
        let number = |least: f64, most: f64| {
            let parsed = value.parse::<f64>().ok();
            parsed.filter(|number| (least..=most).contains(number)).ok_or_else(wrong)
        };
        let megabytes = |text: &str| {
            let parsed = text.parse::<f64>().ok().filter(|number| (0.001..=1e9).contains(number));
            parsed.map(|number| (number * 1e6) as u64).ok_or_else(wrong)
        };
        match name.as_str() {
            "--hosts" => hosts = Some(number(1.0, 1e5)? as u32),
            "--starts" => fleet.starts = Some(number(2.0, 1e8)? as u64),
            "--rate" => fleet.starts_per_host_s = number(0.001, 1e4)?,
            "--images" => fleet.images = number(1.0, 1e6)? as u32,
            "--skew" => fleet.skew = number(0.0, 10.0)?,
            "--hot" => fleet.hot_bytes = megabytes(&value)?,
            "--cache" => fleet.cache_bytes = megabytes(&value)?,
            "--link" => fleet.link_bytes_s = megabytes(&value)?,
            "--seed" => fleet.seed = number(0.0, 9e15)? as u64,
            "--zone" => {
                let (hosts, bytes) = value.split_once(',').ok_or_else(wrong)?;
                let hosts = hosts.parse().ok().filter(|hosts| *hosts > 0).ok_or_else(wrong)?;
                fleet.zone = Some((hosts, megabytes(bytes)?));
            }
            "--placement" => {
                fleet.placement = match value.as_str() {
                    "random" => Placement::Random,
                    "affine" => Placement::Affine,
                    _ => return Err(wrong()),
                };
            }
            _ => return Err(format!("{name}: no such option")),
        }
    }
    fleet.hosts = hosts.unwrap_or(fleet.hosts);
    Ok(Some((fleet, hosts)))
}
