//! What a snapshot's metadata says of a guest: for people and tools, but for the CPU, which a restore compares.

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
    /// The CPU of the host on which the guest was snapshotted. A restore on the same one asks KVM nothing.
    pub host_cpu: Option<HostCpu>,
    /// What the caller says of the guest, as JSON; kept by later snapshots of the same guest.
    pub guest: Value,
}

impl GuestMetadata {
    /// Of a guest on this host.
    #[must_use]
    pub fn here(guest: Value) -> Self {
        Self { host_cpu: Some(HostCpu::current()), guest }
    }

    /// From a snapshot's metadata. Values of another form count as missing: they are a hint.
    #[must_use]
    pub fn read(metadata: &Metadata) -> Self {
        let host_cpu = metadata.other.get(HOST_CPU).cloned();
        Self {
            host_cpu: host_cpu.and_then(|cpu| serde_json::from_value(cpu).ok()),
            guest: metadata.other.get(GUEST).cloned().unwrap_or_default(),
        }
    }

    /// The metadata of a new file.
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
    fn what_is_written_is_read_again() {
        let written = GuestMetadata::here(json!({ "memory": 1 }));
        assert_eq!(GuestMetadata::read(&written.to_metadata()), written);
        assert_eq!(GuestMetadata::read(&Metadata::default()), GuestMetadata::default());
    }
}
