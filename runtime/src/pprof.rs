//! Stack samples in the form of pprof: `profile.proto`, compressed by gzip (RFC 1952).
//!
//! The message is written here: it is a list of strings and of tables that name them by number, and a crate for it would bring a
//! compiler of messages. The numbers of its fields are those of pprof's `profile.proto`.

use std::collections::HashMap;

use miniz_oxide::deflate::compress_to_vec;

use crate::control::report::Samples;

/// How well it is compressed, of 10.
const LEVEL: u8 = 6;

/// A message of Protocol Buffers, as far as it is written.
#[derive(Debug, Default)]
struct Message(Vec<u8>);

impl Message {
    fn varint(&mut self, mut value: u64) {
        loop {
            let [lowest, ..] = value.to_le_bytes();
            value >>= 7;
            if value == 0 {
                return self.0.push(lowest & 0x7f);
            }
            self.0.push(lowest | 0x80);
        }
    }

    fn number(&mut self, field: u64, value: u64) {
        self.varint(field << 3);
        self.varint(value);
    }

    fn bytes(&mut self, field: u64, bytes: &[u8]) {
        self.varint(field << 3 | 2);
        self.varint(bytes.len() as u64);
        self.0.extend_from_slice(bytes);
    }

    fn packed(&mut self, field: u64, values: impl IntoIterator<Item = u64>) {
        let mut all = Self::default();
        values.into_iter().for_each(|value| all.varint(value));
        self.bytes(field, &all.0);
    }

    fn message(&mut self, field: u64, write: impl FnOnce(&mut Self)) {
        let mut inner = Self::default();
        write(&mut inner);
        self.bytes(field, &inner.0);
    }
}

/// Strings by number; number 0 is the empty one.
struct Strings<'a> {
    all: Vec<&'a str>,
    known: HashMap<&'a str, u64>,
}

impl<'a> Strings<'a> {
    fn number(&mut self, text: &'a str) -> u64 {
        *self.known.entry(text).or_insert_with(|| {
            self.all.push(text);
            self.all.len() as u64 - 1
        })
    }
}

/// The samples as one profile, with two values each: `samples/count` and `cpu/nanoseconds`. Each stack begins with its brane, whose
/// name is the sample's label `brane`, too. `duration_ns` is over which time they were taken, 0 if nobody knows.
#[must_use]
pub fn profile(samples: &Samples, duration_ns: u64) -> Vec<u8> {
    let mut strings = Strings { all: vec![""], known: HashMap::from([("", 0)]) };
    let mut out = Message::default();
    let (count, count_unit) = (strings.number("samples"), strings.number("count"));
    let (cpu, cpu_unit) = (strings.number("cpu"), strings.number("nanoseconds"));
    for (kind, unit) in [(count, count_unit), (cpu, cpu_unit)] {
        out.message(1, |of| {
            of.number(1, kind);
            of.number(2, unit);
        });
    }
    // A function is one place: a location and a function of the same number.
    let mut functions: Vec<u64> = Vec::new();
    let mut known: HashMap<u64, u64> = HashMap::new();
    let label = strings.number("brane");
    for brane in &samples.branes {
        let name = strings.number(&brane.name);
        for (way, ticks) in brane.stacks.folded() {
            // The youngest first.
            let names = way.iter().rev().copied().chain([brane.name.as_str()]);
            let places: Vec<u64> = names
                .map(|name| {
                    let name = strings.number(name);
                    *known.entry(name).or_insert_with(|| {
                        functions.push(name);
                        functions.len() as u64
                    })
                })
                .collect();
            out.message(2, |sample| {
                sample.packed(1, places);
                sample.packed(2, [ticks, ticks.saturating_mul(samples.tick_ns)]);
                sample.message(3, |of| {
                    of.number(1, label);
                    of.number(2, name);
                });
            });
        }
    }
    for (id, name) in (1..).zip(&functions) {
        out.message(4, |location| {
            location.number(1, id);
            location.message(4, |line| line.number(1, id));
        });
        out.message(5, |function| {
            function.number(1, id);
            function.number(2, *name);
            function.number(3, *name);
        });
    }
    out.number(9, samples.time_ns.saturating_sub(duration_ns));
    out.number(10, duration_ns);
    out.message(11, |of| {
        of.number(1, cpu);
        of.number(2, cpu_unit);
    });
    out.number(12, samples.tick_ns);
    out.number(14, cpu);
    strings.all.iter().for_each(|text| out.bytes(6, text.as_bytes()));
    out.0
}

/// Compresses it, as one member of a gzip file.
#[must_use]
pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    // Deflate, no name, no time, of no system in particular.
    let mut out = vec![0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255];
    out.extend(compress_to_vec(bytes, LEVEL));
    out.extend(crc32fast::hash(bytes).to_le_bytes());
    // Its length modulo 2^32.
    out.extend(bytes.len().to_le_bytes().iter().take(4));
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::report::Sampled;
    use crate::stacks::{Node, Stacks};
    use proptest::prelude::*;

    fn samples() -> Samples {
        let names = vec!["handle".into(), "spin".into()];
        let nodes = vec![Node { caller: None, name: 0, ticks: 1 }, Node { caller: Some(0), name: 1, ticks: 200 }];
        let stacks = Stacks { samples: 201, names, nodes, ..Stacks::default() };
        Samples { time_ns: 7_000, tick_ns: 5_000_000, branes: vec![Sampled { name: "burn".into(), stacks }] }
    }

    /// The fields of a message: numbers, and bytes.
    fn fields(mut bytes: &[u8]) -> Vec<(u64, Result<u64, &[u8]>)> {
        fn varint(bytes: &mut &[u8]) -> u64 {
            let length = bytes.iter().position(|b| b & 0x80 == 0).unwrap() + 1;
            let (number, rest) = bytes.split_at(length);
            *bytes = rest;
            number.iter().rev().fold(0, |value, b| value << 7 | u64::from(b & 0x7f))
        }
        let mut all = Vec::new();
        while !bytes.is_empty() {
            let key = varint(&mut bytes);
            let number = varint(&mut bytes);
            all.push((
                key >> 3,
                if key.is_multiple_of(8) {
                    Ok(number)
                } else {
                    let (piece, rest) = bytes.split_at(usize::try_from(number).unwrap());
                    bytes = rest;
                    Err(piece)
                },
            ));
        }
        all
    }

    #[test]
    fn a_profile_has_what_was_sampled() {
        let profile = profile(&samples(), 5_000);
        let fields = fields(&profile);
        let of = |number: u64| fields.iter().filter(move |(of, _)| *of == number).map(|(_, value)| *value);
        let strings: Vec<&[u8]> = of(6).map(Result::unwrap_err).collect();
        assert_eq!(strings[..5], [b"".as_slice(), b"samples", b"count", b"cpu", b"nanoseconds"]);
        assert_eq!((of(2).count(), of(4).count(), of(5).count()), (2, 3, 3));
        // `spin` of `handle` of `burn`: 200 ticks, a second; 200 is 0xc8 0x01, and 10^9 is 0x80 0x94 0xeb 0xdc 0x03.
        let spin = super::tests::fields(of(2).nth(1).unwrap().unwrap_err());
        assert_eq!(spin[0], (1, Err([3, 1, 2].as_slice())));
        assert_eq!(spin[1], (2, Err([0xc8, 1, 0x80, 0x94, 0xeb, 0xdc, 3].as_slice())));
        assert_eq!((of(9).next(), of(10).next(), of(12).next()), (Some(Ok(2000)), Some(Ok(5000)), Some(Ok(5_000_000))));
    }

    proptest! {
        #[test]
        fn what_is_packed_is_unpacked(bytes in proptest::collection::vec(0_u8..9, 0..3000)) {
            let packed = gzip(&bytes);
            let (body, end) = packed[10..].split_at(packed.len() - 18);
            prop_assert_eq!(&miniz_oxide::inflate::decompress_to_vec(body).unwrap(), &bytes);
            prop_assert_eq!(end, [crc32fast::hash(&bytes).to_le_bytes(), u32::try_from(bytes.len()).unwrap().to_le_bytes()].concat());
        }
    }
}
