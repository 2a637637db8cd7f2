//! The model: which starts find their bytes in a cache.
//!
//! A start takes a snapshot by its popularity, and a host. The snapshot's hot bytes come from the host's cache, else
//! from the cache of its zone, else from the bucket; they are then in both caches. Starts follow each other, so two
//! starts never fetch the same bytes at the same moment: the cache on disk has the same effect, because of its single
//! fetch.

/// How a start's host is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Placement {
    /// Any host.
    Random,
    /// One of an eighth of the hosts, which the snapshot gives.
    Affine,
}

/// What is simulated.
#[derive(Clone, Debug)]
pub(crate) struct Fleet {
    pub(crate) hosts: u32,
    /// Starts in all. The first half fills the caches and is not counted. `None`: 500 a host.
    pub(crate) starts: Option<u64>,
    pub(crate) starts_per_host_s: f64,
    pub(crate) images: u32,
    pub(crate) skew: f64,
    pub(crate) hot_bytes: u64,
    pub(crate) cache_bytes: u64,
    /// How many hosts share a further cache, and its bytes.
    pub(crate) zone: Option<(u32, u64)>,
    pub(crate) placement: Placement,
    pub(crate) link_bytes_s: u64,
    pub(crate) seed: u64,
}

impl Default for Fleet {
    fn default() -> Self {
        Self {
            hosts: 1000,
            starts: None,
            starts_per_host_s: 1.5,
            images: 1000,
            skew: 1.0,
            hot_bytes: 40_000_000,
            cache_bytes: 4_000_000_000,
            zone: None,
            placement: Placement::Random,
            link_bytes_s: 125_000_000,
            seed: 1,
        }
    }
}

impl Fleet {
    pub(crate) fn starts_s(&self) -> f64 {
        self.starts_per_host_s * f64::from(self.hosts)
    }

    /// The rate of these bytes, which this many starts have caused.
    pub(crate) fn gigabytes_s(&self, bytes: u64, starts: u64) -> f64 {
        bytes as f64 / starts as f64 * self.starts_s() / 1e9
    }

    /// The starts a second at which the hosts' links are full.
    pub(crate) fn most_starts_s(&self, result: &Result) -> f64 {
        let bytes = (result.zone_bytes + result.bucket_bytes) as f64 / result.counted as f64;
        f64::from(self.hosts) * self.link_bytes_s as f64 / bytes
    }
}

/// The counted half of the starts.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Result {
    pub(crate) counted: u64,
    /// The share of starts whose bytes are in the host's cache.
    pub(crate) host_hits: f64,
    /// Of the others, the share whose bytes are in the zone's cache.
    pub(crate) zone_hits: f64,
    pub(crate) zone_bytes: u64,
    pub(crate) bucket_bytes: u64,
}

/// One start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Start {
    pub(crate) image: u32,
    pub(crate) host: u32,
}

/// Simulates all starts.
pub(crate) fn simulate(fleet: &Fleet) -> Result {
    let starts = fleet.starts.unwrap_or(500 * u64::from(fleet.hosts));
    let mut trace = Trace::new(fleet);
    let mut caches = Caches::new(fleet);
    let warm_up = starts / 2;
    for _ in 0..warm_up {
        caches.start(trace.next());
    }
    let (mut host, mut zone, mut bucket) = (0u64, 0u64, 0u64);
    for _ in warm_up..starts {
        match caches.start(trace.next()) {
            From::Host => host += 1,
            From::Zone => zone += 1,
            From::Bucket => bucket += 1,
        }
    }
    let counted = starts - warm_up;
    Result {
        counted,
        host_hits: host as f64 / counted as f64,
        zone_hits: zone as f64 / (zone + bucket).max(1) as f64,
        zone_bytes: zone * fleet.hot_bytes,
        bucket_bytes: bucket * fleet.hot_bytes,
    }
}

/// The starts, one after the other. The same seed gives the same ones.
pub(crate) struct Trace {
    random: u64,
    /// The sums of the popularities up to each snapshot.
    sums: Vec<f64>,
    hosts: u32,
    placement: Placement,
}

impl Trace {
    pub(crate) fn new(fleet: &Fleet) -> Self {
        let mut sum = 0.0;
        let sums = (1..=fleet.images).map(|rank| {
            sum += f64::from(rank).powf(-fleet.skew);
            sum
        });
        Self {
            random: fleet.seed,
            sums: sums.collect(),
            hosts: fleet.hosts,
            placement: fleet.placement,
        }
    }

    pub(crate) fn next(&mut self) -> Start {
        let total = self.sums[self.sums.len() - 1];
        let at = self.number() as f64 / (u64::MAX as f64 + 1.0) * total;
        let image = self.sums.partition_point(|sum| *sum <= at).min(self.sums.len() - 1) as u32;
        let among = match self.placement {
            Placement::Random => self.hosts,
            Placement::Affine => self.hosts.div_ceil(8),
        };
        let any = (self.number() % u64::from(among)) as u32;
        let host = match self.placement {
            Placement::Random => any,
            Placement::Affine => (image % 8 * among + any) % self.hosts,
        };
        Start { image, host }
    }

    /// SplitMix64.
    fn number(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
}

/// Where a start's bytes come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum From {
    Host,
    Zone,
    Bucket,
}

/// The caches of all hosts and zones.
pub(crate) struct Caches {
    hosts: Vec<Cache>,
    zones: Vec<Cache>,
    hosts_of_zone: u32,
}

impl Caches {
    pub(crate) fn new(fleet: &Fleet) -> Self {
        let cache = |bytes: u64| Cache::new(bytes / fleet.hot_bytes);
        let (hosts_of_zone, zone_bytes) = fleet.zone.unwrap_or((u32::MAX, 0));
        let zones = fleet.hosts.div_ceil(hosts_of_zone);
        Self {
            hosts: (0..fleet.hosts).map(|_| cache(fleet.cache_bytes)).collect(),
            zones: (0..zones).map(|_| cache(zone_bytes)).collect(),
            hosts_of_zone,
        }
    }

    pub(crate) fn start(&mut self, Start { image, host }: Start) -> From {
        if self.hosts[host as usize].use_or_add(image) {
            return From::Host;
        }
        match self.zones[(host / self.hosts_of_zone) as usize].use_or_add(image) {
            true => From::Zone,
            false => From::Bucket,
        }
    }
}

/// A cache of whole working sets. The one that was used least recently is removed first, as in the cache on disk.
struct Cache {
    most: usize,
    /// The most recently used one is first.
    images: Vec<u32>,
}

impl Cache {
    fn new(most: u64) -> Self {
        Self { most: usize::try_from(most).unwrap_or(usize::MAX), images: Vec::new() }
    }

    /// Whether the image is there; then it is.
    fn use_or_add(&mut self, image: u32) -> bool {
        if let Some(at) = self.images.iter().position(|there| *there == image) {
            self.images[..=at].rotate_right(1);
            return true;
        }
        self.images.insert(0, image);
        self.images.truncate(self.most);
        false
    }
}
