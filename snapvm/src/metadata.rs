//! The part of a snapshot's metadata that describes the guest. A restore compares the CPU; the rest is for people and
//! tools.

use serde_json::{Map, Value, json};
use snapfmt::Metadata;
use vmm::HostCpu;

const HOST_CPU: &str = "host_cpu";
const GUEST: &str = "guest";
const DEVICES: &str = "devices";

/// The keys that this library writes into [`Metadata::other`].
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct GuestMetadata {
    /// The CPU of the host on which the guest was snapshotted. A restore on the same CPU does not check its features.
    pub host_cpu: Option<HostCpu>,
    /// The caller's description of the guest, as JSON. Later snapshots of the guest keep it.
    pub guest: Value,
}

impl GuestMetadata {
    /// The metadata of a guest on this host.
    #[must_use]
    pub fn here(guest: Value) -> Self {
        Self { host_cpu: Some(HostCpu::current()), guest }
    }

    /// Reads a snapshot's metadata. A value that cannot be decoded counts as missing: the values are hints.
    #[must_use]
    pub fn read(metadata: &Metadata) -> Self {
        let host_cpu = metadata.other.get(HOST_CPU).cloned();
        Self {
            host_cpu: host_cpu.and_then(|cpu| serde_json::from_value(cpu).ok()),
            guest: metadata.other.get(GUEST).cloned().unwrap_or_default(),
        }
    }

    /// The metadata to write into a new file.
    #[must_use]
    pub fn to_metadata(&self) -> Metadata {
        let mut other = Map::new();
        other.insert(HOST_CPU.into(), json!(self.host_cpu));
        other.insert(GUEST.into(), self.guest.clone());
        other.insert(DEVICES.into(), json!(["serial 8250 at port 0x3f8, irq 4"]));
        Metadata::default().tool("snap").tool_version(env!("CARGO_PKG_VERSION")).other(other)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metadata_survives_writing_and_reading() {
        let written = GuestMetadata::here(json!({ "memory": 1 }));
        assert_eq!(GuestMetadata::read(&written.to_metadata()), written);
        assert_eq!(GuestMetadata::read(&Metadata::default()), GuestMetadata::default());
    }
}
