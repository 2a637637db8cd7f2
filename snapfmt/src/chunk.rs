//! A chunk: some pages of guest memory, stored as one unit, with the list of their numbers.
//!
//! In the file: a 32-byte header, the page list (four bytes a page), the payload, zeros up to a
//! multiple of 64 bytes.

use uuid::Uuid;

use crate::codec::{Appended, Codec, Compressor, DecodeError, Decompressor};
use crate::entry::{ChunkExtent, PageIndex};
use crate::error::{Corruption, Part, Problem, ReadError, WriteError};
use crate::layout::{
    C_BODY_CRC, C_CODEC, C_CRC, C_MAGIC, C_OFFSET, C_PAGES, C_PAYLOAD_BYTES, C_RESERVED_A,
    C_RESERVED_B, CHUNK_ALIGN, CHUNK_HEADER_BYTES, CHUNK_MAGIC, MAX_CHUNK_PAGES, PAGE_BYTES,
    TAG_BYTES, put, u16_at, u32_at, u64_at,
};
use crate::seal::{KeyError, Seal};
use crate::section::SectionKind;

/// What binds chunks to their file.
#[derive(Clone, Copy)]
pub(crate) struct Binding<'a> {
    /// The start value of their checksums: see [`seed`].
    pub(crate) seed: u32,
    /// Bytes of the tag behind each payload: 0 in a file that is not sealed.
    pub(crate) tag_bytes: usize,
    /// With it payloads are encrypted and decrypted. In a sealed file that is read without a key, it is missing.
    pub(crate) seal: Option<&'a Seal>,
}

impl<'a> Binding<'a> {
    pub(crate) fn new(seed: u32, seal: Option<&'a Seal>) -> Self {
        Self { seed, tag_bytes: if seal.is_some() { TAG_BYTES } else { 0 }, seal }
    }
}

/// Appends a chunk to `out`, without its own offset in the file, which [`set_place`] adds. Of a sealed file, the payload
/// is not yet encrypted. Returns the chunk's length and the codec of its payload.
pub(crate) fn encode(
    compressor: &mut Compressor,
    pages: &[PageIndex],
    raw: &[u8],
    binding: Binding<'_>,
    out: &mut Appended,
) -> Result<(u32, Codec), WriteError> {
    debug_assert!((1..=MAX_CHUNK_PAGES).contains(&pages.len()));
    debug_assert_eq!(raw.len(), pages.len() * PAGE_BYTES);
    let start = out.len();
    out.push_zeros(CHUNK_HEADER_BYTES);
    for page in pages {
        out.push(&page.0.to_le_bytes());
    }
    let payload_start = out.len();
    let codec = compressor.append(raw, out)?;
    let payload_bytes = (out.len() - payload_start) as u32;
    out.push_zeros(binding.tag_bytes);
    let len = out.len() - start;
    out.push_zeros(len.next_multiple_of(CHUNK_ALIGN) - len);

    let (header, body) = out[start..].split_at_mut(CHUNK_HEADER_BYTES);
    put(header, C_MAGIC, &CHUNK_MAGIC);
    header[C_CODEC] = codec as u8;
    put(header, C_PAGES, &(pages.len() as u16).to_le_bytes());
    put(header, C_PAYLOAD_BYTES, &payload_bytes.to_le_bytes());
    // That of a sealed chunk covers the ciphertext, which depends on the place.
    if binding.seal.is_none() {
        put(header, C_BODY_CRC, &body_crc(binding.seed, body).to_le_bytes());
    }
    Ok(((out.len() - start) as u32, codec))
}

/// The length of a raw chunk of so many pages, 1 to 512.
pub(crate) fn raw_bytes(pages: u16, binding: Binding<'_>) -> u32 {
    let len = CHUNK_HEADER_BYTES + usize::from(pages) * (4 + PAGE_BYTES) + binding.tag_bytes;
    len.next_multiple_of(CHUNK_ALIGN) as u32
}

/// The start value of the checksums of the chunks of a snapshot.
pub(crate) fn seed(chunks_id: Uuid) -> u32 {
    crc32fast::hash(chunks_id.as_bytes())
}

/// The same bytes have different checksums with two different seeds. So a chunk is never mistaken for a chunk of
/// another snapshot.
fn body_crc(seed: u32, body: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new_with_initial(seed);
    hasher.update(body);
    hasher.finalize()
}

/// Writes the offset of an encoded chunk in the file into the chunk, encrypts the payload in a sealed file, and writes
/// the checksum of the chunk's header.
pub(crate) fn set_place(
    chunk: &mut [u8],
    offset: u64,
    binding: Binding<'_>,
) -> Result<(), KeyError> {
    put(chunk, C_OFFSET, &offset.to_le_bytes());
    if let Some(seal) = binding.seal {
        let (pages, payload_bytes) = (u16_at(chunk, C_PAGES), u32_at(chunk, C_PAYLOAD_BYTES));
        seal.seal_chunk(chunk, pages.into(), payload_bytes as usize)?;
        let crc = body_crc(binding.seed, &chunk[CHUNK_HEADER_BYTES..]);
        put(chunk, C_BODY_CRC, &crc.to_le_bytes());
    }
    let crc = crc32fast::hash(&chunk[..C_CRC]);
    put(chunk, C_CRC, &crc.to_le_bytes());
    Ok(())
}

/// A chunk's header, checked on its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ChunkHeader {
    /// How the payload is stored.
    pub codec: Codec,
    /// Pages in the chunk.
    pub pages: u16,
    /// Bytes of the payload as stored.
    pub payload_bytes: u32,
    body_crc: u32,
}

impl ChunkHeader {
    /// The place of the whole chunk, given the offset at which it was read, and the length of its tag.
    pub(crate) fn extent(&self, offset: u64, tag_bytes: usize) -> ChunkExtent {
        let front = CHUNK_HEADER_BYTES as u64 + 4 * u64::from(self.pages);
        let len = front + u64::from(self.payload_bytes) + tag_bytes as u64;
        // At most 2 MiB and a bit: `decode` bounds pages and payload.
        ChunkExtent::new(offset, len.next_multiple_of(CHUNK_ALIGN as u64) as u32)
    }

    /// Checks the header at `offset` of the file.
    pub(crate) fn decode(header: &[u8], offset: u64) -> Result<Self, Corruption> {
        let corrupt = |problem| corruption(offset, problem);
        let exact = |field, expected: u64, found: u64| match expected == found {
            true => Ok(()),
            false => Err(corrupt(Problem::Field { field, expected, found })),
        };
        let magic = u32::from_le_bytes(CHUNK_MAGIC).into();
        exact("chunk.magic", magic, u32_at(header, C_MAGIC).into())?;
        let (expected, found) = (u32_at(header, C_CRC), crc32fast::hash(&header[..C_CRC]));
        if expected != found {
            return Err(corrupt(Problem::Checksum { expected, found }));
        }
        exact("chunk.offset", offset, u64_at(header, C_OFFSET))?;
        exact("chunk.reserved", 0, header[C_RESERVED_A].into())?;
        exact("chunk.reserved", 0, u32_at(header, C_RESERVED_B).into())?;
        let range = |field, min: u64, max: u64, found: u64| match (min..=max).contains(&found) {
            true => Ok(()),
            false => Err(corrupt(Problem::Range { field, min, max, found })),
        };
        let pages = u16_at(header, C_PAGES);
        range("chunk.pages", 1, MAX_CHUNK_PAGES as u64, pages.into())?;
        let raw_bytes = u64::from(pages) * PAGE_BYTES as u64;
        let payload_bytes = u32_at(header, C_PAYLOAD_BYTES);
        let codec = Codec::from_byte(header[C_CODEC]).ok_or_else(|| {
            let (max, found) = (Codec::ALL.len() as u64 - 1, header[C_CODEC].into());
            corrupt(Problem::Range { field: "chunk.codec", min: 0, max, found })
        })?;
        let least = if codec == Codec::Raw { raw_bytes } else { 1 };
        range("chunk.payload_bytes", least, raw_bytes, payload_bytes.into())?;
        Ok(Self { codec, pages, payload_bytes, body_crc: u32_at(header, C_BODY_CRC) })
    }
}

pub(crate) fn corruption(offset: u64, problem: Problem) -> Corruption {
    Corruption::new(Part::Section(SectionKind::CHUNKS), offset, problem)
}

/// Buffers and codec contexts to read chunks with; one for each thread, used again and again, so
/// that reading a chunk allocates nothing once the buffers have grown.
#[derive(Default)]
pub struct ChunkBuffer {
    /// The chunk's bytes in the file; with chunks that were read ahead, all of them.
    pub(crate) stored: Vec<u8>,
    /// Where in `stored` the chunk is.
    at: usize,
    /// The snapshot, the layer and the offset of `stored`, if it may have chunks that were read ahead.
    ahead: Option<(u64, u16, u64)>,
    /// The payload of a sealed chunk, decrypted, if it is compressed.
    opened: Vec<u8>,
    /// The pages of the chunk, if they are not as they stand in `stored`.
    decoded: Vec<u8>,
    in_stored: bool,
    list: Vec<PageIndex>,
    decompressor: Decompressor,
    /// Header of the chunk that is decoded here, and which one that is: the serial number of its
    /// snapshot and its place.
    header: Option<ChunkHeader>,
    holds: Option<(u64, ChunkExtent)>,
}

impl ChunkBuffer {
    /// An empty buffer, which grows with the first chunks read into it.
    pub fn new() -> Self {
        Self::default()
    }

    /// Space for a chunk's stored bytes.
    pub(crate) fn refill(&mut self, len: usize) -> &mut [u8] {
        self.header = None;
        self.holds = None;
        (self.at, self.ahead) = (0, None);
        self.stored.resize(len, 0);
        &mut self.stored
    }

    /// Records that `stored` is filled with a snapshot's bytes that begin with the chunk at `extent`.
    pub(crate) fn filled_ahead(&mut self, snapshot: u64, extent: ChunkExtent) {
        self.ahead = Some((snapshot, extent.layer(), extent.offset()));
    }

    /// Whether the chunk was read ahead; then it is the one that is decoded next.
    pub(crate) fn turn_to(&mut self, snapshot: u64, extent: ChunkExtent) -> bool {
        let Some((of, layer, start)) = self.ahead else { return false };
        let at = extent.offset().checked_sub(start).and_then(|at| usize::try_from(at).ok());
        let there = at.filter(|at| {
            (of, layer) == (snapshot, extent.layer())
                && self.stored.len().checked_sub(*at) >= Some(extent.len_bytes() as usize)
        });
        let Some(at) = there else { return false };
        self.at = at;
        (self.header, self.holds) = (None, None);
        true
    }

    /// Records which chunk was decoded.
    pub(crate) fn hold(&mut self, snapshot: u64, extent: ChunkExtent) {
        self.holds = Some((snapshot, extent));
    }

    pub(crate) fn holds(&self, snapshot: u64, extent: ChunkExtent) -> bool {
        self.holds == Some((snapshot, extent))
    }

    /// The chunk that was decoded last.
    pub(crate) fn held(&self, extent: ChunkExtent) -> Result<Chunk<'_>, ReadError> {
        let Some(header) = self.header else { return Err(ReadError::NothingFetched) };
        let bytes = match self.in_stored {
            true => {
                let start = self.at + CHUNK_HEADER_BYTES + 4 * usize::from(header.pages);
                &self.stored[start..start + header.payload_bytes as usize]
            }
            false => &self.decoded,
        };
        Ok(Chunk { extent, header, pages: &self.list, bytes })
    }

    /// Checks the bytes that were read for the same `extent`, as far as that is possible without a key.
    pub(crate) fn check(
        &self,
        extent: ChunkExtent,
        binding: Binding<'_>,
    ) -> Result<ChunkHeader, ReadError> {
        let offset = extent.offset();
        let len = extent.len_bytes() as usize;
        let fetched = self.stored.get(self.at..).unwrap_or_default();
        if fetched.len() != len && (self.ahead.is_none() || fetched.len() < len) {
            let (expected, found) = (extent.len_bytes().into(), fetched.len() as u64);
            let problem = Problem::Field { field: "bytes fetched", expected, found };
            return Err(corruption(offset, problem).into());
        }
        let fetched = &fetched[..len];
        let header = ChunkHeader::decode(&fetched[..CHUNK_HEADER_BYTES], offset)?;
        let implied = header.extent(offset, binding.tag_bytes).in_layer(extent.layer());
        if implied != extent {
            let (expected, found) = (extent.len_bytes().into(), implied.len_bytes().into());
            let problem = Problem::Field { field: "chunk length", expected, found };
            return Err(corruption(offset, problem).into());
        }
        let body = &fetched[CHUNK_HEADER_BYTES..];
        let (expected, found) = (header.body_crc, body_crc(binding.seed, body));
        if expected != found {
            return Err(corruption(offset, Problem::Checksum { expected, found }).into());
        }
        let used =
            4 * usize::from(header.pages) + header.payload_bytes as usize + binding.tag_bytes;
        if let Some(stray) = body[used..].iter().find(|byte| **byte != 0) {
            let field = "chunk.padding";
            let found = u64::from(*stray);
            return Err(corruption(offset, Problem::Field { field, expected: 0, found }).into());
        }
        Ok(header)
    }

    /// Checks and decodes the bytes that were read for the same `extent`.
    pub(crate) fn decode(
        &mut self,
        extent: ChunkExtent,
        binding: Binding<'_>,
    ) -> Result<(), ReadError> {
        let header = self.check(extent, binding)?;
        let offset = extent.offset();
        let fetched = &self.stored[self.at..self.at + extent.len_bytes() as usize];
        let (front, rest) = fetched.split_at(CHUNK_HEADER_BYTES + 4 * usize::from(header.pages));
        let (mut payload, rest) = rest.split_at(header.payload_bytes as usize);
        let list = &front[CHUNK_HEADER_BYTES..];
        self.list.clear();
        self.list.extend(list.chunks_exact(4).map(|raw| PageIndex(u32_at(raw, 0))));
        if let Some(seal) = binding.seal {
            let to = match header.codec {
                Codec::Raw => &mut self.decoded,
                Codec::Lz4 | Codec::Zstd => &mut self.opened,
            };
            to.resize(payload.len(), 0);
            let mut tag = [0; TAG_BYTES];
            tag.copy_from_slice(&rest[..TAG_BYTES]);
            seal.open_chunk(front, payload, &tag, to)
                .map_err(|problem| corruption(offset, problem))?;
            payload = &self.opened;
        }
        self.in_stored = header.codec == Codec::Raw && binding.seal.is_none();
        if header.codec != Codec::Raw {
            let expected = usize::from(header.pages) * PAGE_BYTES;
            self.decoded.resize(expected, 0);
            let codec = header.codec.name();
            self.decompressor.decode(header.codec, payload, &mut self.decoded).map_err(
                |error| match error {
                    DecodeError::Bytes(found) => {
                        corruption(offset, Problem::Undecodable { codec, expected, found }).into()
                    }
                    DecodeError::NotBuilt => ReadError::CodecNotBuilt { codec },
                    DecodeError::Context(source) => ReadError::io(
                        Part::Section(SectionKind::CHUNKS),
                        offset,
                        extent.len_bytes().into(),
                        source,
                    ),
                },
            )?;
        }
        self.header = Some(header);
        Ok(())
    }
}

/// A chunk that was read, checked and decoded.
#[derive(Clone, Copy, Debug)]
pub struct Chunk<'a> {
    extent: ChunkExtent,
    header: ChunkHeader,
    pages: &'a [PageIndex],
    bytes: &'a [u8],
}

impl<'a> Chunk<'a> {
    /// Its place in the file.
    pub fn extent(&self) -> ChunkExtent {
        self.extent
    }

    /// Its header.
    pub fn header(&self) -> ChunkHeader {
        self.header
    }

    /// Which page each slot was stored for. Further pages with the same bytes may share a slot; only the index has
    /// them.
    pub fn pages(&self) -> &'a [PageIndex] {
        self.pages
    }

    /// The pages' bytes, slot after slot.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// The bytes of one slot, `None` if the chunk has no such slot.
    pub fn slot(&self, slot: u16) -> Option<&'a [u8]> {
        let start = usize::from(slot) * PAGE_BYTES;
        self.bytes.get(start..start + PAGE_BYTES)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEED: u32 = 0x1234_5678;

    fn bound(seed: u32) -> Binding<'static> {
        Binding::new(seed, None)
    }

    fn stored(codec: Codec, raw: &[u8]) -> (Vec<u8>, ChunkExtent) {
        let pages: Vec<_> =
            (0..raw.len() / PAGE_BYTES).map(|page| PageIndex(3 * page as u32)).collect();
        let mut out = Appended::default();
        let mut compressor = Compressor::new(codec, 1).unwrap();
        let (len, _) = encode(&mut compressor, &pages, raw, bound(SEED), &mut out).unwrap();
        set_place(&mut out, 4096, bound(SEED)).unwrap();
        (out.to_vec(), ChunkExtent::new(4096, len))
    }

    fn codecs() -> impl Iterator<Item = Codec> {
        Codec::ALL.into_iter().filter(|codec| cfg!(feature = "zstd") || *codec != Codec::Zstd)
    }

    #[test]
    fn every_codec_returns_the_same_pages() {
        let raw: Vec<u8> = (0..3 * PAGE_BYTES).map(|at| (at / 100) as u8).collect();
        for codec in codecs() {
            let mut buffer = ChunkBuffer::new();
            let (bytes, extent) = stored(codec, &raw);
            buffer.stored = bytes;
            buffer.decode(extent, bound(SEED)).unwrap();
            let chunk = buffer.held(extent).unwrap();
            assert_eq!(chunk.header().codec, codec);
            assert_eq!(chunk.bytes(), raw);
            assert_eq!(chunk.pages(), [PageIndex(0), PageIndex(3), PageIndex(6)]);
            assert_eq!(chunk.slot(2), Some(&raw[2 * PAGE_BYTES..]));
            assert_eq!(chunk.slot(3), None);
        }
    }

    #[test]
    fn any_flipped_bit_is_detected() {
        let raw: Vec<u8> = (0..PAGE_BYTES).map(|at| (at / 7) as u8).collect();
        for codec in codecs() {
            let mut buffer = ChunkBuffer::new();
            let (bytes, extent) = stored(codec, &raw);
            for bit in 0..bytes.len() * 8 {
                buffer.stored.clone_from(&bytes);
                buffer.stored[bit / 8] ^= 1 << (bit % 8);
                assert!(buffer.decode(extent, bound(SEED)).is_err(), "{codec} bit {bit}");
            }
        }
    }

    /// For any content: with another seed the checksum is always different.
    #[test]
    fn a_chunk_of_another_snapshot_is_refused() {
        let raw: Vec<u8> = (0..PAGE_BYTES).map(|at| (at / 7) as u8).collect();
        for codec in codecs() {
            let (bytes, extent) = stored(codec, &raw);
            for bit in 0..32 {
                let mut buffer = ChunkBuffer { stored: bytes.clone(), ..ChunkBuffer::default() };
                let taken = buffer.decode(extent, bound(SEED ^ (1 << bit)));
                let Err(ReadError::Corrupt(corruption)) = taken else { panic!("{codec} {bit}") };
                assert!(matches!(corruption.problem, Problem::Checksum { .. }), "{corruption}");
            }
        }
    }

    #[test]
    fn a_payload_that_decodes_to_more_or_less_than_declared_is_refused() {
        // A chunk of two pages whose header says one, and the other way round, checksums right.
        let raw = vec![1; 2 * PAGE_BYTES];
        for codec in codecs().filter(|codec| *codec != Codec::Raw) {
            let mut compressor = Compressor::new(codec, 1).unwrap();
            for (declared, actual) in [(1, 2), (2, 1)] {
                let mut out = vec![0; CHUNK_HEADER_BYTES];
                out.extend((0..declared as u32).flat_map(u32::to_le_bytes));
                let mut payload = Appended::default();
                compressor.append(&raw[..actual * PAGE_BYTES], &mut payload).unwrap();
                let payload_bytes = payload.len() as u32;
                out.extend_from_slice(&payload);
                out.resize(out.len().next_multiple_of(CHUNK_ALIGN), 0);
                put(&mut out, C_MAGIC, &CHUNK_MAGIC);
                out[C_CODEC] = codec as u8;
                put(&mut out, C_PAGES, &(declared as u16).to_le_bytes());
                put(&mut out, C_PAYLOAD_BYTES, &payload_bytes.to_le_bytes());
                let crc = body_crc(SEED, &out[CHUNK_HEADER_BYTES..]);
                put(&mut out, C_BODY_CRC, &crc.to_le_bytes());
                set_place(&mut out, 4096, bound(SEED)).unwrap();
                let extent = ChunkExtent::new(4096, out.len() as u32);
                let mut buffer = ChunkBuffer { stored: out, ..ChunkBuffer::default() };
                assert!(
                    matches!(
                        buffer.decode(extent, bound(SEED)),
                        Err(ReadError::Corrupt(Corruption {
                            problem: Problem::Undecodable { .. },
                            ..
                        }))
                    ),
                    "{codec} {declared} {actual}"
                );
            }
        }
    }
}
