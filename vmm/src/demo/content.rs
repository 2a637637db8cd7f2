//! The content of the pages of the demo guest's working area, by beat.
//!
//! The guest's machine code computes the same contents. Tests use this module to compare the guest's memory
//! with what it should contain.

/// Increment of splitmix64.
pub(crate) const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
/// Multipliers of splitmix64's finalizer.
pub(crate) const C1: u64 = 0xbf58_476d_1ce4_e5b9;
pub(crate) const C2: u64 = 0x94d0_49bb_1331_11eb;
/// Odd numbers that spread page numbers and versions over 64 bits.
pub(crate) const PAGE_KEY: u64 = 0xd6e8_feb8_6659_fd93;
pub(crate) const VERSION_KEY: u64 = 0xa076_1d64_78bd_642f;

/// Sixteen words of eight letters, the vocabulary of the text pages: a macro, so that it is a literal
/// for the assembler too.
macro_rules! text_words {
    () => {
        "the page read by a fault is sent to one handler and then stored \
         in guest memory; no byte is lost, stale or wrong and all is well"
    };
}
pub(crate) use text_words;

const TEXT_WORDS: &[u8] = text_words!().as_bytes();
const _: () = assert!(TEXT_WORDS.len() == 16 * 8);

/// 64-bit words of a page.
const PAGE_WORDS: u64 = 512;

/// The content of a page of the working area.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PageClass {
    /// Never written: zeros. One page in eight.
    Zero,
    /// Text that a general-purpose codec packs several times. Half of the pages.
    Text,
    /// No codec packs it. A quarter of the pages.
    Random,
    /// The same content as all other pages of this class in the same version. One page in eight.
    Equal,
}

/// The class of a page, by its number in the working area.
#[must_use]
pub fn page_class(page: u64) -> PageClass {
    match page_hash(page) & 7 {
        0 => PageClass::Zero,
        1..=4 => PageClass::Text,
        5 | 6 => PageClass::Random,
        _ => PageClass::Equal,
    }
}

/// How many of 256 pages that are not zero each beat reads by default: a quarter.
pub const WALKED_OF_256: u32 = 64;

/// Whether each beat of a guest that walks this many of 256 pages reads this one.
#[must_use]
pub fn in_working_set(page: u64, walked_of_256: u32) -> bool {
    let hash = page_hash(page);
    let rank = ((hash >> 3) & 3) << 6 | (hash >> 8) & 63;
    hash & 7 != 0 && rank < u64::from(walked_of_256)
}

/// Version of a page after `beat` beats: the last of them that rewrote it, 0 if none has.
#[must_use]
pub fn page_version(page: u64, beat: u64, walked_of_256: u32) -> u64 {
    if !in_working_set(page, walked_of_256) {
        return 0;
    }
    let slot = (page_hash(page) >> 5) & 7;
    beat.saturating_sub(beat.wrapping_sub(slot) & 7)
}

/// Content of a page after `beat` beats.
#[must_use]
pub fn page_bytes(page: u64, beat: u64, walked_of_256: u32) -> Vec<u8> {
    let class = page_class(page);
    let version = page_version(page, beat, walked_of_256);
    let number = if class == PageClass::Equal { 0 } else { page + 1 };
    let seed = mix(number.wrapping_mul(PAGE_KEY) ^ version.wrapping_mul(VERSION_KEY));
    let word = |index: u64| {
        let random = mix(seed.wrapping_add(index.wrapping_mul(GOLDEN)));
        match class {
            PageClass::Zero => [0; 8],
            PageClass::Text => text_word(index, random),
            PageClass::Random | PageClass::Equal => random.to_le_bytes(),
        }
    };
    (0..PAGE_WORDS).flat_map(word).collect()
}

fn text_word(index: u64, random: u64) -> [u8; 8] {
    if !index.is_multiple_of(8) {
        let start = (random & 15) as usize * 8;
        return std::array::from_fn(|i| TEXT_WORDS[start + i]);
    }
    std::array::from_fn(|nibble| b'a' + ((random >> (4 * nibble)) & 15) as u8)
}

fn page_hash(page: u64) -> u64 {
    mix(page.wrapping_mul(PAGE_KEY).wrapping_add(GOLDEN))
}

/// The finalizer of splitmix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators").
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(C1);
    x = (x ^ (x >> 27)).wrapping_mul(C2);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_are_mixed_as_promised() {
        let count = |class| (0..8192).filter(|&page| page_class(page) == class).count();
        for (class, share) in [
            (PageClass::Zero, 1024),
            (PageClass::Text, 4096),
            (PageClass::Random, 2048),
            (PageClass::Equal, 1024),
        ] {
            let found = count(class);
            assert!(found.abs_diff(share) < share / 8, "{class:?}: {found}");
        }
        for (of_256, pages) in [(64, 1792), (3, 84), (128, 3584), (256, 7168)] {
            let walked = (0..8192).filter(|&page| in_working_set(page, of_256)).count();
            assert!(walked.abs_diff(pages) < pages / 8, "{of_256}: {walked}");
        }
    }

    #[test]
    fn versions_are_the_last_beat_that_wrote() {
        let page = (0..)
            .find(|&p| in_working_set(p, WALKED_OF_256) && (page_hash(p) >> 5) & 7 == 3)
            .unwrap();
        let versions: Vec<u64> =
            (0..13).map(|beat| page_version(page, beat, WALKED_OF_256)).collect();
        assert_eq!(versions, [0, 0, 0, 3, 3, 3, 3, 3, 3, 3, 3, 11, 11]);
        let page = (0..)
            .find(|&p| in_working_set(p, WALKED_OF_256) && (page_hash(p) >> 5) & 7 == 0)
            .unwrap();
        let versions: Vec<u64> =
            (0..10).map(|beat| page_version(page, beat, WALKED_OF_256)).collect();
        assert_eq!(versions, [0, 0, 0, 0, 0, 0, 0, 0, 8, 8]);
    }

    #[test]
    fn text_is_text_and_equal_pages_are_equal() {
        let pages_of = |class| (0..1000).filter(move |&page| page_class(page) == class);
        let text = page_bytes(pages_of(PageClass::Text).next().unwrap(), 0, WALKED_OF_256);
        assert!(text.iter().all(|byte| byte.is_ascii_graphic() || *byte == b' '));
        let equal: Vec<_> = pages_of(PageClass::Equal)
            .filter(|&page| !in_working_set(page, WALKED_OF_256))
            .take(2)
            .map(|page| page_bytes(page, 9, WALKED_OF_256))
            .collect();
        assert_eq!(equal[0], equal[1]);
    }
}
