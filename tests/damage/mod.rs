//! Damages valid files for the property tests of every parser of foreign bytes.

use proptest::prelude::*;
use proptest::sample::Index;

/// A few changes of a file: where, what kind, and a value for it.
pub(crate) type Damage = Vec<(Index, u8, u64)>;

/// Draws one to four changes.
pub(crate) fn damage() -> impl Strategy<Value = Damage> {
    let value = prop_oneof![
        any::<u64>(),
        // What overflows, turns negative or asks for all memory when it is taken for a length.
        prop::sample::select(vec![
            0,
            1,
            0x7f,
            0x80,
            0xff,
            0x7fff_ffff,
            0x8000_0000,
            0xffff_ffff,
            u64::MAX >> 1,
            1 << 63,
            u64::MAX,
        ]),
    ];
    prop::collection::vec((any::<Index>(), 0_u8..7, value), 1..5)
}

/// Applies the changes; the result may have any length, zero as well.
pub(crate) fn damaged(file: &[u8], damage: &Damage) -> Vec<u8> {
    let mut file = file.to_vec();
    for (place, kind, value) in damage {
        if file.is_empty() {
            return file;
        }
        let at = place.index(file.len());
        let left = file.len() - at;
        let bytes = value.to_le_bytes();
        match kind {
            0 => file[at] ^= 1 << (value % 8),
            1 => file[at] = bytes[0],
            2 => file[at..at + left.min(4)].copy_from_slice(&bytes[..left.min(4)]),
            3 => file[at..at + left.min(8)].copy_from_slice(&bytes[..left.min(8)]),
            4 => file.truncate(at),
            5 => drop(file.splice(at..at, bytes)),
            // A piece of the file in the place of another.
            _ => {
                let from = (value % file.len() as u64) as usize;
                let len = left.min(file.len() - from).min(64);
                file.copy_within(from..from + len, at);
            }
        }
    }
    file
}
