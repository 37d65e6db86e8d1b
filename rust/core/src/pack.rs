//! Two codes a byte: the even element sits in the high nibble.

/// The byte of an even element's code and the next one's.
#[inline]
#[must_use]
pub fn pack_nibbles(even: u8, odd: u8) -> u8 {
    even << 4 | odd
}

/// Code of element `index` of a block.
#[inline]
#[must_use]
pub fn nibble(bytes: &[u8], index: usize) -> u8 {
    let byte = bytes[index / 2];
    if index.is_multiple_of(2) { byte >> 4 } else { byte & 15 }
}
