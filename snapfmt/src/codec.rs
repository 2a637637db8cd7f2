//! How a chunk's payload is stored: raw, lz4 or zstd.

use std::fmt;
use std::io;
use std::ops::{Deref, DerefMut};
use std::str::FromStr;

use crate::error::WriteError;

/// Codec of one chunk's payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
#[non_exhaustive]
pub enum Codec {
    /// The pages, not compressed.
    Raw = 0,
    /// One lz4 block, without a frame.
    Lz4 = 1,
    /// One zstd frame.
    Zstd = 2,
}

impl Codec {
    /// All codecs, in the order of their numbers in the file.
    pub const ALL: [Self; 3] = [Self::Raw, Self::Lz4, Self::Zstd];

    /// Name as users write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
        }
    }

    pub(crate) fn from_byte(byte: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|codec| *codec as u8 == byte)
    }
}

impl fmt::Display for Codec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A codec name that is none of `raw`, `lz4`, `zstd`.
#[derive(Debug, thiserror::Error)]
#[error("unknown codec {0:?}: raw, lz4 or zstd")]
pub struct UnknownCodec(String);

impl FromStr for Codec {
    type Err = UnknownCodec;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|codec| codec.name() == name)
            .ok_or_else(|| UnknownCodec(name.to_owned()))
    }
}

/// Bytes that are appended to, in space that is cleared when it is allocated and not for each use.
#[derive(Default)]
pub(crate) struct Appended {
    room: Vec<u8>,
    len: usize,
}

impl Appended {
    pub(crate) fn clear(&mut self) {
        self.len = 0;
    }

    /// The next `most` bytes, with any content; [`Appended::take`] appends the first of them.
    fn free(&mut self, most: usize) -> &mut [u8] {
        let end = self.len + most;
        if self.room.len() < end {
            self.room.resize(end, 0);
        }
        &mut self.room[self.len..end]
    }

    fn take(&mut self, len: usize) {
        debug_assert!(self.len + len <= self.room.len());
        self.len += len;
    }

    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.free(bytes.len()).copy_from_slice(bytes);
        self.take(bytes.len());
    }

    pub(crate) fn push_zeros(&mut self, count: usize) {
        self.free(count).fill(0);
        self.take(count);
    }
}

impl Deref for Appended {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.room[..self.len]
    }
}

impl DerefMut for Appended {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.room[..self.len]
    }
}

/// Compresses payloads; one for each thread, because contexts are kept between chunks.
pub(crate) struct Compressor {
    codec: Codec,
    #[cfg(feature = "zstd")]
    zstd: Option<zstd::bulk::Compressor<'static>>,
}

impl Compressor {
    pub(crate) fn new(codec: Codec, level: i32) -> Result<Self, WriteError> {
        #[cfg(not(feature = "zstd"))]
        {
            let _ = level;
            if codec == Codec::Zstd {
                return Err(WriteError::CodecNotBuilt { codec: codec.name() });
            }
            Ok(Self { codec })
        }
        #[cfg(feature = "zstd")]
        {
            let zstd = match codec {
                Codec::Zstd => Some(
                    zstd::bulk::Compressor::new(level)
                        .map_err(|source| WriteError::Codec { codec: codec.name(), source })?,
                ),
                _ => None,
            };
            Ok(Self { codec, zstd })
        }
    }

    /// Appends `raw` to `out` in the codec, or uncompressed if the codec saves less than a sixteenth:
    /// such a chunk would cost its reader a decode without a gain. Returns the codec that was used.
    pub(crate) fn append(&mut self, raw: &[u8], out: &mut Appended) -> Result<Codec, WriteError> {
        let compressed = match self.codec {
            Codec::Raw => None,
            Codec::Lz4 => {
                let most = lz4_flex::block::get_maximum_output_size(raw.len());
                lz4_flex::block::compress_into(raw, out.free(most)).ok()
            }
            #[cfg(feature = "zstd")]
            Codec::Zstd => match &mut self.zstd {
                Some(zstd) => {
                    let free = out.free(zstd::zstd_safe::compress_bound(raw.len()));
                    let len = zstd.compress_to_buffer(raw, free).map_err(|source| {
                        WriteError::Codec { codec: Codec::Zstd.name(), source }
                    })?;
                    Some(len)
                }
                None => None,
            },
            #[cfg(not(feature = "zstd"))]
            Codec::Zstd => None,
        };
        match compressed {
            Some(len) if len <= raw.len() - raw.len() / 16 => {
                out.take(len);
                Ok(self.codec)
            }
            _ => {
                out.push(raw);
                Ok(Codec::Raw)
            }
        }
    }
}

/// Decodes payloads; one for each thread.
#[derive(Default)]
pub(crate) struct Decompressor {
    #[cfg(feature = "zstd")]
    zstd: Option<zstd::bulk::Decompressor<'static>>,
}

/// Why a payload did not decode.
pub(crate) enum DecodeError {
    /// The bytes are wrong; `Some(n)` when they decoded to `n` bytes instead of those declared.
    Bytes(Option<usize>),
    /// The codec is not in this build.
    #[cfg_attr(feature = "zstd", expect(dead_code, reason = "only builds without a codec"))]
    NotBuilt,
    /// The codec's context could not be created.
    #[cfg_attr(not(feature = "zstd"), expect(dead_code, reason = "only zstd has a context"))]
    Context(io::Error),
}

impl Decompressor {
    /// Decodes `payload` into exactly `out`: never more, whatever the payload claims.
    pub(crate) fn decode(
        &mut self,
        codec: Codec,
        payload: &[u8],
        out: &mut [u8],
    ) -> Result<(), DecodeError> {
        let len = match codec {
            Codec::Raw => {
                if payload.len() == out.len() {
                    out.copy_from_slice(payload);
                }
                payload.len()
            }
            Codec::Lz4 => lz4_flex::block::decompress_into(payload, out)
                .map_err(|_| DecodeError::Bytes(None))?,
            #[cfg(feature = "zstd")]
            Codec::Zstd => {
                let zstd = match &mut self.zstd {
                    Some(zstd) => zstd,
                    empty => {
                        empty.insert(zstd::bulk::Decompressor::new().map_err(DecodeError::Context)?)
                    }
                };
                zstd.decompress_to_buffer(payload, out).map_err(|_| DecodeError::Bytes(None))?
            }
            #[cfg(not(feature = "zstd"))]
            Codec::Zstd => return Err(DecodeError::NotBuilt),
        };
        if len == out.len() { Ok(()) } else { Err(DecodeError::Bytes(Some(len))) }
    }
}
